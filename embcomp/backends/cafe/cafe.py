"""CAFE: private rows for the ids that matter most, found while training; all others share hashed rows.

Zhang, Liu, Zhao, Miao, Lyu, Chen, Yang, Cui, "CAFE: Towards Compact, Adaptive, and Fast Embedding for
Large-scale Recommendation Models", SIGMOD 2024, https://arxiv.org/abs/2312.03256. What an id matters is the
length of its gradients, added up in a sketch of buckets (SpaceSaving in each). An id whose score passes a
threshold gets a row of its own, a copy of the shared row that it had until then; one that loses its row to
another goes back to the shared row as that is by now: nothing is copied back. Older scores decay. It
asks nothing of the numbering of ids and follows what becomes frequent later, which `double_hash` cannot.

Where we depart from the paper and its code:

- rows belong to buckets, four to each, where public code has one list of free rows: an id competes with
  those of its bucket. A row is never idle, and its owner loses it only to a waiting id of the same
  bucket whose score is `margin` times as high (public code frees rows of owners whose scores decay
  below the threshold, and does not let a better id in while its bucket is full of owners);
- scores decay smoothly and cannot overflow: what is new is multiplied by a weight that grows by
  `1 / decay` in the time in which public code multiplies all that is there by `decay`;
- in a step a bucket takes in one id and gives one row; which follows from the step's gradients together, over
  all ranks, and not from the order of samples;
- each table has a sketch and rows of its own; ids of 2**31 and more are hashed only. Ids in bags of several
  values count too; public code reads single values only;
- a row's optimizer state stays with the row when its owner changes, and so does what lazy weight decay owes.

The sketch is the same on every rank and never dealt out: some 40 bytes for each private row, in training
only. What is served keeps the private rows' ids, 4 bytes each. Rows behind a cache (`fused_uvm_caching`) cannot be
written between steps, and are refused by name. A compiled training step (`torch.compile`) watches no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from torch import nn
from typing_extensions import override

from embcomp.backends.base import Backend, MethodState
from embcomp.backends.cafe.hot_sketch import WAITING, WAYS, HotSketch
from embcomp.backends.cafe.sketch_route import SketchedTable, SketchRoute
from embcomp.backends.hash import Hash
from embcomp.io.constraints import Between, Ge, Positive
from embcomp.layers.watched_gradients import WatchedRows
from embcomp.tables.footprint import Footprint, TensorFootprint, vector_footprint
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class Cafe(Hash):
    """A row of its own for each hot id, one hashed row for every other id.

    Args:
        num_buckets: rows of every compressed table, private and shared ones.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        hot_share: share of these rows that are private, rounded down to a multiple of 4.
        threshold: the score that an id needs for a row of its own; a look-up of a feature adds 1 on
            average.
        margin: how many times the score of a row's owner another needs to take the row.
        decay: what scores are multiplied by for every `10 * threshold` look-ups for each private row.
        adapts: whether hot ids are still looked for; without, nothing is kept that serving does not need.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hashes.
    """

    hot_share: Annotated[float, Between(0, 1, "[)")] = 0.7
    threshold: Annotated[float, Positive()] = 5.0
    margin: Annotated[float, Ge(1)] = 1.25
    decay: Annotated[float, Between(0, 1, "(]")] = 0.99
    adapts: bool = True

    name: ClassVar[str] = "cafe"

    def hot_rows(self, table: TableSpec) -> int:
        """How many ids of a table may have a row of their own."""
        return int(self.rows(table) * self.hot_share) // WAYS * WAYS

    @property
    @override
    def is_serving_form(self) -> bool:
        return not self.adapts

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return True  # the sketches of all tables are one tensor

    def _tables(self, tables: Sequence[TableSpec]) -> list[SketchedTable]:
        return [
            SketchedTable(
                name=table.name,
                hot=self.hot_rows(table),
                shared=self.rows(table) - self.hot_rows(table),
                num_features=len(table.feature_names),
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        sketched = self._tables(tables)
        sketch = HotSketch(
            [(table.name, table.hot) for table in sketched],
            adapts=self.adapts,
            threshold=self.threshold,
            margin=self.margin,
            decay=self.decay,
            periods=[
                max(1, int(10 * self.threshold * table.hot)) for table in sketched if table.hot
            ],
        )
        route = SketchRoute(keys, sketched, sketch, seed=self.seed)
        dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=WatchedRows(route.watch, dims) if self.adapts else nn.Identity(),
            needs_unpooled_rows=self.adapts,
            needs_context=self.adapts,
            sees_every_row=self.adapts,
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        found: list[TensorFootprint] = []
        for table in tables:
            cells = self.hot_rows(table)
            if not cells:
                continue
            waiting = cells * WAITING // WAYS
            found.append(vector_footprint(f"{table.name}.hot", "remap", cells, served=True))
            if self.adapts:
                found += [
                    vector_footprint(f"{table.name}.hot_scores", "remap", cells),
                    vector_footprint(f"{table.name}.waiting", "remap", waiting),
                    vector_footprint(f"{table.name}.waiting_scores", "remap", waiting),
                    vector_footprint(f"{table.name}.growth", "remap", 1, itemsize=8),
                ]
        return Footprint(tuple(found))

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The same without scores."""
        return replace(form, config=replace(self, adapts=False)) if self.adapts else form
