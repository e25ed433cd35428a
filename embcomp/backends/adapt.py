"""AdaEmbed and AdaptEmb: private rows for the ids of the largest gradients, chosen anew while training goes on.

Lai, Zhang, Liu, Wang, Akella, Chowdhury, "AdaEmbed: Adaptive Embedding for Large-Scale Recommendation Models", OSDI
2023: every id has an importance, the lengths of its gradients added up, of which older ones decay; once in a while the
ids of the greatest importance get the rows, and all others have none. AdaptEmb (of DeepRec, after the benchmark of
Zhang et al., VLDB 2024, https://arxiv.org/abs/2311.15578) gives frequent ids rows of their own, once and for all, and
hashes the rare ones into a few that they share. Both are one method here: which ids have rows of their own is
found in training, and `rare` says what becomes of the others, hashed rows or zeros.

Where we depart from both:

- the first ids begin with the rows, which are the most frequent ones of our datasets: AdaptEmb's choice, from which
  training goes on. An id that gets a row begins with what it was answered until then, the shared row or zeros;
- an owner keeps its row unless another id is `margin` times as important, where AdaEmbed lets all rows be dealt out anew
  once a sample says that one in twenty would change hands;
- each table has rows of its own, as many as its size or a budget gives; AdaEmbed deals the rows of one table to the ids
  of all features, by importances that are divided by their 95th percentile within each feature;
- importances count the gradients of a feature as 1 on average in each step, and all ranks' together;
- a row's optimizer state stays with the row when its owner changes, and so does what lazy weight decay owes, and a
  gradient that is still being accumulated;
- a step is a backward pass, or several of them, between two forward passes.

An importance takes 4 bytes for each id, on every rank and in training only: `cafe` estimates it in a sketch, which is
smaller and lets ids of one bucket alone compete. What is served keeps the private rows' ids, 4 bytes each. Ids of 2**31
and more are never private. Rows behind a cache (`fused_uvm_caching`) cannot be written between steps, and are refused
by name. A compiled training step (`torch.compile`) watches no gradient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend, FollowedForm, FollowInputs, MethodState
from embcomp.backends.full import RangeCheck
from embcomp.backends.hash import Hash
from embcomp.backends.private_ids import LARGEST_ID, PrivateIds, PrivateTable
from embcomp.io.constraints import Between, Count, Ge, Le
from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.followed_ids import FollowedIds, taken
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.held_pieces import HeldPieces, between_steps
from embcomp.layers.routing import beside_ids, renamed
from embcomp.layers.row_sources import ComputedRows, JoinedRows, RowSource
from embcomp.layers.step_count import StepCount
from embcomp.layers.watched_gradients import (
    GradientWatch,
    WatchedRows,
    is_on_ranks,
    sent_by_first,
)
from embcomp.tables.footprint import Footprint, TensorFootprint, vector_footprint
from embcomp.tables.specs import TableSpec, by_name

Rare = Literal["hash", "zero"]


@dataclass(frozen=True, kw_only=True)
class Adapt(Hash):
    """A row of its own for each id that matters most; the others share hashed rows, or have zeros.

    With `rare: zero` ids must lie in `[0, num_embeddings)`; with `rare: hash` any others are hashed.

    Args:
        num_buckets: rows of every compressed table, private and shared ones.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        rare: what ids without a row of their own have: one `hash`ed row of those that they share, or `zero`s.
        private_share: share of the rows that are private, rounded down, where `rare` is `hash`; all are where
            it is `zero`.
        every: steps from one choice of private ids to the next.
        margin: how many times the importance of a row's owner another id needs to take the row.
        decay: what importances are multiplied by at each choice.
        adapts: whether private ids are still chosen; without, nothing is kept that serving does not need.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hashes.
    """

    rare: Rare = "hash"
    private_share: Annotated[float, Between(0, 1, "[)")] = 0.9
    every: Annotated[int, Count(1), Le(10**6)] = 20
    margin: Annotated[float, Ge(1)] = 1.25
    decay: Annotated[float, Between(0, 1, "(]")] = 0.995
    adapts: bool = True

    name: ClassVar[str] = "adapt"
    hashes_ids: ClassVar[bool] = False
    """Each id has an importance, so that there must be a number of them."""

    def private_rows(self, table: TableSpec) -> int:
        """How many ids of a table have a row of their own."""
        rows = self.rows(table)
        return min(LARGEST_ID, rows if self.rare == "zero" else int(rows * self.private_share))

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        row = table.embedding_dim * table.itemsize
        stored = self.rows(table) * row + 4 * self.private_rows(table)
        return super().keeps_full(table) or stored >= table.full_bytes

    @property
    @override
    def is_serving_form(self) -> bool:
        return not self.adapts

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return True  # what is known of the ids of all tables is one tensor

    def _tables(self, tables: Sequence[TableSpec]) -> list[PrivateTable]:
        return [
            PrivateTable(
                name=table.name,
                ids=min(table.num_embeddings, LARGEST_ID),
                rows=self.private_rows(table),
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        owners = [table for table in tables for _ in table.feature_names]
        route = AdaptRoute(
            keys,
            PrivateIds(self._tables(tables), adapts=self.adapts),
            owners=[table.name for table in owners],
            salts=[table_salt(self.seed, table.name, 0) for table in owners],
            shared=[self.rows(table) - self.private_rows(table) for table in owners],
            choice=PrivateChoice(every=self.every, margin=self.margin, decay=self.decay),
            check=RangeCheck(tables) if self.rare == "zero" else nn.Identity(),
        )
        dims = [table.embedding_dim for table in owners]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=WatchedRows(route.watch, dims) if self.adapts else nn.Identity(),
            needs_unpooled_rows=self.adapts,
            needs_context=self.adapts,
            skips_negative_ids=self.rare == "zero",
            sees_every_row=self.adapts,
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        found: list[TensorFootprint] = []
        for table in self._tables(tables):
            if table.rows:
                found.append(
                    vector_footprint(f"{table.name}.ids", "remap", table.rows, served=True)
                )
            if table.rows and self.adapts:
                found += [
                    vector_footprint(f"{table.name}.rows", "remap", table.rows),
                    vector_footprint(f"{table.name}.scores", "remap", table.ids),
                    vector_footprint(f"{table.name}.steps", "remap", 1, itemsize=8),
                ]
        return Footprint(tuple(found))

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The same without importances, private rows in the order of their ids."""
        if not self.adapts:
            return form
        private = [table for table in self._tables(by_name(tables)) if table.rows]
        tensors: dict[str, Tensor | RowSource] = {**form.tensors, **form.sources}
        if private:
            orders = form.source("route.private.rows").split([table.rows for table in private])
            dims = {table.name: table.embedding_dim for table in tables}
            for table, order in zip(private, orders):
                moved = _reordered(table, form.rows(table.name), order, dims[table.name], form.work)
                tensors[f"rows.{table.name}"] = moved
        served = MethodState.of(replace(self, adapts=False), tensors)
        return replace(served, work=form.work, counts=form.counts)

    @override
    def pruned_ids(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        private = [table for table in self._tables(by_name(tables)) if table.rows]
        if self.rare != "zero" or not private:
            return {}
        sizes = {table.name: table.num_embeddings for table in tables}
        owned = form.source("route.private.ids").split([table.rows for table in private])
        return {t.name: _not_among(own, sizes[t.name]) for t, own in zip(private, owned)}

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        """Ids keep their rows and importances; new ones have none of either."""
        then = [table for table in self._tables(by_name(past.tables_before)) if table.rows]
        name, form = "route.private.scores", past.before
        if not self.adapts or not then or name not in {**form.tensors, **form.sources}:
            return FollowedForm(config=self)
        now = {table.name: table for table in self._tables(past.tables)}
        scores = form.source(name).split([each.ids for each in then])
        parts = [
            _followed_scores(own, past.ids[table.name], now[table.name].ids)
            for table, own in zip(then, scores)
        ]
        return FollowedForm(config=self, tensors={name: JoinedRows(parts)})


def _followed_scores(scores: RowSource, ids: FollowedIds, count: int) -> RowSource:
    """(count,) importances of ids that are at their old numbers; new ones have none."""

    def read(start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, dtype=scores.dtype)
        known = min(stop, len(scores))
        if start < known:
            fresh = ids.fresh.read(start, known)
            found[: known - start] = torch.where(fresh, 0, scores.read(start, known))
        return found

    return ComputedRows((count,), scores.dtype, read, of=[scores])


def _not_among(owned: RowSource, count: int) -> RowSource:
    """(count,) bool which ids are not among some, which rise."""

    def first_from(id_: int) -> int:
        places = range(len(owned))
        return bisect_left(places, id_, key=lambda place: int(owned.read(place, place + 1)))

    def read(start: int, stop: int) -> Tensor:
        found = torch.ones(stop - start, dtype=torch.bool)
        found[owned.read(first_from(start), first_from(stop)).long() - start] = False
        return found

    return ComputedRows((count,), torch.bool, read, of=[owned])


@dataclass(frozen=True, kw_only=True)
class PrivateChoice:
    """When and how private ids are chosen.

    Args:
        every: steps from one choice to the next.
        margin: how many times the importance of a row's owner another id needs.
        decay: what importances are multiplied by at each choice.
    """

    every: int
    margin: float
    decay: float


class AdaptRoute(nn.Module):
    """Sends private ids to rows of their own, and all others to hashed ones or to none.

    Attributes:
        private: which ids have rows.
        steps: how many training steps there were.
        watch: what backward passes told since the last call of `write_rows`.

    Args:
        keys: names of the look-ups.
        private: of the tables.
        owners: for each look-up, its table.
        salts: for each look-up, the salt of its hash.
        shared: for each look-up, the rows behind the private ones; 0 where the others have none.
        choice: of private ids.
        check: refuses ids that are out of range, where they are not hashed.
    """

    def __init__(
        self,
        keys: Sequence[str],
        private: PrivateIds,
        *,
        owners: Sequence[str],
        salts: Sequence[int],
        shared: Sequence[int],
        choice: PrivateChoice,
        check: nn.Module,
    ) -> None:
        super().__init__()
        self.check = check
        self.private = private
        adapting = [table.name for table in private.tables]
        if private.adapts and adapting:
            self.steps = StepCount(adapting)
        self.watch = GradientWatch()
        self._pieces = HeldPieces()
        self._choice = choice
        self._keys, self._owners = list(keys), list(owners)
        places = {name: n for n, name in enumerate(adapting)}
        self._places = Constant([places.get(owner, -1) for owner in owners])
        private_rows = {table.name: table.rows for table in private.tables}
        self._first_shared = Constant([private_rows.get(owner, 0) for owner in owners])
        self._salts, self._shared = Constant(salts), Constant(shared)
        self._constants = Constant.stacked(
            self._places, self._first_shared, self._salts, self._shared
        )
        self._hashes = any(shared)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        self.private.ensure_filled()
        ids, (places, first, salts, shared) = beside_ids(features, self._constants)
        rows = hash_rows(ids, salts, shared).add_(first) if self._hashes else None
        if self.private.tables:
            own = self.private.rows_of(ids, places)
            rows = own if rows is None else torch.where(own >= 0, own, rows)
        assert rows is not None, "a table has a row"
        return renamed(features, self._keys, rows.reshape(-1))

    @torch.no_grad()
    def write_rows(self, holder: nn.Module) -> None:
        """Take what the last steps' gradients say, and deal out the private rows where it is time to.

        Args:
            holder: the collection that holds the rows, sharded or not; all ranks call it.
        """
        if not self.private.adapts or not self.private.tables:
            return
        self.steps.known()  # before the first step, where the host may wait
        device = self.private.ids.device
        with between_steps(device):
            wanted = [owner in self.private.names for owner in self._owners]
            seen = self.watch.take(holder, wanted, device)
            if seen is None:  # no backward pass has come since the last forward pass
                return
            self.private.add(seen.ids, self._places.on(device)[seen.keys], seen.scores)
            if self.steps.next() % self._choice.every == 0:
                self._deal_out(holder)

    def _deal_out(self, holder: nn.Module) -> None:
        for place, table in enumerate(self.private.tables):
            ids = self.private.best(place, self._choice.margin)
            if is_on_ranks(holder):  # whose sums may differ in their last digits
                ids = sent_by_first(ids)
            rows, is_new = self.private.give_rows(place, ids)
            pieces = self._pieces.find(holder, table.name, "adapt")
            if self._hashes:
                key = self._owners.index(table.name)
                salt, shared = (c.on(ids.device)[key] for c in (self._salts, self._shared))
                pieces.copy_rows(hash_rows(ids, salt, shared).add_(table.rows), rows, is_new)
            else:
                pieces.clear_rows(rows, is_new)
        self.private.fade(self._choice.decay)


def _reordered(
    table: PrivateTable, rows: RowSource, order: RowSource, columns: int, work: Work
) -> RowSource:
    """Rows of a table with the private ones, which are the first, in another order."""

    def read(block: RowBlock) -> Tensor:
        private = min(block.stop, table.rows)
        places = torch.arange(block.start, block.stop)
        if block.start < private:
            places[: private - block.start] = order.read(block.start, private)
        return taken(rows, places)

    blocks = row_blocks(table.name, len(rows), columns)
    return work.write(f"rows.{table.name}", read, blocks, (len(rows), columns), rows.dtype)
