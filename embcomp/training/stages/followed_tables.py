"""Where the ids of today's tables come from: found on one rank for a table, in files that all of them map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcomp.data_pipelines.schema import UNSEEN_ID, DatasetInfo
from embcomp.layers.block_work import Statistics, Work
from embcomp.layers.followed_ids import FollowedIds
from embcomp.layers.row_sources import ComputedRows, MemoryRows, RowSource
from embcomp.training.stages.handover import counts_of
from embcomp.training.stages.id_files import mapped_numbers

_STEP = "earlier-ids"
_VALUES, _SHARES = ("kept", "new", "retired"), ("kept_share", "new_share")  # what is told of them


def followed_tables(
    earlier: DatasetInfo, info: DatasetInfo, *, folder: Path, work: Work, memory: int
) -> tuple[dict[str, FollowedIds], dict[str, dict[str, float]]]:
    """By table, where its ids come from, and what became of its values.

    Tables of features whose ids are hashes, which stay what they were, are not among them.

    Args:
        earlier: the earlier dataset.
        info: today's.
        folder: the work's, where files are.
        work: finds the values of a table on one rank.
        memory: bytes that this may take on a rank.
    """
    # Here, as no other training reads vocabularies, and polars takes 20 MiB and a while.
    from embcomp.data_pipelines.followed_values import follow_values

    one_index = Lock()  # whatever is done beside

    def follow(name: str, before: NDArray[np.int64]) -> Statistics:
        with one_index:
            found = asdict(follow_values(earlier, info, name, before, memory))
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}

    counts = counts_of(earlier, folder, work)
    sizes = {each.name: each.num_embeddings for each in info.categorical if not each.is_hashed}
    before, changes = mapped_numbers(_STEP, sizes, follow, folder, work)
    ids = {name: _followed(own, counts[name]) for name, own in before.items()}
    return ids, {name: _numbers(found) for name, found in changes.items()}


def _numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    values: dict[str, float] = {key: int(found[key]) for key in _VALUES}
    return values | {key: float(found[key]) for key in _SHARES}


def _followed(before: Tensor, counts: Tensor) -> FollowedIds:
    """A table's ids: new values begin as what stood for all values that training did not know.

    That is id 1, where it was trained; else they begin with the mean row.

    Args:
        before: (num_embeddings,) int64 earlier ids, or what stands for none.
        counts: (earlier num_embeddings,) int64 how often those occurred.
    """
    from embcomp.data_pipelines.followed_values import NOT_USED

    stands_in = UNSEEN_ID if int(counts[UNSEEN_ID]) > 0 else -1

    def read(start: int, stop: int) -> Tensor:
        own = before[start:stop]
        return torch.where(own < 0, stands_in, own)

    def is_fresh(start: int, stop: int) -> Tensor:
        return before[start:stop] < 0

    def has_value(start: int, stop: int) -> Tensor:
        return before[start:stop] != NOT_USED

    def occurred(start: int, stop: int) -> Tensor:
        return counts[start:stop].to(torch.float64)

    mapped: list[RowSource] = [MemoryRows(before)]
    return FollowedIds(
        before=ComputedRows(before.shape, torch.int64, read, of=mapped),
        fresh=ComputedRows(before.shape, torch.bool, is_fresh, of=mapped),
        has_value=ComputedRows(before.shape, torch.bool, has_value, of=mapped),
        counts=ComputedRows(counts.shape, torch.float64, occurred),
    )
