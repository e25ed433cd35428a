"""Every setting of TorchRec's table configs: honoured, or refused by name, never dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import partial

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from embcomp.errors import ConfigError

HONOURED = frozenset(
    {
        "name",
        "num_embeddings",
        "embedding_dim",
        "feature_names",
        "data_type",
        "pooling",
        "weight_init_min",
        "weight_init_max",
        "init_fn",
    }
)
"""Settings that a `TableSpec` has."""

REFUSED: Mapping[str, str] = {
    "num_embeddings_post_pruning": "rows are pruned by methods (low_dim, optembed)",
    "need_pos": "weights by position belong to TorchRec's feature processors, which wrap its own collections",
    "input_dim": "wider ids are mapped before a collection (TorchRec's managed collisions) or hashed by a method",
    "total_num_buckets": "buckets belong to key-value tables, and rows are in memory",
    "use_virtual_table": "rows are in memory; ids without a bound are hashed (hash, unified)",
    "virtual_table_eviction_policy": "rows are in memory, and none is evicted",
    "enable_embedding_update": "rows are written by training and by load_state_dict",
    "stash_weights": "rows stay where they are between passes",
}
"""Settings that would have to be something else than their default to mean anything, and what stands
in their place."""


def check_settings(config: BaseEmbeddingConfig) -> None:
    """Refuse a table's settings that nothing honours, those of a TorchRec yet to come included.

    Raises:
        ConfigError: for the first one that is not as it is by default.
    """
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name in HONOURED or _is_default(setting, value):
            continue
        why = REFUSED.get(setting.name, "this embcomp does not know it")
        raise ConfigError(
            f"table {config.name!r}: {setting.name} must be left at its default, got {value!r}; {why}"
        )


def _is_default(setting: Field, value: object) -> bool:
    if setting.default_factory is not MISSING:
        return bool(value == setting.default_factory())
    return setting.default is MISSING or value == setting.default


def uniform_bounds(config: BaseEmbeddingConfig) -> tuple[float, float] | None:
    """The bounds of a table's uniform initialisation; None when it is the user's own function.

    `init_fn` goes before `weight_init_min` and `weight_init_max`, of which TorchRec makes one where none is
    given.
    """
    start = config.init_fn
    if not isinstance(start, partial) or start.func is not torch.nn.init.uniform_:
        return None
    if start.args or not set(start.keywords) <= {"a", "b"}:
        return None
    return float(start.keywords.get("a", 0.0)), float(start.keywords.get("b", 1.0))
