"""How often ids occur, where somebody counted: what it is checked for, and whether ids are ranked by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.tables.specs import TableSpec

_LEAST_SHARE = 0.9  # of the look-ups that as many of the most frequent ids have
_SPECIAL_IDS = 2  # of prepared datasets: missing and unseen, which come first however rare they are


def counted(table: TableSpec, counts: Mapping[str, Tensor]) -> Tensor | None:
    """(N,) float64 how often each id of a table occurs; None where nobody counted it.

    Args:
        table: the table.
        counts: by table; nobody counted where there is none, none of its numbers, or all are zero.
    """
    return counts[table.name].to(torch.float64) if was_counted(table, counts) else None


def was_counted(table: TableSpec, counts: Mapping[str, Tensor]) -> bool:
    """Whether somebody counted how often a table's ids occur; see `counted`."""
    found = counts.get(table.name)
    return found is not None and bool(found.numel()) and bool(found.any())


def counts_of_range(
    table: TableSpec, counts: Mapping[str, Tensor], start: int, stop: int
) -> Tensor:
    """(stop - start,) float64 how often ids of a range occur, of a table that was counted."""
    return counts[table.name][start:stop].to(torch.float64)


def check_counts(tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Counts by table on the CPU, after a look at every one.

    Args:
        tables: all tables there are.
        counts: by table, (num_embeddings,) how often each id occurs.

    Raises:
        ConfigError: for a table that does not exist, another length, or what is no count.
    """
    known = {table.name: table for table in tables}
    found: dict[str, Tensor] = {}
    for name, own in counts.items():
        if name not in known:
            raise ConfigError(
                f"counts: no table is called {name!r}{did_you_mean(name, known)}; the tables are "
                f"{listed(known)}"
            )
        rows = known[name].num_embeddings
        if not isinstance(own, Tensor) or tuple(own.shape) != (rows,):
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ConfigError(
                f"counts: table {name!r} has {rows:,} ids; expected a tensor {(rows,)} of how often "
                f"each occurs, got {shape}"
            )
        if own.dtype is torch.bool or own.is_complex():
            raise ConfigError(f"counts: table {name!r}: expected numbers, got {own.dtype}")
        odd = (~(own.double() >= 0) | own.double().isinf()).nonzero()
        if len(odd):
            first = int(odd[0, 0])
            raise ConfigError(
                f"counts: those of table {name!r} must be finite and at least 0; id {first} has "
                f"{own[first].item()}"
            )
        found[name] = own.detach().cpu()
    return found


def check_ranked(
    method: str, table: TableSpec, counts: Mapping[str, Tensor], cuts: Sequence[int], way_out: str
) -> None:
    """Raise a ConfigError where ids before a cut are not those that occur most.

    Args:
        method: what needs them to be.
        table: the table.
        counts: by table; nothing is known of one that nobody counted.
        cuts: numbers of first ids that should have nearly all look-ups that so many ids can have.
        way_out: what to do about it.
    """
    own = counted(table, counts)
    if own is None:
        return
    reached, best = own.cumsum(0), own.sort(descending=True).values.cumsum(0)
    for cut in cuts:
        most = min(max(cut - _SPECIAL_IDS, 0), table.num_embeddings)
        if most and float(reached[cut - 1]) < _LEAST_SHARE * float(best[most - 1]):
            raise ConfigError(
                f"{method}: ids of table {table.name!r} are not ranked by frequency: the first "
                f"{cut:,} have {float(reached[cut - 1] / reached[-1]):.1%} of its look-ups, the most "
                f"frequent {most:,} {float(best[most - 1] / reached[-1]):.1%}. {way_out}"
            )
