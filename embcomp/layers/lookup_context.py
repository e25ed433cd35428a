"""What the rows that a method combines were looked up for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.layers.host_values import known_equal, on_device, reads_wait
from embcomp.layers.routing import key_offsets, padded


@dataclass(frozen=True)
class LookupContext:
    """What the rows that a `combine` gets were looked up for.

    Args:
        features: the batch's bags, one key for each (table, feature) of all methods.
        own: the method's keys among them.
        rows: how many rows were looked up for each key; those beyond a key's values only pad.
        sharded: whether this is one rank's share of a step.
    """

    features: KeyedJaggedTensor
    own: slice
    rows: int
    sharded: bool = False

    def each_ids(self) -> list[Tensor]:
        """The logical ids, key by key: (N of the key's values,) int64."""
        offsets = key_offsets(self.features)
        ids = self.features.values()[offsets[self.own.start] : offsets[self.own.stop]]
        return list(ids.to(torch.int64).split(self._counts()))

    def each_global_sample(self) -> list[Tensor]:
        """What `global_samples` says, key by key: (N of the key's values,) int64."""
        samples = self._sample_of_each_value()
        if self.sharded:
            samples = samples + dist.get_rank() * self.features.stride()
        return list(samples.split(self._counts()))

    def ids(self) -> Tensor:
        """The logical ids: (rows, number of keys) int64, 0 where a row only pads."""
        offsets, counts = key_offsets(self.features), self._counts()
        ids = self.features.values()[offsets[self.own.start] : offsets[self.own.stop]]
        return self._by_row(ids.to(torch.int64), counts)

    def samples(self) -> Tensor:
        """The rows of the batch that the ids belong to: (rows, number of keys) int64, in [0, B)."""
        return self._by_row(self._sample_of_each_value(), self._counts())

    def _sample_of_each_value(self) -> Tensor:
        """(sum of N,) int64, key by key."""
        batch = self.features.stride()
        lengths = self.features.lengths().view(-1, batch)[self.own]
        one = torch.arange(batch, device=lengths.device)
        counts = self._counts()
        each = one.repeat(len(counts))
        is_single = known_equal(counts, batch) and not reads_wait(lengths.device)
        if not (is_single and bool((lengths == 1).all())):
            each = each.repeat_interleave(lengths.reshape(-1).long(), output_size=sum(counts))
        return each

    def global_samples(self) -> Tensor:
        """The same, counted over the batches of all ranks in their order.

        What is drawn from these numbers does not depend on how many ranks share a step.
        """
        if not self.sharded:
            return self.samples()
        return self.samples() + dist.get_rank() * self.features.stride()

    def are_values(self) -> Tensor:
        """Which rows were looked up for a value and do not only pad: (rows, number of keys) bool."""
        counts = self._counts()
        row = torch.arange(self.rows, device=self.features.device())
        return row.unsqueeze(1) < on_device(counts, row.device)

    def _counts(self) -> list[int]:
        return self.features.length_per_key()[self.own]

    def _by_row(self, values: Tensor, counts: list[int]) -> Tensor:
        if known_equal(counts, self.rows):
            return values.view(len(counts), self.rows).t()
        if reads_wait(values.device) and not torch.compiler.is_compiling() and any(counts):
            return padded(values, counts, self.rows).t() * self.are_values()
        filled = values.new_zeros(len(counts), self.rows)
        for column, part in zip(filled, values.split(counts)):
            column[: len(part)] = part
        return filled.t()
