"""DCN v2: explicit crosses of the embeddings with full or low-rank matrices, and an MLP.

Wang et al., "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to
Rank Systems", WWW 2021, arXiv 2008.13535.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ConfigError
from embcomp.io.constraints import Count, Le
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import (
    WIDEST,
    Depth,
    Dropout,
    HiddenUnits,
    check_choice,
    check_units,
)
from embcomp.models.fields import FieldEmbeddings, Pooling
from embcomp.models.layers import MLP, CrossNet, LowRankCrossNet, XavierLinear

Structure = Literal["parallel", "stacked", "cross"]
STRUCTURES: tuple[Structure, ...] = ("parallel", "stacked", "cross")


class DCNv2(nn.Module):
    """Cross layers and an MLP on the flattened fields, read out by one linear layer.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        structure: "parallel": cross layers beside the MLP; "stacked": the MLP on top of the cross
            layers; "cross": no MLP.
        num_cross_layers: number of cross layers.
        low_rank: None for full matrices, else the rank of a mixture of low-rank experts.
        num_experts: number of experts; with full matrices there are none.
        hidden_units: widths of the MLP's hidden layers; not used by structure "cross".
        batch_norm: whether the MLP normalises over the batch.
        dropout: probability of dropping a hidden activation.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        structure: Structure = "parallel",
        num_cross_layers: int = 3,
        low_rank: int | None = None,
        num_experts: int = 4,
        hidden_units: Sequence[int] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_structure(structure, hidden_units)
        self.structure = structure
        self.tables = tables
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        width = self.fields.num_fields * embedding_dim
        if low_rank is None:
            self.cross: nn.Module = CrossNet(width, num_cross_layers)
        else:
            self.cross = LowRankCrossNet(width, num_cross_layers, low_rank, num_experts)
        if structure == "cross":
            self.dnn = None
            output_width = width
        else:
            self.dnn = MLP(width, hidden_units, batch_norm=batch_norm, dropout=dropout)
            output_width = hidden_units[-1] + (width if structure == "parallel" else 0)
        self.output = XavierLinear(output_width, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        flat = self.fields(dense, self.tables(sparse)).flatten(1)  # (B, (I + F) * D)
        out = self.cross(flat)
        if self.dnn is not None:
            if self.structure == "parallel":
                out = torch.cat([out, self.dnn(flat)], dim=1)
            else:
                out = self.dnn(out)
        return self.output(out).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class DCNv2Config(ModelConfig):
    """Settings of DCN v2; see `DCNv2`."""

    structure: Structure = "parallel"
    num_cross_layers: Depth = 3
    low_rank: Annotated[int | None, Count(1), Le(WIDEST)] = None
    num_experts: Depth = 4
    hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = False
    dropout: Dropout = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structure(self.structure, self.hidden_units)

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return DCNv2(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            structure=self.structure,
            num_cross_layers=self.num_cross_layers,
            low_rank=self.low_rank,
            num_experts=self.num_experts,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )


def check_structure(structure: str, hidden_units: Sequence[int]) -> None:
    """Raise unless the structure is known and has the MLP that it needs."""
    check_choice("structure", structure, STRUCTURES)
    check_units("hidden_units", hidden_units)
    if structure != "cross" and not hidden_units:
        raise ConfigError(
            f"hidden_units=[]: structure={structure!r} needs at least one hidden layer; "
            "structure='cross' has no MLP"
        )
