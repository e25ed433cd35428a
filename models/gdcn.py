"""GDCN: cross layers whose crosses pass a learnt gate, and an MLP beside or on top of them.

Wang et al., "Towards Deeper, Lighter and Interpretable Cross Network for CTR Prediction", CIKM 2023,
arXiv 2311.04635: `structure: stacked` is its GDCN-S, `parallel` its GDCN-P. The gated cross layer is the
one of FuxiCTR, whose gate has no constant. Departures from FuxiCTR: constants start at zero instead
of between 0 and 1, and the structure "cross" (no MLP) is read out by one linear layer, as in DCN v2. The
paper's narrower fields are not here: a table method gives tables widths of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import MOST_LAYERS, Depth, Dropout, HiddenUnits, check_positive
from embcomp.models.dcnv2 import Structure, check_structure
from embcomp.models.fields import FieldEmbeddings, Pooling
from embcomp.models.layers import MLP, XavierLinear


class GatedCrossLayer(nn.Module):
    """One cross layer with a gate: `x_{l+1} = x_l + x_0 * (W x_l + b) * sigmoid(G x_l)`.

    Args:
        input_dim: width C of the input and the output.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        check_positive("input_dim", input_dim)
        self.cross = XavierLinear(input_dim, input_dim)
        self.gate = XavierLinear(input_dim, input_dim, bias=False)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Map x_0 and x_l (B, C) to x_{l+1} (B, C)."""
        return torch.addcmul(x, x0 * self.cross(x), self.gate(x).sigmoid())


class GatedCrossNet(nn.Module):
    """Gated cross layers, each on what the layer before it gives.

    Args:
        input_dim: width C of the input and the output.
        num_layers: number of cross layers.
    """

    def __init__(self, input_dim: int, num_layers: int) -> None:
        super().__init__()
        check_positive("num_cross_layers", num_layers, MOST_LAYERS)
        self.layers = nn.ModuleList(GatedCrossLayer(input_dim) for _ in range(num_layers))

    def forward(self, x0: Tensor) -> Tensor:
        """Map (B, C) to (B, C)."""
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x


class GDCN(nn.Module):
    """Gated cross layers and an MLP on the flattened fields, read out by one linear layer.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        structure: "parallel": cross layers beside the MLP; "stacked": the MLP on top of the cross
            layers; "cross": no MLP.
        num_cross_layers: number of gated cross layers.
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
        self.cross = GatedCrossNet(width, num_cross_layers)
        self.dnn = None
        if structure != "cross":
            self.dnn = MLP(width, hidden_units, batch_norm=batch_norm, dropout=dropout)
        crossed = 0 if structure == "stacked" else width
        deep = 0 if structure == "cross" else hidden_units[-1]
        self.output = XavierLinear(crossed + deep, 1)

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
class GDCNConfig(ModelConfig):
    """Settings of GDCN; see `GDCN`."""

    structure: Structure = "parallel"
    num_cross_layers: Depth = 3
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
        return GDCN(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            structure=self.structure,
            num_cross_layers=self.num_cross_layers,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )
