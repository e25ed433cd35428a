"""FinalMLP: two MLPs on the fields, each through a gate of its own, met in bilinear products of heads.

Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", AAAI 2023, arXiv
2304.00902. The layers are those of FuxiCTR, which the public BARS benchmark ran. Departures from it:

- A gate reads the embedding that its context features have as fields; FuxiCTR gives it tables of its
  own. To do so here, prepare the column a second time under another name and list that name in
  `gate_only`: it then is a context and no field. Numeric contexts have vectors of their own, as there.
- The vector that a gate without context reads starts Xavier-normal. From zero, as there, every hidden
  unit of the gate stays exactly at zero, and neither vector nor hidden layers ever get a gradient.
- Linear maps start Xavier-normal with zero constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import (
    MOST_LAYERS,
    Depth,
    Dropout,
    FeatureNames,
    HiddenUnits,
    NameList,
    check_positive,
    check_setting,
    check_units,
)
from embcomp.models.fields import FieldEmbeddings, NumericVectors, Pooling
from embcomp.models.layers import MLP, XavierLinear


class LearntVector(nn.Module):
    """What a gate without context reads: the same vector for every row.

    Args:
        embedding_dim: width D.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vector anew."""
        nn.init.normal_(self.weight, std=(2.0 / (1 + self.weight.shape[1])) ** 0.5)

    def forward(self) -> Tensor:
        """Return the vector (1, D)."""
        return self.weight


class FeatureGate(nn.Module):
    """A factor between 0 and 2 for every column of the fields, from some context.

    Args:
        output_dim: number C of columns.
        embedding_dim: width D of the fields.
        places: which of the fields are context.
        num_dense: number I of numeric features that are context, 0 for none; each has a vector here.
        hidden_units: widths of the gate's hidden layers.
    """

    def __init__(
        self,
        output_dim: int,
        embedding_dim: int,
        *,
        places: Sequence[int],
        num_dense: int,
        hidden_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.places = tuple(places)
        self.numeric = NumericVectors(num_dense, embedding_dim) if num_dense else None
        contexts = num_dense + len(self.places)
        self.vector = None if contexts else LearntVector(embedding_dim)
        self.network = MLP(max(1, contexts) * embedding_dim, hidden_units, output_dim)

    def forward(self, dense: Tensor, fields: Tensor) -> Tensor:
        """Map values (B, I) and fields (B, F, D) to factors (B, C), or (1, C) without context."""
        if self.vector is not None:
            return 2 * self.network(self.vector()).sigmoid()
        context = [fields[:, place] for place in self.places]
        if self.numeric is not None:
            context.insert(0, self.numeric(dense).flatten(1))
        return 2 * self.network(torch.cat(context, dim=1)).sigmoid()


class BilinearFusion(nn.Module):
    """Two linear maps and the bilinear products of the two inputs' heads, summed to a logit.

    Args:
        first_dim: width of the first input.
        second_dim: width of the second one.
        num_heads: number of heads; divides both.
    """

    def __init__(self, first_dim: int, second_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first = XavierLinear(first_dim, 1)
        self.second = XavierLinear(second_dim, 1)
        self.weight = nn.Parameter(
            torch.empty(num_heads, first_dim // num_heads, second_dim // num_heads)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the products' weights as those of a linear layer from all products to a logit."""
        nn.init.normal_(self.weight, std=(2.0 / (1 + self.weight.numel())) ** 0.5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map (B, first_dim) and (B, second_dim) to logits (B, 1)."""
        mapped = torch.bmm(self._heads(first), self.weight)  # (heads, B, second's head)
        products = (mapped * self._heads(second)).sum(dim=(0, 2)).unsqueeze(1)
        return self.first(first) + self.second(second) + products

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, B, width)


class FieldPick(nn.Module):
    """Some of the fields, flattened.

    Args:
        places: which; None for all.
    """

    def __init__(self, places: Sequence[int] | None) -> None:
        super().__init__()
        self.places = None if places is None else tuple(places)

    def forward(self, fields: Tensor) -> Tensor:
        """Map the fields (B, F, D) to (B, picked * D)."""
        if self.places is not None:
            fields = torch.stack([fields[:, place] for place in self.places], dim=1)
        return fields.flatten(1)


class FinalMLP(nn.Module):
    """Two gated streams of MLPs and their bilinear fusion.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        mlp1_hidden_units: widths of the first MLP's layers, of which there is at least one.
        mlp1_batch_norm: whether it normalises over the batch.
        mlp1_dropout: probability of dropping one of its activations.
        mlp2_hidden_units: widths of the second MLP's layers, of which there is at least one.
        mlp2_batch_norm: whether it normalises over the batch.
        mlp2_dropout: probability of dropping one of its activations.
        num_heads: number of heads of the fusion; divides both last widths.
        feature_selection: whether each MLP reads the fields through a gate.
        gate_hidden_units: widths of the gates' hidden layers.
        context1: categorical features that the first gate reads; a learnt vector where there is
            neither one nor a numeric one.
        context1_numeric: whether the first gate reads the numeric features.
        context2: categorical features that the second gate reads.
        context2_numeric: whether the second gate reads the numeric features.
        gate_only: categorical features that are no fields; each is in `context1` or `context2`.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        mlp1_hidden_units: Sequence[int] = (400, 400, 400),
        mlp1_batch_norm: bool = False,
        mlp1_dropout: float = 0.0,
        mlp2_hidden_units: Sequence[int] = (400,),
        mlp2_batch_norm: bool = False,
        mlp2_dropout: float = 0.0,
        num_heads: int = 1,
        feature_selection: bool = True,
        gate_hidden_units: Sequence[int] = (64,),
        context1: Sequence[str] = (),
        context1_numeric: bool = False,
        context2: Sequence[str] = (),
        context2_numeric: bool = False,
        gate_only: Sequence[str] = (),
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_streams(mlp1_hidden_units, mlp2_hidden_units, num_heads)
        check_features(feature_names, num_dense, context1, context2, gate_only)
        self.tables = tables
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        place = {name: num_dense + n for n, name in enumerate(feature_names)}
        kept = [n for name, n in place.items() if name not in gate_only]
        self.pick = FieldPick([*range(num_dense), *kept] if gate_only else None)
        width = (num_dense + len(kept)) * embedding_dim
        self.gate1 = self.gate2 = None
        if feature_selection:
            self.gate1, self.gate2 = (
                FeatureGate(
                    width,
                    embedding_dim,
                    places=[place[name] for name in names],
                    num_dense=num_dense if numeric else 0,
                    hidden_units=gate_hidden_units,
                )
                for names, numeric in ((context1, context1_numeric), (context2, context2_numeric))
            )
        self.mlp1 = MLP(width, mlp1_hidden_units, batch_norm=mlp1_batch_norm, dropout=mlp1_dropout)
        self.mlp2 = MLP(width, mlp2_hidden_units, batch_norm=mlp2_batch_norm, dropout=mlp2_dropout)
        self.fusion = BilinearFusion(mlp1_hidden_units[-1], mlp2_hidden_units[-1], num_heads)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        first = second = self.pick(fields)  # (B, width)
        if self.gate1 is not None and self.gate2 is not None:
            first = first * self.gate1(dense, fields)
            second = second * self.gate2(dense, fields)
        return self.fusion(self.mlp1(first), self.mlp2(second)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class FinalMLPConfig(ModelConfig):
    """Settings of FinalMLP; see `FinalMLP`."""

    mlp1_hidden_units: HiddenUnits = (400, 400, 400)
    mlp1_batch_norm: bool = False
    mlp1_dropout: Dropout = 0.0
    mlp2_hidden_units: HiddenUnits = (400,)
    mlp2_batch_norm: bool = False
    mlp2_dropout: Dropout = 0.0
    num_heads: Depth = 1
    feature_selection: bool = True
    gate_hidden_units: HiddenUnits = (64,)
    context1: FeatureNames = ()
    context1_numeric: bool = False
    context2: FeatureNames = ()
    context2_numeric: bool = False
    gate_only: FeatureNames = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self.mlp1_hidden_units, self.mlp2_hidden_units, self.num_heads)
        for key in ("context1", "context1_numeric", "context2", "context2_numeric", "gate_only"):
            if getattr(self, key) and not self.feature_selection:
                raise ConfigError(
                    f"{key} belongs to the gates, which feature_selection=False leaves out; "
                    "remove one of the two"
                )

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return FinalMLP(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            mlp1_hidden_units=self.mlp1_hidden_units,
            mlp1_batch_norm=self.mlp1_batch_norm,
            mlp1_dropout=self.mlp1_dropout,
            mlp2_hidden_units=self.mlp2_hidden_units,
            mlp2_batch_norm=self.mlp2_batch_norm,
            mlp2_dropout=self.mlp2_dropout,
            num_heads=self.num_heads,
            feature_selection=self.feature_selection,
            gate_hidden_units=self.gate_hidden_units,
            context1=self.context1,
            context1_numeric=self.context1_numeric,
            context2=self.context2,
            context2_numeric=self.context2_numeric,
            gate_only=self.gate_only,
            pooling=inputs.pooling,
        )


def check_streams(first: Sequence[int], second: Sequence[int], num_heads: int) -> None:
    """Raise unless both MLPs have a layer, whose last widths split evenly over the heads."""
    check_positive("num_heads", num_heads, MOST_LAYERS)
    for key, units in (("mlp1_hidden_units", first), ("mlp2_hidden_units", second)):
        check_units(key, units)
        if not units:
            raise ConfigError(f"{key}=[]: expected at least one layer")
        if units[-1] % num_heads:
            raise ConfigError(
                f"{key}={list(units)}: expected a last width that num_heads={num_heads} divides, "
                f"such as {max(1, round(units[-1] / num_heads)) * num_heads}"
            )


def check_features(
    feature_names: Sequence[str],
    num_dense: int,
    context1: Sequence[str],
    context2: Sequence[str],
    gate_only: Sequence[str],
) -> None:
    """Raise unless contexts are features, named once, and what is no field is one, with fields left."""
    for key, names in (("context1", context1), ("context2", context2), ("gate_only", gate_only)):
        check_setting(key, names, NameList())
        for n, name in enumerate(names):
            if name not in feature_names:
                raise ConfigError(
                    f"{key}: no categorical feature {name!r}{did_you_mean(name, feature_names)}; "
                    f"the features are {listed(feature_names)}"
                )
            if name in names[:n]:
                raise ConfigError(f"{key}: expected each feature once, got {name!r} more than once")
    for name in gate_only:
        if name not in (*context1, *context2):
            raise ConfigError(
                f"gate_only: {name!r} is in neither context1 nor context2, so nothing would read it"
            )
    if not num_dense and set(gate_only) == set(feature_names):
        raise ConfigError("gate_only: expected at least one feature that is a field, got none")
