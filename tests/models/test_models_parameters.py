"""Parameter totals of the public BARS benchmark's runs, to the unit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from embcomp.models import (
    AutoIntConfig,
    AutoIntPlusConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    FMConfig,
    LRConfig,
    ModelConfig,
    ModelInputs,
    WideDeepConfig,
)


@dataclass(frozen=True)
class Dataset:
    """Fields and rows of a benchmark dataset."""

    num_categorical: int
    num_dense: int
    num_rows: int


FRAPPE = Dataset(10, 0, 5_389)
MOVIELENS = Dataset(3, 0, 90_239)
AVAZU = Dataset(22, 0, 1_298_599)
CRITEO = Dataset(26, 13, 2_086_303)
DATASETS = {"frappe": FRAPPE, "movielens": MOVIELENS, "avazu": AVAZU, "criteo": CRITEO}

UNITS = (400, 400, 400)
BIG = (500, 500, 500)


def autoint(dim: int, layers: int, heads: int, norm: bool, scale: bool, wide: bool) -> ModelConfig:
    return AutoIntConfig(
        attention_dim=dim,
        attention_layers=layers,
        num_heads=heads,
        layer_norm=norm,
        use_scale=scale,
        use_wide=wide,
    )


def autoint_plus(dim: int, layers: int, heads: int, scale: bool, wide: bool) -> ModelConfig:
    return AutoIntPlusConfig(
        attention_dim=dim,
        attention_layers=layers,
        num_heads=heads,
        use_scale=scale,
        use_wide=wide,
        dnn_hidden_units=UNITS,
        batch_norm=True,
        layer_norm=True,
    )


def dcnv2(layers: int) -> ModelConfig:
    return DCNv2Config(num_cross_layers=layers, hidden_units=UNITS, batch_norm=True)


DEEPFM = DeepFMConfig(hidden_units=UNITS, batch_norm=True)
WIDEDEEP = WideDeepConfig(hidden_units=UNITS, batch_norm=True)
DLRM_DOT = DLRMConfig(bottom_hidden_units=UNITS, top_hidden_units=UNITS, batch_norm=True)
DLRM_CAT = DLRMConfig(interaction="cat", top_hidden_units=UNITS, batch_norm=True)

TOTALS: list[tuple[str, ModelConfig, int]] = [
    ("frappe", LRConfig(), 5_390),
    ("movielens", LRConfig(), 90_240),
    ("avazu", LRConfig(), 1_298_600),
    ("criteo", LRConfig(), 2_086_317),
    ("frappe", FMConfig(), 59_280),
    ("movielens", FMConfig(), 992_630),
    ("avazu", FMConfig(), 14_284_590),
    ("criteo", FMConfig(), 22_949_477),
    ("frappe", DEEPFM, 423_280),
    ("movielens", DEEPFM, 1_328_630),
    ("avazu", DEEPFM, 14_696_590),
    ("criteo", DEEPFM, 23_429_477),
    ("frappe", WIDEDEEP, 423_280),
    ("movielens", WIDEDEEP, 1_328_630),
    ("avazu", WIDEDEEP, 14_696_590),
    ("criteo", WIDEDEEP, 23_429_477),
    ("frappe", dcnv2(4), 458_391),
    ("movielens", dcnv2(5), 1_243_071),
    ("avazu", dcnv2(5), 13_641_311),
    ("criteo", DCNv2Config(num_cross_layers=3, hidden_units=BIG), 22_018_021),
    ("frappe", DCNv2Config(structure="cross", num_cross_layers=4), 94_391),
    ("movielens", DCNv2Config(structure="cross", num_cross_layers=8), 909_861),
    ("avazu", DCNv2Config(structure="cross", num_cross_layers=4), 13_180_691),
    ("criteo", DCNv2Config(structure="cross", num_cross_layers=5), 21_626_001),
    ("frappe", autoint(128, 6, 4, norm=False, scale=False, wide=False), 306_051),
    ("movielens", autoint(128, 2, 4, norm=True, scale=True, wide=True), 1_047_798),
    ("avazu", autoint(128, 4, 1, norm=True, scale=True, wide=False), 13_142_407),
    ("criteo", autoint(256, 3, 4, norm=True, scale=True, wide=True), 23_364_453),
    ("frappe", autoint_plus(128, 5, 4, scale=True, wide=False), 622_180),
    ("movielens", autoint_plus(128, 2, 4, scale=True, wide=True), 1_383_799),
    ("avazu", autoint_plus(256, 5, 2, scale=True, wide=False), 14_202_856),
    ("criteo", autoint_plus(256, 3, 2, scale=False, wide=True), 23_844_454),
    ("frappe", DLRM_CAT, 417_891),
    ("movielens", DLRM_CAT, 1_238_391),
    ("avazu", DLRM_DOT, 13_402_391),
    ("criteo", DLRM_DOT, 21_664_241),
]


def tables(names: tuple[str, ...], num_rows: int, dim: int) -> nn.Module:
    """One table per feature, `num_rows` in all, without allocating any."""
    rows = [num_rows // len(names)] * len(names)
    rows[0] += num_rows - sum(rows)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{name}", num_embeddings=count, embedding_dim=dim, feature_names=[name]
            )
            for name, count in zip(names, rows)
        ],
        device=torch.device("meta"),
    )


@pytest.mark.parametrize(
    ("dataset", "config", "total"),
    TOTALS,
    ids=[f"{type(config).__name__}-{dataset}-{total}" for dataset, config, total in TOTALS],
)
def test_parameter_total_is_the_published_one(dataset: str, config: ModelConfig, total: int):
    data = DATASETS[dataset]
    names = tuple(f"C{i}" for i in range(data.num_categorical))
    with torch.device("meta"):
        model = config.build(
            ModelInputs(names, 10, data.num_dense),
            tables(names, data.num_rows, 10) if config.uses_embeddings else None,
            tables(names, data.num_rows, 1) if config.uses_first_order else None,
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == total
