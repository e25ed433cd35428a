"""DLRM: numeric values through a bottom MLP, inner products of all fields, a top MLP.

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
2019, arXiv 1906.00091.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ConfigError
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import Dropout, HiddenUnits, check_choice
from embcomp.models.fields import FeatureStack, Pooling, check_dense
from embcomp.models.layers import MLP, PairwiseDots

Interaction = Literal["dot", "cat"]
INTERACTIONS: tuple[Interaction, ...] = ("dot", "cat")


class DLRM(nn.Module):
    """The numeric features become one more field; fields meet in inner products.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features.
        embedding_dim: width D, also that of the bottom MLP's output.
        num_dense: number I of numeric features; with 0 there is no bottom MLP.
        interaction: "dot": inner products of all pairs of fields, beside the numeric field; "cat":
            all fields, concatenated.
        bottom_hidden_units: widths of the bottom MLP's hidden layers; its output is ReLU'd too.
        top_hidden_units: widths of the top MLP's hidden layers.
        batch_norm: whether the hidden layers normalise over the batch.
        bottom_dropout: probability of dropping a hidden activation of the bottom MLP.
        top_dropout: probability of dropping a hidden activation of the top MLP.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        interaction: Interaction = "dot",
        bottom_hidden_units: Sequence[int] = (128, 64),
        top_hidden_units: Sequence[int] = (400, 400, 400),
        batch_norm: bool = False,
        bottom_dropout: float = 0.0,
        top_dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_choice("interaction", interaction, INTERACTIONS)
        self.tables = tables
        self.interact = DLRMInteraction(
            feature_names,
            embedding_dim,
            num_dense,
            interaction=interaction,
            hidden_units=bottom_hidden_units,
            batch_norm=batch_norm,
            dropout=bottom_dropout,
            pooling=pooling,
        )
        self.top = MLP(
            self.interact.output_dim,
            top_hidden_units,
            1,
            batch_norm=batch_norm,
            dropout=top_dropout,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        return self.top(self.interact(dense, self.tables(sparse))).squeeze(1)


class DLRMInteraction(nn.Module):
    """Bottom MLP and interaction: values (B, I) and a collection's output to (B, output_dim).

    Args:
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        interaction: "dot" or "cat", see `DLRM`.
        hidden_units: widths of the bottom MLP's hidden layers.
        batch_norm: whether they normalise over the batch.
        dropout: probability of dropping a hidden activation.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        *,
        interaction: Interaction,
        hidden_units: Sequence[int],
        batch_norm: bool,
        dropout: float,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.stack = FeatureStack(feature_names, embedding_dim, pooling=pooling)
        self.bottom = None
        if num_dense:
            self.bottom = MLP(
                num_dense, hidden_units, embedding_dim, batch_norm=batch_norm, dropout=dropout
            )
        num_fields = len(feature_names) + (1 if num_dense else 0)
        if interaction == "cat":
            self.dots = None
            self.output_dim = num_fields * embedding_dim
        elif num_fields < 2:
            raise ConfigError(
                f"interaction='dot': expected at least two fields, got {list(feature_names)} and "
                "no numeric feature; interaction='cat' takes one"
            )
        else:
            self.dots = PairwiseDots()
            pairs = num_fields * (num_fields - 1) // 2
            self.output_dim = pairs + (embedding_dim if num_dense else 0)

    def forward(self, dense: Tensor, embeddings: object) -> Tensor:
        """Return the top MLP's input (B, output_dim)."""
        check_dense(dense, self.num_dense)
        fields = self.stack(embeddings)  # (B, F, D)
        numeric = None
        if self.bottom is not None:
            numeric = self.bottom(dense).relu()  # (B, D)
            fields = torch.cat([numeric.unsqueeze(1), fields], dim=1)  # (B, 1 + F, D)
        if self.dots is None:
            return fields.flatten(1)
        products = self.dots(fields)
        return products if numeric is None else torch.cat([numeric, products], dim=1)


@dataclass(frozen=True, kw_only=True)
class DLRMConfig(ModelConfig):
    """Settings of DLRM; see `DLRM`."""

    interaction: Interaction = "dot"
    bottom_hidden_units: HiddenUnits = (128, 64)
    top_hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = False
    bottom_dropout: Dropout = 0.0
    top_dropout: Dropout = 0.0

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return DLRM(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            interaction=self.interaction,
            bottom_hidden_units=self.bottom_hidden_units,
            top_hidden_units=self.top_hidden_units,
            batch_norm=self.batch_norm,
            bottom_dropout=self.bottom_dropout,
            top_dropout=self.top_dropout,
            pooling=inputs.pooling,
        )
