"""AutoInt and AutoInt+: self-attention over the fields, with an MLP beside it in AutoInt+.

Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
CIKM 2019, arXiv 1810.11921. The layers are those of FuxiCTR, which the public BARS benchmark ran:
queries, keys, values and residuals are linear without bias or activation (the authors' own code
has both), the residual is the identity where the widths agree, and layer norm comes before the
ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import (
    MOST_LAYERS,
    Depth,
    Dropout,
    HiddenUnits,
    Width,
    check_heads,
    check_positive,
)
from embcomp.models.fields import FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import MLP, InteractingLayer, XavierLinear


class AutoInt(nn.Module):
    """Interacting layers on the fields, flattened and read out by one linear layer.

    Args:
        tables: collection of the embeddings (width D).
        first_order: collection of the ids' weights (embedding_dim 1) for a linear part beside the
            attention, without a constant of its own; None for no linear part.
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none; each is a field, value times vector.
        attention_dim: width of the fields after each layer, over all heads.
        attention_layers: number of interacting layers.
        num_heads: number of heads; divides `attention_dim`.
        use_residual: whether the layers add a residual.
        use_scale: whether scores are divided by the square root of a head's width.
        layer_norm: whether each layer normalises before its ReLU.
        attention_dropout: probability of dropping an attention weight.
        dnn_hidden_units: widths of the hidden layers of an MLP on the flattened embeddings, whose
            logit is added (AutoInt+); empty for none.
        batch_norm: whether the MLP normalises over the batch.
        dropout: probability of dropping a hidden activation of the MLP.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        first_order: nn.Module | None = None,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        attention_dim: int = 64,
        attention_layers: int = 3,
        num_heads: int = 2,
        use_residual: bool = True,
        use_scale: bool = False,
        layer_norm: bool = False,
        attention_dropout: float = 0.0,
        dnn_hidden_units: Sequence[int] = (),
        batch_norm: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_positive("attention_layers", attention_layers, MOST_LAYERS)
        self.tables = tables
        self.first_order_tables = first_order
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        self.attention = nn.Sequential(
            *(
                InteractingLayer(
                    attention_dim if layer else embedding_dim,
                    attention_dim,
                    num_heads,
                    use_residual=use_residual,
                    use_scale=use_scale,
                    layer_norm=layer_norm,
                    dropout=attention_dropout,
                )
                for layer in range(attention_layers)
            )
        )
        num_fields = self.fields.num_fields
        self.output = XavierLinear(num_fields * attention_dim, 1)
        self.dnn = None
        if dnn_hidden_units:
            self.dnn = MLP(
                num_fields * embedding_dim,
                dnn_hidden_units,
                1,
                batch_norm=batch_norm,
                dropout=dropout,
            )
        self.linear = None
        if first_order is not None:
            self.linear = FirstOrder(feature_names, num_dense, bias=False, pooling=pooling)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        logits = self.output(self.attention(fields).flatten(1)).squeeze(1)  # (B,)
        if self.dnn is not None:
            logits = logits + self.dnn(fields.flatten(1)).squeeze(1)
        if self.linear is not None and self.first_order_tables is not None:
            logits = logits + self.linear(dense, self.first_order_tables(sparse))
        return logits


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig(ModelConfig):
    """Settings of AutoInt; see `AutoInt`.

    Attributes:
        use_wide: whether a linear part with tables of first-order weights is added.
    """

    attention_dim: Width = 64
    attention_layers: Depth = 3
    num_heads: Depth = 2
    use_residual: bool = True
    use_scale: bool = False
    layer_norm: bool = False
    attention_dropout: Dropout = 0.0
    dnn_hidden_units: HiddenUnits = ()
    batch_norm: bool = False
    dropout: Dropout = 0.0
    use_wide: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.attention_dim, self.num_heads)

    @property
    @override
    def uses_first_order(self) -> bool:
        return self.use_wide

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return AutoInt(
            tables,
            first_order,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            attention_dim=self.attention_dim,
            attention_layers=self.attention_layers,
            num_heads=self.num_heads,
            use_residual=self.use_residual,
            use_scale=self.use_scale,
            layer_norm=self.layer_norm,
            attention_dropout=self.attention_dropout,
            dnn_hidden_units=self.dnn_hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )


@dataclass(frozen=True, kw_only=True)
class AutoIntPlusConfig(AutoIntConfig):
    """Settings of AutoInt+: AutoInt with an MLP, by default the one of the BARS benchmark."""

    layer_norm: bool = True
    attention_dropout: Dropout = 0.1
    dnn_hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = True
    dropout: Dropout = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dnn_hidden_units:
            raise ConfigError(
                "dnn_hidden_units=[]: AutoInt+ needs at least one hidden layer; "
                "AutoInt is the model without"
            )
