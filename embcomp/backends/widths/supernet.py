"""A model for many structures: rows that may be gated, embeddings cut to any of their widths.

Trained with gates and drawn widths, it can be asked afterwards how any choice of rows and widths does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.backends.base import SearchContext
from embcomp.backends.widths.fixed_rows import FixedRows
from embcomp.backends.widths.gates_compiled import is_readable, norms_of
from embcomp.backends.widths.masks import GroupColumns, WidthDraws
from embcomp.backends.widths.threshold_gate import (
    GatedPrefixes,
    Norm,
    NormMeans,
    Step,
    Thresholds,
    relative_norms,
    row_norms,
)
from embcomp.backends.widths.width_space import Widths
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.host_values import on_device
from embcomp.layers.learned_buffers import Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import TableSpec

STEPS_OF_ALPHA = 5_000
"""The steps of a training in which thresholds are pulled up by `alpha` itself in each."""
_HARDEST = 100  # times `alpha`, as the norms of the first few steps say nothing yet


class Supernet(Penalised):
    """Gates rows by thresholds, and in training cuts each embedding to a width drawn for it.

    In evaluation rows have their full width, unless a search has fixed other ones.

    Attributes:
        names: of the tables, in the order in which widths and masks are given.

    Args:
        tables: the group.
        draws: draws widths in training; None leaves embeddings whole.
        gates: whether there are thresholds.
        norm: 1 or 2; which norm is held against the thresholds.
        alpha: weight of `exp(-threshold)` in the loss of a training of `STEPS_OF_ALPHA` steps.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        *,
        draws: WidthDraws | None,
        gates: bool = False,
        norm: Norm = 1,
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        owners = [n for n, table in enumerate(tables) for _ in table.feature_names]
        self._columns = GroupColumns([tables[owner].embedding_dim for owner in owners])
        self._tables = Constant(owners)
        self._norm, self._alpha = norm, alpha
        self.names = names = [table.name for table in tables]
        self.thresholds = Thresholds(names) if gates else None
        self.norms = NormMeans(names) if gates else None
        self.draws = draws
        self._fixed_rows: FixedRows | None = None
        self._fixed_widths: Tensor | None = None

    def fix_rows(self, masks: Sequence[RowSource] | None) -> None:
        """In evaluation, let these rows pass instead of those above the thresholds.

        Args:
            masks: for each table, (N,) bool, read by range; None goes back to the thresholds.
        """
        self._fixed_rows = None if masks is None else FixedRows(masks)

    def fix_widths(self, widths: Sequence[int] | None) -> None:
        """In evaluation, cut the embeddings of each table to a width; None leaves them whole."""
        self._fixed_widths = None if widths is None else torch.tensor(widths)

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        # (R, sum of dims) -> (R, sum of dims)
        self.penalty = None
        if self.training:
            rows = self._gated(rows, looked_up)
            if self.thresholds is not None:
                self.penalty = self._pull * torch.exp(-self.thresholds()).sum()
            if self.draws is not None:
                rows = rows * self._columns.prefixes(self.draws(looked_up))
            return rows
        if self._fixed_rows is None:
            rows = self._gated(rows, looked_up)
        else:
            tables = self._tables.on(rows.device)
            kept = self._fixed_rows.pass_(looked_up.ids(), tables)
            rows = rows * self._columns.spread(kept)
        if self._fixed_widths is not None:
            widths = self._fixed_widths.to(rows.device)[self._tables.on(rows.device)]
            rows = rows * self._columns.prefixes(widths.unsqueeze(0))
        return rows

    @property
    def _pull(self) -> float:
        """How hard thresholds are pulled up, so that a training's steps together pull alike."""
        if not self.planned_steps:
            return self._alpha
        return self._alpha * min(STEPS_OF_ALPHA / self.planned_steps, _HARDEST)

    @property
    @override
    def stops_rows(self) -> bool:
        return self.thresholds is not None

    @override
    @torch.no_grad()
    def keeps_row(self, table: str, rows: Tensor) -> Tensor | None:
        if self.thresholds is None or self.norms is None:
            return None
        place = self.names.index(table)
        norms = relative_norms(row_norms(rows.float(), self._norm), self.norms()[place])
        return norms > self.thresholds()[place]

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        self.penalty = None
        widths = self._each_width(parts, looked_up)
        if self.training and self.thresholds is not None:
            self.penalty = self._pull * torch.exp(-self.thresholds()).sum()
        if self.thresholds is not None and (self.training or self._fixed_rows is None):
            return self._each_gated(parts, widths, looked_up)
        if not self.training and self._fixed_rows is not None:
            tables, passing = self._tables.on(parts[0].device), self._fixed_rows
            kept = [passing.pass_(ids, own) for ids, own in zip(looked_up.each_ids(), tables)]
            parts = [part * own.unsqueeze(1) for part, own in zip(parts, kept)]
        if widths is None:
            return list(parts)
        places = torch.arange(self._columns.widest, device=parts[0].device)
        return [
            part * (places[: part.shape[1]] < own.unsqueeze(1)) for part, own in zip(parts, widths)
        ]

    def _each_width(
        self, parts: Sequence[Tensor], looked_up: LookupContext
    ) -> Sequence[Tensor] | None:
        """The widths to which parts are cut, pair by pair: (N,) or (1,) int64; None where they are whole."""
        if self.training:
            return None if self.draws is None else self.draws.each(looked_up)
        if self._fixed_widths is None:
            return None
        device = parts[0].device
        return self._fixed_widths.to(device)[self._tables.on(device)].split(1)

    def _each_gated(
        self, parts: Sequence[Tensor], widths: Sequence[Tensor] | None, looked_up: LookupContext
    ) -> list[Tensor]:
        assert self.thresholds is not None and self.norms is not None
        norms = [self._norms(part.detach()) for part in parts]
        tables = self._tables.on(parts[0].device)
        if self.training:
            counted = torch.stack([own.sum() for own in norms])
            counts = on_device([len(own) for own in norms], counted.device).to(counted.dtype)
            self.norms.update(torch.stack((counted, counts)), tables, shared=looked_up.sharded)
        means, thresholds = self.norms()[tables], self.thresholds()[tables]
        whole = [None] * len(parts) if widths is None else widths
        return [
            GatedPrefixes.apply(
                part,
                own,
                mean,
                limit,
                None if width is None else width.expand(len(part)).contiguous(),
                self._norm,
            )
            for part, own, mean, limit, width in zip(parts, norms, means, thresholds, whole)
        ]

    def _norms(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N,), never zero where they are divided by."""
        norms = norms_of(rows, self._norm) if is_readable(rows) else row_norms(rows, self._norm)
        return norms if self._norm == 1 else norms.clamp(min=torch.finfo(norms.dtype).tiny ** 0.5)

    def _gated(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        if self.thresholds is None or self.norms is None:
            return rows
        tables = self._tables.on(rows.device)
        norms = self._columns.sums(rows.abs() if self._norm == 1 else rows.square())
        if self._norm == 2:
            norms = norms.clamp(min=torch.finfo(norms.dtype).tiny).sqrt()
        if self.training:
            values, seen = looked_up.are_values(), norms.detach()
            counted = torch.stack(((seen * values).sum(0), values.sum(0).to(norms.dtype)))
            self.norms.update(counted, tables, shared=looked_up.sharded)
        distances = relative_norms(norms, self.norms()[tables]) - self.thresholds()[tables]
        return rows * self._columns.spread(Step.apply(distances))


class Trial:
    """Scores structures on the supernet of a search stage.

    Args:
        tables: the group.
        context: the stage's.
    """

    def __init__(self, tables: Sequence[TableSpec], context: SearchContext) -> None:
        supernet = context.combine
        assert isinstance(supernet, Supernet)
        self._names = [table.name for table in tables]
        self._context, self._supernet = context, supernet

    def fix_rows(self, masks: Mapping[str, RowSource]) -> None:
        """From now on these rows pass: for each table, (N,) bool."""
        self._supernet.fix_rows([masks[name] for name in self._supernet.names])

    def score(self, widths: Widths, rows: int | None) -> float:
        """Of the tables at these widths, on so many search-validation rows or on all."""
        named = dict(zip(self._names, widths))
        self._supernet.fix_widths([named[name] for name in self._supernet.names])
        return self._context.evaluate(rows)

    def release(self) -> None:
        """Leave the supernet as it was."""
        self._supernet.fix_rows(None)
        self._supernet.fix_widths(None)

    def say(self, text: str) -> None:
        """A line for people."""
        self._context.say(text)
