"""MaskNet: layers whose inputs are multiplied by masks that the embeddings give, row by row.

Wang et al., "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by
Instance-Guided Mask", DLP-KDD 2021, arXiv 2102.07619. The layers are those of FuxiCTR, which the
public BARS benchmark ran: a mask is two linear layers with a ReLU between them, a block's own layer has
no constant, layer norm comes before its ReLU and dropout after it; of parallel blocks an MLP reads
what they give. Departure from both: masks have at least one hidden unit, however small the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ConfigError
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import (
    MOST_LAYERS,
    WIDEST,
    Depth,
    Dropout,
    HiddenUnits,
    Ratio,
    Width,
    check_choice,
    check_dropout,
    check_positive,
    check_ratio,
    check_units,
)
from embcomp.models.fields import FieldEmbeddings, Pooling
from embcomp.models.layers import MLP, XavierLinear

Structure = Literal["serial", "parallel"]
STRUCTURES: tuple[Structure, ...] = ("serial", "parallel")


class FieldNorm(nn.Module):
    """Layer norm of each field over its columns, with a scale and a shift of its own.

    Args:
        num_fields: number F of fields.
        embedding_dim: width D.
    """

    def __init__(self, num_fields: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_fields, embedding_dim))
        self.bias = nn.Parameter(torch.empty(num_fields, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales to one and shifts to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, fields: Tensor) -> Tensor:
        """Normalise the fields (B, F, D)."""
        return F.layer_norm(fields, fields.shape[2:]) * self.weight + self.bias


class MaskBlock(nn.Module):
    """Hidden values times a mask, then a layer: linear, layer norm (optional), ReLU, dropout.

    Args:
        embedding_width: width E of the embeddings that give the mask.
        input_dim: width C of the hidden values, and of the mask.
        output_dim: width A of the layer.
        reduction_ratio: how many times wider than C the mask's hidden layer is.
        layer_norm: whether to normalise before the ReLU.
        dropout: probability of dropping an output.
    """

    def __init__(
        self,
        embedding_width: int,
        input_dim: int,
        output_dim: int,
        *,
        reduction_ratio: float,
        layer_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        check_ratio("reduction_ratio", reduction_ratio)
        check_dropout("dropout", dropout)
        between = max(1, int(input_dim * reduction_ratio))
        if between > WIDEST:
            raise ConfigError(
                f"reduction_ratio={reduction_ratio}: expected masks with at most {WIDEST:,} hidden "
                f"units, got {between:,} for a width of {input_dim:,}"
            )
        self.mask = MLP(embedding_width, [between], input_dim)
        self.linear = XavierLinear(input_dim, output_dim, bias=False)
        self.norm = nn.LayerNorm(output_dim) if layer_norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings (B, E) and hidden values (B, C) to (B, A)."""
        out = self.linear(hidden * self.mask(embeddings))
        if self.norm is not None:
            out = self.norm(out)
        return self.dropout(out.relu())


class SerialBlocks(nn.Module):
    """Blocks one after the other; the embeddings give the mask of each.

    Args:
        input_dim: width E of the embeddings.
        hidden_units: widths of the blocks.
        reduction_ratio: how many times wider than their outputs the masks' hidden layers are.
        layer_norm: whether blocks normalise.
        dropout: probability of dropping an output of a block.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_units: Sequence[int],
        *,
        reduction_ratio: float,
        layer_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MaskBlock(
                input_dim,
                incoming,
                units,
                reduction_ratio=reduction_ratio,
                layer_norm=layer_norm,
                dropout=dropout,
            )
            for incoming, units in zip((input_dim, *hidden_units), hidden_units)
        )
        self.output = XavierLinear(hidden_units[-1], 1)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings and what is masked first (both (B, E)) to logits (B, 1)."""
        for block in self.blocks:
            hidden = block(embeddings, hidden)
        return self.output(hidden)


class ParallelBlocks(nn.Module):
    """Blocks beside each other, all on the embeddings, and an MLP on what they give.

    Args:
        input_dim: width E of the embeddings.
        num_blocks: number of blocks.
        block_dim: width of each.
        hidden_units: widths of the MLP's hidden layers.
        reduction_ratio: how many times wider than the embeddings the masks' hidden layers are.
        layer_norm: whether blocks normalise.
        dropout: probability of dropping an output of a block or a hidden activation of the MLP.
    """

    def __init__(
        self,
        input_dim: int,
        num_blocks: int,
        block_dim: int,
        hidden_units: Sequence[int],
        *,
        reduction_ratio: float,
        layer_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        check_positive("num_blocks", num_blocks, MOST_LAYERS)
        check_positive("block_dim", block_dim)
        self.blocks = nn.ModuleList(
            MaskBlock(
                input_dim,
                input_dim,
                block_dim,
                reduction_ratio=reduction_ratio,
                layer_norm=layer_norm,
                dropout=dropout,
            )
            for _ in range(num_blocks)
        )
        self.dnn = MLP(num_blocks * block_dim, hidden_units, 1, dropout=dropout)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings and what is masked (both (B, E)) to logits (B, 1)."""
        return self.dnn(torch.cat([block(embeddings, hidden) for block in self.blocks], dim=1))


class MaskNet(nn.Module):
    """Mask blocks on the flattened fields, in series or in parallel.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        structure: "serial": blocks one after the other, read out by one linear layer; "parallel":
            blocks beside each other, read out by an MLP.
        hidden_units: widths of the serial blocks, or of the hidden layers of the parallel blocks' MLP.
        num_blocks: number of parallel blocks.
        block_dim: width of a parallel block.
        reduction_ratio: how many times wider than its output the hidden layer of a mask is.
        embedding_norm: whether the fields that are masked first are normalised, each by itself.
        layer_norm: whether blocks normalise before their ReLU.
        dropout: probability of dropping an output of a block or a hidden activation of the MLP.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        structure: Structure = "serial",
        hidden_units: Sequence[int] = (400, 400, 400),
        num_blocks: int = 3,
        block_dim: int = 64,
        reduction_ratio: float = 1.0,
        embedding_norm: bool = True,
        layer_norm: bool = True,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_structure(structure, hidden_units)
        self.tables = tables
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        num_fields = self.fields.num_fields
        self.norm = FieldNorm(num_fields, embedding_dim) if embedding_norm else None
        width = num_fields * embedding_dim
        if structure == "serial":
            self.masked: nn.Module = SerialBlocks(
                width,
                hidden_units,
                reduction_ratio=reduction_ratio,
                layer_norm=layer_norm,
                dropout=dropout,
            )
        else:
            self.masked = ParallelBlocks(
                width,
                num_blocks,
                block_dim,
                hidden_units,
                reduction_ratio=reduction_ratio,
                layer_norm=layer_norm,
                dropout=dropout,
            )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        hidden = fields if self.norm is None else self.norm(fields)
        return self.masked(fields.flatten(1), hidden.flatten(1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class MaskNetConfig(ModelConfig):
    """Settings of MaskNet; see `MaskNet`."""

    structure: Structure = "serial"
    hidden_units: HiddenUnits = (400, 400, 400)
    num_blocks: Depth = 3
    block_dim: Width = 64
    reduction_ratio: Ratio = 1.0
    embedding_norm: bool = True
    layer_norm: bool = True
    dropout: Dropout = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structure(self.structure, self.hidden_units)

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return MaskNet(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            structure=self.structure,
            hidden_units=self.hidden_units,
            num_blocks=self.num_blocks,
            block_dim=self.block_dim,
            reduction_ratio=self.reduction_ratio,
            embedding_norm=self.embedding_norm,
            layer_norm=self.layer_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )


def check_structure(structure: str, hidden_units: Sequence[int]) -> None:
    """Raise unless the structure is known and has the blocks that it needs."""
    check_choice("structure", structure, STRUCTURES)
    check_units("hidden_units", hidden_units)
    if structure == "serial" and not hidden_units:
        raise ConfigError(
            "hidden_units=[]: structure='serial' needs at least one block, whose width this is; "
            "structure='parallel' takes its blocks from num_blocks and block_dim"
        )
