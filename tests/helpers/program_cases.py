"""One collection with a table of every serving form, so that a program of all methods is traced once."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import Plan, load, save
from embcomp.backends import (
    MGQE,
    QR,
    Blocks,
    Coded,
    Full,
    Hash,
    LowDim,
    LowRank,
    Robe,
    Sparse,
    Unified,
)
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.serving.programs.forms import FormBatch
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.check_data import Declared, random_batch

METHODS = {
    "full": Full(),
    "hash": Hash(num_buckets=40, collisionless=0),
    "low_dim": LowDim(width=5),
    "kept": LowDim(width=7, kept={"kept": 133}),
    "qr": QR(divisor=9),
    "qr_concat": QR(divisor=9, combine="concat"),
    "unified": Unified(num_buckets=120, num_chunks=1, chunks={"unified": 3}),
    "blocks": Blocks(widths={"blocks": (8, 0, 4, 6)}, cuts={"blocks": (5, 10, 20)}),
    "coded": Coded(subvector_dim=2, num_codewords=16),
    "coded_5_bits": Coded(subvector_dim=4, num_codewords=20, codebooks="table", latent_dim=2),
    "low_rank": LowRank(latent_dim=6, subvector_dim=8, bias=True),
    "sparse": Sparse(nonzeros={"sparse": 300}),
    "mgqe": MGQE(subvector_dim=2, num_codewords=16, frequent_share=0.3),
    "robe": Robe(num_weights=400, block_size=4),
}
ANY_ID = ("hash", "unified", "robe")
"""Methods that take any id."""


def tables_of(names):
    """A table of each method; every other one is pooled by its mean."""
    return [
        Declared(
            name=name,
            rows=300 if name == "kept" else 60 + n,
            dim=8,
            features=(f"f_{name}",),
            mean=bool(n % 2),
        )
        for n, name in enumerate(names)
    ]


def saved(folder, names=tuple(METHODS), row_type="mixed"):
    """An artefact of such tables: them, the folder, and the artefact read back with plain torch."""
    if row_type == "mixed":
        own = {name: ROW_TYPES[-1 - n % len(ROW_TYPES)] for n, name in enumerate(METHODS)}
        row_type = {"default": "fp32", **{name: own[name] for name in names}}
    tables = tables_of(names)
    torch.manual_seed(0)
    plan = Plan(default=Full(), overrides={name: METHODS[name] for name in names})
    collection = CompressedEmbeddingBagCollection([table.bag() for table in tables], plan).eval()
    with torch.no_grad():
        for rows in collection.inner_collections():
            for weight in rows.parameters():  # zeros in front, and values of both signs
                weight[:, :1] = 0.0
    record = save(collection, folder, row_type=row_type)
    return SimpleNamespace(
        tables=tables,
        folder=folder,
        config=record.config,
        serving=load(folder, rows="torch", mmap=True),
    )


def batches(tables):
    """Every id of every table in bags of one, then bags of 0 to 4, a batch of none, and one of a row."""
    size = max(table.rows for table in tables)
    features = [table.features[0] for table in tables]
    every = KeyedJaggedTensor(
        keys=features,
        values=torch.cat([torch.arange(size) % table.rows for table in tables]),
        lengths=torch.ones(size * len(tables), dtype=torch.int32),
    )
    others = [
        random_batch(tables, seed=size, batch_size=size, shape=shape)
        for size, shape in ((50, "ragged"), (4, "empty"), (1, "single"))
    ]
    return [FormBatch(torch.zeros(own.stride(), 0), own) for own in (every, *others)]
