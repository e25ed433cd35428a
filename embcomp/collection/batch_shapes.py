"""Batches of other shapes than a rectangle of bags, as the routes and combines want them.

TorchRec deduplicates batches: a feature has fewer bags than the batch has rows (its own number of them,
VBE), and `inverse_indices` say which row has which. It pools each bag once and hands it out again, and so
do the collections: `route` makes a rectangle of the bags that there are, `combine` hands out what they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.io.yaml_reading import listed
from embcomp.layers.host_values import reads_wait


def compacted(features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor | None]:
    """A rectangle of the bags that rows share, each of them once.

    Args:
        features: a batch with `inverse_indices`, or with a number of bags for each feature.

    Returns:
        The bags, features with fewer of them filled up with empty ones, without `inverse_indices`; and
        (keys, B) int64 which of its feature's bags each row has, None where that is the row's own.

    Raises:
        ValueError: as for `expanded`.
    """
    inverse, strides = features.inverse_indices_or_none(), features.stride_per_key()
    most = max(strides, default=0)
    if inverse is None or most > inverse[1].shape[1]:
        return expanded(features), None
    lengths = features.lengths()
    if min(strides) < most:
        parts = lengths.split(strides)
        lengths = torch.cat([F.pad(part, (0, most - len(part))) for part in parts])
    return _with_lengths(features, lengths, most), _own_bags_of_rows(features, inverse)


def filled_up(features: KeyedJaggedTensor, stride: int) -> KeyedJaggedTensor:
    """A rectangle of bags with empty ones behind those of each key.

    Args:
        features: the rectangle.
        stride: how many bags each key is to have.
    """
    lengths = features.lengths().view(-1, features.stride())
    padded = F.pad(lengths, (0, stride - features.stride()))
    return _with_lengths(features, padded.reshape(-1), stride)


def shared_by(features: KeyedJaggedTensor, rows: Tensor) -> KeyedJaggedTensor:
    """A rectangle of bags together with which of them each row has: (keys, B) int64."""
    return _with_lengths(features, features.lengths(), features.stride(), shared=rows)


def _with_lengths(
    features: KeyedJaggedTensor, lengths: Tensor, stride: int, shared: Tensor | None = None
) -> KeyedJaggedTensor:
    """The same values in a rectangle of bags of these lengths, of which rows may share some."""
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=lengths,
        stride=stride,
        length_per_key=features.length_per_key(),
        inverse_indices=None if shared is None else (features.keys(), shared),
    )


def handed_out(values: Tensor, dims: Sequence[int], rows: Tensor) -> Tensor:
    """Each row's bags out of those that rows share.

    Args:
        values: (bags, sum of dims), for each key its bags' embeddings.
        dims: of each key.
        rows: (keys, B) int64 which of its key's bags each row has.

    Returns:
        (B, sum of dims).
    """
    if len(set(dims)) > 1:
        parts = values.split(list(dims), dim=1)
        return torch.cat([part.index_select(0, own) for part, own in zip(parts, rows)], dim=1)
    keys, batch = rows.shape  # of one width: all keys at once
    places = rows.t() * keys + torch.arange(keys, device=rows.device)
    found = values.reshape(-1, dims[0]).index_select(0, places.reshape(-1))
    return found.view(batch, keys * dims[0])


def expanded(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch with a bag for each row of each feature: bags that rows share are repeated.

    Args:
        features: any batch.

    Returns:
        The same bags in rows of one number; without `inverse_indices`.

    Raises:
        ValueError: for features with different numbers of bags of which nothing says which row has
            which.
    """
    inverse = features.inverse_indices_or_none()
    strides = features.stride_per_key()
    if inverse is None:
        if len(set(strides)) > 1:
            raise ValueError(
                "expected the same number of bags for every feature, or inverse_indices that say which "
                f"row has which; got {listed(f'{k} {n}' for k, n in zip(features.keys(), strides))}"
            )
        index, batch = None, strides[0] if strides else 0
    else:
        index, batch = _bags_of_rows(features, inverse), inverse[1].shape[1]
    values, weights = features.values(), features.weights_or_none()
    lengths = features.lengths()
    if index is not None:
        ends = lengths.to(torch.int64).cumsum(0)
        starts = (ends - lengths)[index]
        lengths = lengths[index]
        first = lengths.to(torch.int64).cumsum(0) - lengths  # where a row's values begin
        shift = (starts - first).repeat_interleave(lengths)
        positions = torch.arange(shift.numel(), device=shift.device) + shift
        values = values[positions]
        weights = None if weights is None else weights[positions]
    return KeyedJaggedTensor(
        keys=features.keys(), values=values, weights=weights, lengths=lengths, stride=batch
    )


def _own_bags_of_rows(features: KeyedJaggedTensor, inverse: tuple[list[str], Tensor]) -> Tensor:
    """(keys, B) which of its own bags belongs to each row of each key."""
    names, rows = inverse
    places = {name: n for n, name in enumerate(names)}
    missing = [key for key in features.keys() if key not in places]
    if missing:
        raise ValueError(
            f"inverse_indices say nothing of {listed(missing)}; they have {listed(names)}"
        )
    order = [places[key] for key in features.keys()]
    own = rows if order == list(range(len(rows))) else rows[order]
    if not (reads_wait(own.device) or own.is_meta or torch.compiler.is_compiling()):
        _check_bags(features, own)
    return own


def _check_bags(features: KeyedJaggedTensor, rows: Tensor) -> None:
    """Refuse rows of bags that are not there; kernels on other devices refuse them by themselves."""
    strides = torch.tensor(features.stride_per_key())
    odd = ((rows < 0) | (rows >= strides.unsqueeze(1))).nonzero()
    if len(odd):
        key, row = odd[0].tolist()
        raise ValueError(
            f"inverse_indices of feature {features.keys()[key]} must be in [0, {int(strides[key])}), the "
            f"number of its bags; row {row} has {int(rows[key, row])}"
        )


def _bags_of_rows(features: KeyedJaggedTensor, inverse: tuple[list[str], Tensor]) -> Tensor:
    """(keys * B,) which of a batch's bags belongs to each row of each key."""
    own = _own_bags_of_rows(features, inverse)
    starts = [0, *accumulate(features.stride_per_key())][:-1]
    return (own + torch.tensor(starts, device=own.device).unsqueeze(1)).reshape(-1)


def one_bag_a_key(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """All values of a key as one bag, for look-ups of single ids, which no bag changes."""
    counts = features.length_per_key()
    lengths = torch.tensor(counts, dtype=torch.int32, device=features.device())
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=lengths,
        stride=1,
        length_per_key=counts,
    )


def one_empty_row(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch of one row without a value, in the place of one without rows, which TorchRec cannot pool."""
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=features.lengths().new_zeros(len(features.keys())),
        stride=1,
        length_per_key=[0] * len(features.keys()),
    )


def picked(features: KeyedJaggedTensor, order: list[int]) -> KeyedJaggedTensor:
    """Keys of a batch whose features have numbers of bags of their own, in another order.

    Args:
        features: the batch.
        order: places among its keys; any may be left out or repeated.
    """
    strides, counts = features.stride_per_key(), features.length_per_key()
    values = features.values().split(counts)
    lengths = features.lengths().split(strides)
    return KeyedJaggedTensor(
        keys=[features.keys()[n] for n in order],
        values=torch.cat([values[n] for n in order]),
        lengths=torch.cat([lengths[n] for n in order]),
        stride_per_key_per_rank=[[strides[n]] for n in order],
        length_per_key=[counts[n] for n in order],
    )
