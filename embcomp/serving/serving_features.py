"""Batches for serving: a KeyedJaggedTensor, or plain tensors by feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embcomp.errors import DataError

PlainFeature: TypeAlias = Tensor | tuple[Tensor, ...] | JaggedTensor
"""(B,) ids; (values (N,), offsets (B + 1,)), with weights (N,) as a third; or a JaggedTensor."""
Features: TypeAlias = KeyedJaggedTensor | Mapping[str, PlainFeature]

_EXPECTED = "(B,) ids, or a pair of (N,) values and (B + 1,) offsets"


def as_features(
    features: Features, names: Sequence[str], *, is_weighted: bool, device: torch.device
) -> KeyedJaggedTensor:
    """A batch as a KeyedJaggedTensor on a device.

    Args:
        features: a KeyedJaggedTensor, or for each feature its ids.
        names: the features that the tables look up.
        is_weighted: whether ids carry weights.
        device: where the tables are.

    Raises:
        DataError: a feature is missing or not of a shape that is taken, or batch sizes differ.
    """
    if isinstance(features, KeyedJaggedTensor):
        if features.device() == device:
            return features
        features.length_per_key()  # while it is at hand; it goes along
        return features.to(device)
    if not isinstance(features, Mapping):
        raise DataError(
            "expected a KeyedJaggedTensor, or a dict from feature name to "
            f"{_EXPECTED}; got {type(features).__name__}"
        )
    missing = [name for name in names if name not in features]
    if missing:
        raise DataError(
            f"expected features {', '.join(missing)}, which the batch lacks; it has "
            f"{', '.join(features)}"
        )
    bags = {name: _bags(name, features[name], is_weighted) for name in names}
    sizes = {name: len(lengths) for name, (_, lengths, _) in bags.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"features differ in their batch size: {told}")
    weights = [part for _, _, part in bags.values() if part is not None]
    return KeyedJaggedTensor(
        keys=list(names),
        values=torch.cat([values.to(device) for values, _, _ in bags.values()]),
        lengths=torch.cat([lengths.to(device) for _, lengths, _ in bags.values()]),
        weights=torch.cat(weights).to(device) if is_weighted else None,
        stride=next(iter(sizes.values())),
        length_per_key=[len(values) for values, _, _ in bags.values()],
    )


def _bags(name: str, feature: Any, is_weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A feature's values (N,) int64, lengths (B,) int32 and weights (N,) if it must have them."""
    weights: Tensor | None = None
    if isinstance(feature, JaggedTensor):
        weights = feature.weights_or_none()
        values, lengths = feature.values(), feature.lengths()
    elif isinstance(feature, Tensor):
        values, lengths = feature, torch.ones(feature.shape[:1], dtype=torch.int32)
    elif isinstance(feature, tuple) and len(feature) in (2, 3) and _are_tensors(feature):
        values, lengths = feature[0], _lengths(name, feature[0], feature[1])
        weights = feature[2] if len(feature) == 3 else None
    else:
        raise DataError(f"feature {name!r}: expected {_EXPECTED}; got {_told(feature)}")
    if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
        raise DataError(f"feature {name!r}: expected {_EXPECTED}, int64; got {_told(values)}")
    if is_weighted and weights is None:
        raise DataError(
            f"feature {name!r}: these tables are weighted; give (values, offsets, weights)"
        )
    if weights is not None and weights.shape != values.shape:
        raise DataError(
            f"feature {name!r}: {len(values)} values, but weights of shape {tuple(weights.shape)}"
        )
    weights = weights.float() if weights is not None else None
    return values.to(torch.int64), lengths.to(torch.int32), weights


def _lengths(name: str, values: Tensor, offsets: Tensor) -> Tensor:
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or not len(offsets):
        raise DataError(f"feature {name!r}: expected (B + 1,) offsets, got {_told(offsets)}")
    lengths = offsets[1:] - offsets[:-1]
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((lengths < 0).any()):
        raise DataError(
            f"feature {name!r}: offsets must ascend from 0 to the {len(values)} values, got "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )
    return lengths


def _are_tensors(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, Tensor) for part in parts)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{value!r}"[:60]
