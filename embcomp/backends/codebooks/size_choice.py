"""Which sub-vectors and how many codewords lose least of rows that are there, within a budget.

Before there are rows, a budget is spent by what theory expects of them
(`VectorQuantized.largest_within`). Trained rows can be asked: of each width, the largest codebooks
that fit are fitted on a sample and measured on rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from embcomp.backends.codebooks.clustering import Latents, cluster, cut_rows, encode
from embcomp.backends.codebooks.vector_quantized import VectorQuantized
from embcomp.layers.block_work import Work
from embcomp.layers.row_sources import MemoryRows, RowSource
from embcomp.layers.spread_rows import read_spread, spread_runs
from embcomp.tables.specs import TableSpec, by_name

_COLUMNS = 32  # of a row that are looked at, at the least a sub-vector
_POINTS = 16  # rows for each codeword
_LEAST = 1 << 13
_HELD_OUT = 4  # of so many sampled rows, one is measured on and not fitted on
_ITERATIONS = 10

Method = TypeVar("Method", bound=VectorQuantized)


def size_of_least_error(
    candidates: Sequence[Method],
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource],
    weights: Mapping[str, RowSource],
    work: Work,
) -> Method:
    """The configuration that loses least of some tables' rows; of equals, the first.

    Args:
        candidates: at least one, sizes fixed, all within the budget.
        tables: the group.
        rows: by table, (N, embedding_dim).
        weights: by table, (N,) what each row counts.
        work: measures each candidate.
    """
    if len(candidates) == 1:
        return candidates[0]
    tables = by_name(tables)

    def measure(place: int) -> dict[str, Tensor]:
        own = candidates[place]
        held = [table for table in tables if not own.keeps_full(table)]
        full = torch.tensor(float(_squares(tables, rows, weights)))
        if not held:
            return {"error": torch.zeros(()).double()}
        lost = sum(_lost(own, held, rows, weights).values())
        return {"error": torch.tensor(lost / max(float(full), 1e-300)).double()}

    found = work.map("sizes", measure, range(len(candidates)))
    errors = [float(each["error"]) for each in found]
    return candidates[errors.index(min(errors))]


def _sample(table: TableSpec, most: int) -> Tensor:
    return spread_runs(table.num_embeddings, most)


def _fitted(count: int, codewords: int) -> Tensor:
    """(count,) bool which rows of a sample codebooks are fitted on: all of a small table's."""
    if count <= _POINTS // 2 * codewords:
        return torch.ones(count, dtype=torch.bool)
    return torch.arange(count) % _HELD_OUT != 0


def _squares(
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource],
    weights: Mapping[str, RowSource],
) -> float:
    """The weighted squares of all rows, from a sample."""
    whole = 0.0
    for table in tables:
        ids = _sample(table, _LEAST)
        own = read_spread(rows[table.name], ids).double().square().sum(1)
        mass = read_spread(weights[table.name], ids)
        whole += float((own * mass).mean()) * table.num_embeddings
    return whole


def _lost(
    config: VectorQuantized,
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource],
    weights: Mapping[str, RowSource],
) -> dict[str, float]:
    """For each table, the weighted squared error of all its rows, from a sample's leading columns."""
    most = max(_LEAST, _POINTS * config.codewords)
    specs: list[TableSpec] = []
    points: dict[str, Tensor] = {}
    masses: dict[str, Tensor] = {}
    for table in tables:
        columns = min(table.embedding_dim, max(1, _COLUMNS // config.width) * config.width)
        ids = _sample(table, most)
        points[table.name] = read_spread(rows[table.name], ids)[:, :columns].float()
        masses[table.name] = read_spread(weights[table.name], ids)
        specs.append(replace(table, num_embeddings=len(ids), embedding_dim=columns))
    fitted = {name: _fitted(len(own), config.codewords) for name, own in points.items()}
    layout = config.layout(
        [replace(spec, num_embeddings=int(fitted[spec.name].sum())) for spec in specs]
    )
    latents = Latents(
        layout=layout,
        rows={n: cut_rows(layout, MemoryRows(own[fitted[n]])) for n, own in points.items()},
        weights={n: MemoryRows(own[fitted[n]]) for n, own in masses.items()},
    )
    books = cluster(
        latents,
        count=config.codewords,
        seed=config.seed,
        scaled=config.scaled,
        iterations=_ITERATIONS,
    )
    lost: dict[str, float] = {}
    for place, (spec, table) in enumerate(zip(specs, tables)):
        name = spec.name
        kept = fitted[name] if bool(fitted[name].all()) else ~fitted[name]
        own = layout.cut(points[name][kept])
        codes = encode(layout, place, own, books)
        words = books.words[torch.tensor(layout.shared_by(place)), codes] * books.scales[place]
        error = (own - words).double()
        mean = (error.square().sum((1, 2)) * masses[name][kept]).mean()
        lost[name] = float(mean) * table.num_embeddings * table.embedding_dim / spec.embedding_dim
    return lost
