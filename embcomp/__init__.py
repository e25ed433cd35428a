"""Compressed embedding tables for TorchRec: one table interface, a byte budget, sharded training.

Public names are imported on first use: importing torchrec takes seconds, and `embcomp doctor` must
answer even where that import fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.arrow_memory import spare_arrow_memory
from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.backends import (
        ALPT as ALPT,
        BACKENDS as BACKENDS,
        CCE as CCE,
        DHE as DHE,
        DNIS as DNIS,
        LR2VQ as LR2VQ,
        MDE as MDE,
        MGQE as MGQE,
        MLET as MLET,
        PEP as PEP,
        PQ as PQ,
        QR as QR,
        TT as TT,
        Adapt as Adapt,
        AutoDim as AutoDim,
        Blocks as Blocks,
        Cafe as Cafe,
        Coded as Coded,
        Dedup as Dedup,
        DeepLight as DeepLight,
        DNISSearch as DNISSearch,
        DoubleHash as DoubleHash,
        Full as Full,
        Hash as Hash,
        Int8 as Int8,
        Int16 as Int16,
        LowDim as LowDim,
        LowRank as LowRank,
        Mapped as Mapped,
        Matryoshka as Matryoshka,
        OptEmbed as OptEmbed,
        Robe as Robe,
        Sparse as Sparse,
        TypedBlocks as TypedBlocks,
        Unified as Unified,
    )
    from embcomp.backends.base import BackendConfig as BackendConfig
    from embcomp.collection.collection import (
        CompressedEmbeddingBagCollection as CompressedEmbeddingBagCollection,
        CompressedEmbeddingCollection as CompressedEmbeddingCollection,
    )
    from embcomp.collection.plan import Plan as Plan
    from embcomp.collection.sharded_codes import shard_codes as shard_codes
    from embcomp.compressing.model_compression import compress_ as compress_
    from embcomp.errors import (
        ArtefactError as ArtefactError,
        BudgetError as BudgetError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        EmbcompError as EmbcompError,
    )
    from embcomp.serving.artefact_loading import load as load
    from embcomp.serving.artefact_saving import save as save
    from embcomp.serving.programs.forms import load_program as load_program
    from embcomp.serving.raw_encoder import encoder as encoder

spare_arrow_memory()  # before anything loads Arrow

_HOMES = {
    "ALPT": "embcomp.backends",
    "Adapt": "embcomp.backends",
    "ArtefactError": "embcomp.errors",
    "AutoDim": "embcomp.backends",
    "BACKENDS": "embcomp.backends",
    "BackendConfig": "embcomp.backends.base",
    "Blocks": "embcomp.backends",
    "BudgetError": "embcomp.errors",
    "CheckpointError": "embcomp.errors",
    "CCE": "embcomp.backends",
    "DHE": "embcomp.backends",
    "Cafe": "embcomp.backends",
    "Coded": "embcomp.backends",
    "CompressedEmbeddingBagCollection": "embcomp.collection.collection",
    "CompressedEmbeddingCollection": "embcomp.collection.collection",
    "ConfigError": "embcomp.errors",
    "DNIS": "embcomp.backends",
    "DNISSearch": "embcomp.backends",
    "DeepLight": "embcomp.backends",
    "DataError": "embcomp.errors",
    "Dedup": "embcomp.backends",
    "DoubleHash": "embcomp.backends",
    "EmbcompError": "embcomp.errors",
    "Full": "embcomp.backends",
    "Hash": "embcomp.backends",
    "Int16": "embcomp.backends",
    "Int8": "embcomp.backends",
    "LR2VQ": "embcomp.backends",
    "MDE": "embcomp.backends",
    "MGQE": "embcomp.backends",
    "MLET": "embcomp.backends",
    "PEP": "embcomp.backends",
    "LowDim": "embcomp.backends",
    "LowRank": "embcomp.backends",
    "Mapped": "embcomp.backends",
    "Matryoshka": "embcomp.backends",
    "OptEmbed": "embcomp.backends",
    "PQ": "embcomp.backends",
    "Plan": "embcomp.collection.plan",
    "QR": "embcomp.backends",
    "Robe": "embcomp.backends",
    "Sparse": "embcomp.backends",
    "TT": "embcomp.backends",
    "TypedBlocks": "embcomp.backends",
    "Unified": "embcomp.backends",
    "compress_": "embcomp.compressing.model_compression",
    "encoder": "embcomp.serving.raw_encoder",
    "load": "embcomp.serving.artefact_loading",
    "load_program": "embcomp.serving.programs.forms",
    "save": "embcomp.serving.artefact_saving",
    "shard_codes": "embcomp.collection.sharded_codes",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
