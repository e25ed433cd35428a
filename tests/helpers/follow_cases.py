"""Forms of an earlier run that follow their ids into another dataset, without any training."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embcomp.backends.base import BackendConfig, FollowInputs, MethodState
from embcomp.backends.blocks import Blocks
from embcomp.backends.codebooks.coded import Coded, CodedRoute
from embcomp.backends.full import Full
from embcomp.backends.low_dim import LowDim, low_dim_form
from embcomp.backends.qr import QR
from embcomp.io.tensor_checksums import bytes_of
from embcomp.layers import block_work
from embcomp.layers.block_work import IN_MEMORY, LEAST_ROWS, Work
from embcomp.layers.followed_ids import FollowedIds
from embcomp.layers.row_sources import RowSource, as_rows
from embcomp.tables.specs import TableSpec
from tests.helpers.handover_cases import work_of

DIM = 8
THEN = {"long": 9000, "short": 300}
NOW = {"long": 9500, "short": 290}

CASES: dict[str, BackendConfig] = {
    "full": Full(),
    "narrow": LowDim(width=4),
    "pruned": LowDim(width=4, kept={"long": 2700, "short": 40}),
    "pruned no more": LowDim(kept={"short": 295}),
    "coded": Coded(subvector_dim=2, num_codewords=8),
    "coded by table": Coded(subvector_dim=3, num_codewords=32, codebooks="table"),
    "qr": QR(divisor=4),
    "blocks": Blocks(cuts={"long": (900,)}, widths={"long": (8, 4), "short": (8,)}),
}

Wrap = Callable[[torch.Tensor], RowSource | torch.Tensor]


def specs(sizes: dict[str, int]) -> list[TableSpec]:
    return [
        TableSpec(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=(f"f-{name}",))
        for name, rows in sizes.items()
    ]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def earlier_form(method: BackendConfig, wrap: Wrap) -> MethodState:
    """What an earlier run has left."""
    tables = specs(THEN)
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(method, LowDim) and method.kept:
        masks = {
            table.name: (drawn(table.num_embeddings, seed=5).argsort() < method.kept[table.name])
            for table in tables
            if method.is_pruned(table)
        }
        rows = {t.name: drawn(t.num_embeddings, DIM, seed=n) for n, t in enumerate(tables)}
        widths = {table.name: method.columns(table) for table in tables}
        made = low_dim_form(tables, rows, masks, widths)
        tensors = dict(made.in_memory().tensors)
    else:
        for n, physical in enumerate(method.physical_tables(tables)):
            own = drawn(physical.num_embeddings, physical.embedding_dim, seed=n)
            tensors[f"rows.{physical.name}"] = own
        route = method.build(tables).route
        if isinstance(route, CodedRoute):
            route.ensure_filled()
            tensors["route.codes"] = route.codes
    return MethodState.of(method, {name: wrap(each) for name, each in tensors.items()})


def ids_of(name: str, wrap: Wrap, *, same_numbers: bool, stand_in: int) -> FollowedIds:
    """Of today's ids half are new; others had another number unless they keep theirs."""
    count, then = NOW[name], THEN[name]
    order = torch.arange(then) if same_numbers else drawn(then, seed=7).argsort()
    order[:2] = torch.arange(2)
    before = torch.cat([order, torch.full((max(0, count - then),), -1)])[:count]
    fresh = (before < 0) | (drawn(count, seed=8) > 0)
    fresh[:2] = False
    return FollowedIds(
        before=as_rows(wrap(torch.where(fresh, stand_in, before))),
        fresh=as_rows(wrap(fresh)),
        has_value=as_rows(wrap(~fresh | (drawn(count, seed=9) > 0))),
        counts=as_rows(wrap((1e4 / torch.arange(1, then + 1)).round().double())),
    )


def follow(
    name: str,
    work: Work = IN_MEMORY,
    wrap: Wrap = lambda tensor: tensor,
    stand_in: int = -1,
) -> dict[str, Any]:
    """A digest of what a case's tables begin with."""
    method = CASES[name]
    form = earlier_form(method, wrap)
    ids = {
        table: ids_of(table, wrap, same_numbers=method.needs_same_numbers, stand_in=stand_in)
        for table in NOW
    }
    found = method.follow_ids(
        FollowInputs(tables=specs(NOW), before=form, tables_before=specs(THEN), ids=ids, work=work)
    )
    tensors: dict[str, Any] = dict(found.tensors)
    for table, move in found.moves.items():
        tensors[f"rows.{table}"] = move.moved(form.rows(table), work, f"moved-{table}")
        tensors[f"state.{table}"] = move.moved_state(form.rows(table))
    return {name: _digest(as_rows(each)) for name, each in tensors.items()}


def _digest(rows: RowSource) -> tuple[Any, ...]:
    """A tensor as a number; it is read a block at a time, as runs write it."""
    sum_ = 0
    for start in range(0, len(rows), LEAST_ROWS):
        part = rows.read(start, min(start + LEAST_ROWS, len(rows)))
        sum_ = zlib.crc32(bytes_of(part.contiguous()).tobytes(), sum_)
    return (rows.shape, str(rows.dtype), sum_)


def follow_on_ranks(name: str, folder: Path, memory: int) -> dict[str, Any]:
    """For a pool of workers."""
    kept = block_work.BLOCK_BYTES
    try:
        with work_of(folder, memory) as work:
            return follow(name, work)
    finally:
        block_work.BLOCK_BYTES = kept
