"""Every model with small settings, and the tables and batches that the tests of models share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from embcomp.models import (
    AutoIntConfig,
    AutoIntPlusConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    FiBiNETConfig,
    FinalMLPConfig,
    FMConfig,
    GDCNConfig,
    LRConfig,
    MaskNetConfig,
    ModelConfig,
    ModelInputs,
    PNNConfig,
    WideDeepConfig,
    XDeepFMConfig,
)
from embcomp.models.fields import Pooling

# A new model gets its line here; every test of models then runs on it.
CASES: dict[str, list[ModelConfig]] = {
    "autoint": [
        AutoIntConfig(attention_dim=8, attention_layers=2, num_heads=2),
        AutoIntConfig(attention_dim=4, num_heads=4, use_scale=True, layer_norm=True, use_wide=True),
        AutoIntConfig(attention_dim=6, attention_layers=1, num_heads=3, use_residual=False),
    ],
    "autoint_plus": [
        AutoIntPlusConfig(attention_dim=8, dnn_hidden_units=(5, 3), batch_norm=False, use_wide=True)
    ],
    "dcnv2": [
        DCNv2Config(num_cross_layers=2, hidden_units=(5, 3)),
        DCNv2Config(structure="stacked", hidden_units=(5,)),
        DCNv2Config(structure="cross"),
        DCNv2Config(num_cross_layers=2, low_rank=2, num_experts=3, hidden_units=(5,)),
    ],
    "deepfm": [DeepFMConfig(hidden_units=(5, 3))],
    "dlrm": [
        DLRMConfig(bottom_hidden_units=(6, 5), top_hidden_units=(7,)),
        DLRMConfig(interaction="cat", bottom_hidden_units=(), top_hidden_units=()),
    ],
    "fibinet": [
        FiBiNETConfig(hidden_units=(5, 3)),
        FiBiNETConfig(
            bilinear="field_all", share_bilinear=False, reduction_ratio=0.5, hidden_units=(5,)
        ),
        FiBiNETConfig(bilinear="field_each", excitation="sigmoid", hidden_units=()),
    ],
    "finalmlp": [
        FinalMLPConfig(
            mlp1_hidden_units=(6, 4), mlp2_hidden_units=(8,), num_heads=2, gate_hidden_units=(5,)
        ),
        FinalMLPConfig(
            mlp1_hidden_units=(4,),
            mlp2_hidden_units=(5, 6),
            gate_hidden_units=(5, 4),
            context1=("user", "tag"),
            context1_numeric=True,
            context2=("item",),
            gate_only=("item",),
        ),
        FinalMLPConfig(
            mlp1_hidden_units=(6,), mlp2_hidden_units=(3,), num_heads=3, feature_selection=False
        ),
    ],
    "fm": [FMConfig()],
    "gdcn": [
        GDCNConfig(num_cross_layers=2, hidden_units=(5, 3)),
        GDCNConfig(structure="stacked", hidden_units=(5,)),
        GDCNConfig(structure="cross"),
    ],
    "lr": [LRConfig()],
    "masknet": [
        MaskNetConfig(hidden_units=(6, 5), reduction_ratio=0.5),
        MaskNetConfig(hidden_units=(6,), embedding_norm=False, layer_norm=False),
        MaskNetConfig(
            structure="parallel", num_blocks=2, block_dim=4, hidden_units=(5,), reduction_ratio=1.5
        ),
    ],
    "pnn": [PNNConfig(hidden_units=(5, 3))],
    "widedeep": [WideDeepConfig(hidden_units=(5, 3))],
    "xdeepfm": [
        XDeepFMConfig(cin_units=(4, 3), hidden_units=(5, 3)),
        XDeepFMConfig(cin_units=(4,), hidden_units=()),
    ],
}
CONFIGS = [config for configs in CASES.values() for config in configs]

ROWS = {"user": 7, "item": 11, "tag": 5}
NAMES = tuple(ROWS)
DIM = 4


@dataclass
class Batch:
    """Values (B, I), ids, and the same ids as one list per feature and row."""

    dense: Tensor
    sparse: KeyedJaggedTensor
    bags: dict[str, list[list[int]]]


def make_batch(*, num_dense: int = 2, batch_size: int = 6, seed: int = 0) -> Batch:
    """A batch with single-valued users and items, and bags of 0 to 3 tags."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    bags = {
        name: [draw(ROWS[name], row % 4 if name == "tag" else 1) for row in range(batch_size)]
        for name in NAMES
    }
    dense = torch.randn(batch_size, num_dense, generator=generator)
    return Batch(dense, make_kjt(bags, NAMES), bags)


def make_kjt(bags: dict[str, list[list[int]]], names: tuple[str, ...]) -> KeyedJaggedTensor:
    """The bags as a KeyedJaggedTensor with the keys in the given order."""
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(names),
        values=torch.tensor([i for name in names for bag in bags[name] for i in bag]),
        lengths=torch.tensor([len(bag) for name in names for bag in bags[name]]),
    )


def make_tables(
    dim: int,
    *,
    names: tuple[str, ...] = NAMES,
    unpooled: bool = False,
    pooling: Pooling = "sum",
    device: str = "cpu",
) -> nn.Module:
    """TorchRec's own collection; a table's rows depend on its name and `dim` alone."""
    if unpooled:
        tables: nn.Module = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=f"t_{name}",
                    num_embeddings=ROWS[name],
                    embedding_dim=dim,
                    feature_names=[name],
                )
                for name in names
            ],
            device=torch.device(device),
        )
    else:
        tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_{name}",
                    num_embeddings=ROWS[name],
                    embedding_dim=dim,
                    feature_names=[name],
                    pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
                )
                for name in names
            ],
            device=torch.device(device),
        )
    if device != "meta":
        with torch.no_grad():
            for key, weight in tables.named_parameters():
                name = key.split(".t_")[1].split(".")[0]
                generator = torch.Generator().manual_seed(100 * dim + len(name))
                weight.normal_(generator=generator)
    return tables


def build(
    config: ModelConfig,
    *,
    num_dense: int = 2,
    names: tuple[str, ...] = NAMES,
    unpooled: bool = False,
    pooling: Pooling = "sum",
) -> nn.Module:
    """The model on TorchRec's collections, with no weight left at zero or one, seeded.

    `names` is the order of the tables; the model always asks for the features as in NAMES.
    """

    def tables(dim: int) -> nn.Module:
        return make_tables(dim, names=names, unpooled=unpooled, pooling=pooling)

    embeddings = tables(DIM) if config.uses_embeddings else None
    first_order = tables(1) if config.uses_first_order else None
    torch.manual_seed(0)  # after the tables, whose kinds draw differently
    model = config.build(ModelInputs(NAMES, DIM, num_dense, pooling), embeddings, first_order)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith(("tables.", "first_order_tables.")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model
