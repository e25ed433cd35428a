"""From what the tables return and the numeric values to field embeddings and first-order terms.

A sharded collection returns a lazy awaitable, and its keys come grouped by sharding type and rank
instead of in the order of the tables. So outputs are picked by key, here, inside modules that are
siblings of the tables: TorchRec's train pipelines trace a model's `forward` symbolically, but call
such siblings as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from embcomp.models.checks import (
    check_choice,
    check_feature_names,
    check_not_negative,
    check_positive,
)

Pooling = Literal["sum", "mean"]
POOLINGS: tuple[Pooling, ...] = ("sum", "mean")


class FeatureStack(nn.Module):
    """Stacks a collection's output to (B, F, D), in the order of `feature_names`.

    It has no parameters. The order of a KeyedTensor's keys is looked up once and kept.

    Args:
        feature_names: names of the F features wanted; the collection may return more.
        embedding_dim: width D of each of them.
        pooling: how to pool the bags of unpooled rows; an empty bag is a zero vector.
    """

    def __init__(
        self, feature_names: Sequence[str], embedding_dim: int, *, pooling: Pooling = "sum"
    ) -> None:
        super().__init__()
        check_feature_names(feature_names)
        check_positive("embedding_dim", embedding_dim)
        check_choice("pooling", pooling, POOLINGS)
        self.feature_names = tuple(feature_names)
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        # Not buffers: they describe the collection's output, which differs once it is sharded.
        self._keys: list[str] | None = None
        self._order: Tensor | None = None

    def forward(self, embeddings: Any) -> Tensor:
        """Stack one batch.

        Args:
            embeddings: a KeyedTensor (values (B, sum of widths)), a dict from feature name to
                JaggedTensor (values (N, D), lengths (B,)), or an awaitable of either.

        Returns:
            The embeddings (B, F, D), in the dtype of the tables.
        """
        # isinstance would be False for an awaitable of the very type that we look for.
        if hasattr(embeddings, "wait"):
            embeddings = embeddings.wait()
        if isinstance(embeddings, KeyedTensor):
            return self._stack_pooled(embeddings)
        if isinstance(embeddings, dict):
            return self._stack_unpooled(embeddings)
        raise TypeError(
            "expected the tables to return a KeyedTensor or a dict of JaggedTensor, "
            f"got {type(embeddings).__name__}"
        )

    def _stack_pooled(self, pooled: KeyedTensor) -> Tensor:
        keys = pooled.keys()
        if keys != self._keys:
            self._order = self._find_order(keys, pooled.length_per_key())
            self._keys = list(keys)
        values = pooled.values().view(-1, len(keys), self.embedding_dim)  # (B, keys, D)
        if self._order is None:
            return values
        if self._order.device != values.device:
            self._order = self._order.to(values.device)
        return values.index_select(1, self._order)

    def _find_order(self, keys: Sequence[str], widths: Sequence[int]) -> Tensor | None:
        """Return the positions of the wanted keys, or None if they are all, in order."""
        self._check_keys(keys)
        wrong = {k: width for k, width in zip(keys, widths) if width != self.embedding_dim}
        if wrong:
            raise ValueError(
                f"expected embeddings of width {self.embedding_dim} from the tables, got {wrong}"
            )
        if tuple(keys) == self.feature_names:
            return None
        return torch.tensor([keys.index(name) for name in self.feature_names])

    def _stack_unpooled(self, rows: dict[str, JaggedTensor]) -> Tensor:
        self._check_keys(list(rows))
        picked = [rows[name] for name in self.feature_names]
        values = torch.cat([jagged.values() for jagged in picked])  # (N, D)
        if values.shape[1] != self.embedding_dim:
            raise ValueError(
                f"expected rows of width {self.embedding_dim} from the tables, "
                f"got {values.shape[1]}"
            )
        lengths = torch.cat([jagged.lengths() for jagged in picked]).long()  # (F * B,)
        # The rows serve as a table of their own, so that every feature is pooled by one kernel.
        pooled = nn.functional.embedding_bag(
            torch.arange(values.shape[0], device=values.device),
            values,
            lengths.cumsum(0) - lengths,
            mode=self.pooling,
        )
        return pooled.view(len(picked), -1, self.embedding_dim).transpose(0, 1)

    def _check_keys(self, keys: Sequence[str]) -> None:
        missing = [name for name in self.feature_names if name not in keys]
        if missing:
            raise ValueError(
                f"the tables returned nothing for {missing}, but {sorted(keys)}; a feature that "
                "two tables serve comes back as 'feature@table', which models do not take"
            )


SMALL_STD = 0.01
"""Where vectors are multiplied with each other: products of values go with their square."""


class NumericVectors(nn.Module):
    """Numeric features as fields: value times a learnt vector per feature.

    Args:
        num_dense: number I of numeric features.
        embedding_dim: width D of the vectors.
        std: standard deviation that they start with; None for Xavier's, as those of a linear layer
            from 1 to D.
    """

    def __init__(self, num_dense: int, embedding_dim: int, std: float | None = None) -> None:
        super().__init__()
        check_positive("num_dense", num_dense)
        check_positive("embedding_dim", embedding_dim)
        self._std = (2.0 / (1 + embedding_dim)) ** 0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(num_dense, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        nn.init.normal_(self.weight, std=self._std)

    def forward(self, dense: Tensor) -> Tensor:
        """Map the values (B, I) to fields (B, I, D)."""
        return dense.unsqueeze(-1) * self.weight


class FieldEmbeddings(nn.Module):
    """All fields of a model: the numeric ones as value times vector, then the categorical ones.

    Args:
        feature_names: names of the F categorical features.
        embedding_dim: width D of every field.
        num_dense: number I of numeric features, 0 for none.
        pooling: how to pool unpooled rows.
        numeric_std: standard deviation of the numeric vectors at the start; None for Xavier's.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        *,
        pooling: Pooling = "sum",
        numeric_std: float | None = None,
    ) -> None:
        super().__init__()
        check_not_negative("num_dense", num_dense)
        self.stack = FeatureStack(feature_names, embedding_dim, pooling=pooling)
        self.numeric = None
        if num_dense:
            self.numeric = NumericVectors(num_dense, embedding_dim, std=numeric_std)
        self.num_dense = num_dense
        self.num_fields = num_dense + len(feature_names)

    def forward(self, dense: Tensor, embeddings: Any) -> Tensor:
        """Return the fields (B, I + F, D) of values (B, I) and a collection's output."""
        check_dense(dense, self.num_dense)
        stacked = self.stack(embeddings)  # (B, F, D)
        if self.numeric is None:
            return stacked
        return torch.cat([self.numeric(dense), stacked], dim=1)


class FirstOrder(nn.Module):
    """The linear part of a model: one weight per id and per numeric feature, summed.

    The weights of the ids live in tables with embedding_dim 1, outside; those of the numeric
    features start at zero, as nothing is known yet and a logarithm of a count is a large value.

    Args:
        feature_names: names of the F categorical features.
        num_dense: number I of numeric features, 0 for none.
        bias: whether to add a learnt constant, which starts at zero.
        pooling: how to pool unpooled weights.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        num_dense: int,
        *,
        bias: bool,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_not_negative("num_dense", num_dense)
        self.stack = FeatureStack(feature_names, 1, pooling=pooling)
        self.num_dense = num_dense
        self.numeric = NumericVectors(num_dense, 1, std=0.0) if num_dense else None
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None

    def reset_parameters(self) -> None:
        """Set the constant to zero; the numeric weights reset themselves."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, dense: Tensor, weights: Any) -> Tensor:
        """Return the sum (B,) for values (B, I) and a collection's output of width 1."""
        check_dense(dense, self.num_dense)
        logits = self.stack(weights).sum(dim=(1, 2))  # (B,)
        if self.numeric is not None:
            logits = logits + dense @ self.numeric.weight.squeeze(1)
        if self.bias is not None:
            logits = logits + self.bias
        return logits


def check_dense(dense: Tensor, num_dense: int) -> None:
    """Raise unless the numeric values have the shape (B, num_dense)."""
    if dense.dim() != 2 or dense.shape[1] != num_dense:
        raise ValueError(
            f"expected dense of shape (B, {num_dense}), got {tuple(dense.shape)}; the model was "
            f"built with num_dense={num_dense}"
        )
