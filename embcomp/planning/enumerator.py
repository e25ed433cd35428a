"""TorchRec's enumerator, to the same options in a fraction of the time where ranks and tables are many.

A planner copies every shard of every option, and those of each better plan that it meets, attribute by
attribute, and hashes all of them for every proposal. Sizes, offsets and estimates are never changed in place, so
copies share them here. It also estimates the time of every shard anew, though a table that is split by rows
has equal shards on all ranks but the last; here each size is estimated once. And options of a table come in
the order of their names, not in one that differs from process to process.

Of an optimizer that TorchRec does not know it takes the state to be as large as the weights; here it is counted.
"""

from __future__ import annotations

from dataclasses import replace

from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import Shard, ShardEstimator, ShardingOption
from typing_extensions import override

from embcomp.layers.row_rmsprop import STATE_WORDS, RowWiseRmspropAr


class SharingShard(Shard):
    """A shard whose copies share all but its rank."""

    @classmethod
    def of(cls, shard: Shard) -> SharingShard:
        """A shard whose estimates are known."""
        found = cls(shard.size, shard.offset, shard.storage, shard.perf, shard.rank)
        found._own_hash = hash((tuple(shard.size), tuple(shard.offset), shard.storage, shard.perf))
        return found

    _own_hash: int = 0

    def __deepcopy__(self, memo: object) -> SharingShard:
        found = SharingShard(self.size, self.offset, self.storage, self.perf, self.rank)
        found._own_hash = self._own_hash
        return found

    @override
    def __hash__(self) -> int:
        return hash((self._own_hash, self.rank))


class SharingEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator, whose options have `SharingShard`s."""

    @override
    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimate bytes and times of every shard.

        Args:
            sharding_options: those of all tables.
        """
        for estimator in self._estimators:
            if isinstance(estimator, EmbeddingStorageEstimator):  # looks at all shards together
                estimator.estimate(sharding_options, self._sharder_data_map)
                self._count_states(sharding_options)
            else:
                self._estimate_times(estimator, sharding_options)
        for option in sharding_options:
            option.shards = [SharingShard.of(shard) for shard in option.shards]

    def _count_states(self, options: list[ShardingOption]) -> None:
        """Take off what was counted too much."""
        memory = "ddr" if self._compute_device == "cpu" else "hbm"
        for option in options:
            if RowWiseRmspropAr not in getattr(option.tensor, "_optimizer_classes", ()):
                continue
            for shard in option.shards:
                rows, columns = shard.size
                surplus = option.tensor.element_size() * rows * (columns - STATE_WORDS)
                storage = shard.storage
                assert storage is not None
                shard.storage = replace(storage, **{memory: getattr(storage, memory) - surplus})

    def _estimate_times(self, estimator: ShardEstimator, options: list[ShardingOption]) -> None:
        """Estimate the time of a shard of each size, as it follows from that alone."""
        wholes = [option.shards for option in options]
        for option in options:
            option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        estimator.estimate(options, self._sharder_data_map)
        for option, shards in zip(options, wholes):
            times = {tuple(shard.size): shard.perf for shard in option.shards}
            for shard in shards:
                shard.perf = times[tuple(shard.size)]
            option.shards = shards

    @override
    def _filter_sharding_types(
        self, name: str, allowed_sharding_types: list[str], sharder_key: str = ""
    ) -> list[str]:
        return sorted(super()._filter_sharding_types(name, allowed_sharding_types, sharder_key))
