"""Batches of other shapes than a rectangle of bags, as the routes and combines want them.

TorchRec deduplicates batches: a feature has fewer bags than the batch has rows (its own number of them,
VBE), and `inverse_indices` say which row has which. It pools each bag once and hands it out again.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.io.yaml_reading import listed


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


def _bags_of_rows(features: KeyedJaggedTensor, inverse: tuple[list[str], Tensor]) -> Tensor:
    """(keys * B,) which of a batch's bags belongs to each row of each key."""
    names, rows = inverse
    places = {name: n for n, name in enumerate(names)}
    missing = [key for key in features.keys() if key not in places]
    if missing:
        raise ValueError(
            f"inverse_indices say nothing of {listed(missing)}; they have {listed(names)}"
        )
    starts = [0, *accumulate(features.stride_per_key())][:-1]
    own = rows[[places[key] for key in features.keys()]]
    return (own + torch.tensor(starts, device=rows.device).unsqueeze(1)).reshape(-1)


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
