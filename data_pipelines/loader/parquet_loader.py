"""Batches from a prepared dataset: shuffled, shared out over ranks, resumable at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.prefetch import prefetch
from embcomp.data_pipelines.loader.row_groups import Columns, RowGroups
from embcomp.data_pipelines.loader.row_sampler import RowSampler
from embcomp.data_pipelines.loader.shuffle_buffer import BatchMaker, ShuffleBuffer
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, DataError

STATE_VERSION = 3
DEFAULT_SHUFFLE_BUFFER = 262_144


class ParquetLoader:
    """An iterable of `Batch` over one split of a prepared dataset.

    The batches of one step hold the same rows together, on however many ranks of the same
    `batch_size * world_size`, and are equally large on all of them (TorchRec's row-wise sharding
    needs that). With `drop_last` all batches are full and the few rows left over are skipped, others
    in each epoch when shuffling. Without it the ranks together cover every row exactly once; where
    the rows of the last step do not divide, a rank's last batch ends with one row that belongs to
    another rank, and `Batch.num_valid` says how many leading rows count.

    Shuffling draws the order of the row groups anew in each epoch, then spreads the rows inside
    windows of `shuffle_buffer` rows evenly over the window's steps; a rank decodes only its own share
    of a window. The stream is a function of the arguments and the epoch: `state_dict` holds no data,
    and a continued epoch is bit-identical to an uninterrupted one, on other ranks too.

    ``python
    loader = ParquetLoader("data/criteo", "train", batch_size=4096, shuffle=True, seed=1)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            ...
    ``

    Args:
        dataset: the folder that holds `dataset.json`, or what `DatasetInfo.load` made of it.
        split: "train", "valid" or "test".
        part: from which share of the split's rows to which, in row order; all of them by default.
        batch_size: rows of a batch on each rank.
        rank: which share of the rows to hand out.
        world_size: how many shares there are.
        shuffle: whether to draw a new order in each epoch.
        seed: of the order; the same on all ranks.
        drop_last: whether to skip what does not fill a batch on every rank; as `shuffle` if None.
        shuffle_buffer: rows of all ranks that are shuffled together, rounded up to whole steps.
        in_ranges: for evaluations in order: a rank takes one range of the rows and decodes no
            others. Which rows meet in a step then depends on the number of ranks.
        prefetch: batches that a background thread makes ahead; 0 makes them in the caller's thread.
        pin_memory: whether to hand out page-locked batches, for copies to a CUDA device.

    Raises:
        DataError: the dataset and its description disagree; named are the file, the feature and
            the value. Columns and row counts are checked here, values when they are read.
    """

    def __init__(
        self,
        dataset: str | Path | DatasetInfo,
        split: str,
        *,
        part: tuple[float, float] = (0.0, 1.0),
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool | None = None,
        shuffle_buffer: int = DEFAULT_SHUFFLE_BUFFER,
        in_ranges: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if in_ranges and (shuffle or drop_last):
            raise ValueError("in_ranges must be False with shuffle or drop_last")
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part must be two growing shares in [0, 1], got {part}")
        _check_arguments(batch_size, rank, world_size, seed, shuffle_buffer, prefetch, pin_memory)
        self.info = dataset if isinstance(dataset, DatasetInfo) else DatasetInfo.load(dataset)
        self.split = split
        self._part = part
        _check_group(self.info)
        self._row_groups = RowGroups(self.info, split, part)
        step_rows = batch_size * world_size
        self._order = RowSampler(
            sizes=self._row_groups.sizes,
            batch_size=batch_size,
            window=-(-max(shuffle_buffer, step_rows) // step_rows) * step_rows,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=shuffle if drop_last is None else drop_last,
            seed=seed,
            in_ranges=in_ranges,
        )
        if self._order.drop_last and not len(self):
            raise DataError(
                f"split {split!r} of {self.info.folder} has {self.num_rows} rows, too few for one "
                f"batch of {batch_size} on each of {world_size} ranks; lower the batch size or set "
                f"drop_last=False"
            )
        self._maker = BatchMaker(self.info)
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._epoch = 0
        self._step = 0
        self._start = 0
        self._decoded: tuple[int, Columns] | None = None

    def __len__(self) -> int:
        """The steps of an epoch, the same on all ranks."""
        return self._order.num_steps

    @property
    def num_rows(self) -> int:
        """The rows of the split, those of all ranks together."""
        return self._row_groups.num_rows

    @property
    def batch_size(self) -> int:
        """Rows of this rank's batches."""
        return self._order.batch_size

    @property
    def epoch(self) -> int:
        """The epoch whose order the next iteration takes."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes.

        Naming the epoch that `load_state_dict` restored keeps the place in it; any other starts at
        its first step.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if epoch != self._epoch:
            self._epoch, self._step, self._start = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        """Go through the epoch, from the restored step if `load_state_dict` came just before."""
        start, self._start = self._start, 0
        self._step = start
        batches = self._batches(self._epoch, start)
        if self._prefetch:
            batches = prefetch(batches, self._prefetch)
        return self._counted(batches)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the place in the stream, in plain JSON values.

        Args:
            step: how many batches of this epoch are done. By default, how many were handed out; a
                pipeline that draws batches ahead of training them must say.
        """
        step = self._step if step is None else step
        if not 0 <= step <= len(self):
            raise ValueError(f"step must be in [0, {len(self)}], the steps of an epoch; got {step}")
        return {"epoch": self._epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: same data and arguments, any rank's state.

        Raises:
            CheckpointError: the state is of a loader with other data or arguments.
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"cannot continue the {self.split} data: {key} is {mine!r}, the checkpoint has "
                    f"{state.get(key)!r}; set it back, or start a new run"
                )
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or not 0 <= step <= len(self):
            raise CheckpointError(
                f"the checkpoint's place in the {self.split} data is epoch {epoch}, step {step}; "
                f"an epoch has {len(self)} steps"
            )
        self._epoch, self._step, self._start = epoch, step, step

    def _identity(self) -> dict[str, Any]:
        order = self._order
        return {
            "state_version": STATE_VERSION,
            "split": self.split,
            "part": list(self._part),
            "rows": self.num_rows,
            "batch_size * world_size": order.step_rows,
            "shuffle": order.shuffle,
            "drop_last": order.drop_last,
            "shuffle_buffer": order.window,
            "seed": order.seed,
            "ranges": order.world_size if order.in_ranges else None,
        }

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._step += 1
            yield batch

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self._order
        for number in range(start_step // order.steps_per_window, order.num_windows):
            window = self._window(epoch, number)
            size, valid = order.window_size(number), order.num_valid(number)
            begin = max(0, start_step - number * order.steps_per_window) * order.batch_size
            for start in range(begin, size, order.batch_size):
                stop = min(start + order.batch_size, size)
                batch = window.batch(self._maker, start, stop, min(stop, valid) - start)
                yield batch.pin_memory() if self._pin_memory else batch

    def _window(self, epoch: int, number: int) -> ShuffleBuffer:
        pieces = [
            self._read(piece.row_group).slice(piece.start, piece.stop)
            for piece in self._order.pieces(epoch, number)
        ]
        return ShuffleBuffer(pieces, self._order.permutation(epoch, number))

    def _read(self, row_group: int) -> Columns:
        # The row group at the end of a window is wanted again at the start of the next one.
        decoded = self._decoded
        if decoded is None or decoded[0] != row_group:
            decoded = (row_group, self._row_groups.read(row_group))
            self._decoded = decoded
        return decoded[1]


def _check_arguments(
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    shuffle_buffer: int,
    prefetch: int,
    pin_memory: bool,
) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("seed", seed, 0),
        ("shuffle_buffer", shuffle_buffer, 1),
        ("prefetch", prefetch, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), the world size; got {rank}")
    if pin_memory and not torch.cuda.is_available():
        raise ValueError("pin_memory=True needs a CUDA device; there is none")


def _check_group(info: DatasetInfo) -> None:
    multi_valued = [feature.name for feature in info.categorical if feature.multi_valued]
    if info.group in multi_valued:
        raise DataError(
            f"group {info.group!r} of {info.folder} is multi-valued; rows can be grouped by a "
            f"single-valued feature only"
        )
