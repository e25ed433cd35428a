"""How often ids occur, where somebody counted: what it is checked for, and whether ids are ranked by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.tables.specs import TableSpec

_LEAST_SHARE = 0.9  # of the look-ups that as many of the most frequent ids have
_AT_ONCE = 1 << 20  # counts that are looked at together
_BITS = 16  # of a value that a histogram is over
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
    if not was_counted(table, counts):
        return
    own = counts[table.name]
    pairs = [(cut, min(max(cut - _SPECIAL_IDS, 0), table.num_embeddings)) for cut in cuts]
    asked = [(cut, most) for cut, most in pairs if most]
    whole = _sum(own)
    for (cut, most), best in zip(asked, sums_of_largest(own, [most for _, most in asked])):
        reached = _sum(own[:cut])
        if reached < _LEAST_SHARE * best:
            raise ConfigError(
                f"{method}: ids of table {table.name!r} are not ranked by frequency: the first "
                f"{cut:,} have {reached / whole:.1%} of its look-ups, the most "
                f"frequent {most:,} {best / whole:.1%}. {way_out}"
            )


def sums_of_largest(values: Tensor, counts: Sequence[int]) -> list[float]:
    """The sums of the largest of very many values, of which a part at a time is looked at.

    Histograms over 16 bits of the values at a time say where the last of them is, in four passes.

    Args:
        values: (N,) not negative, in memory or in a file.
        counts: for each sum, how many values are in it.
    """
    found = [_Largest(left=min(count, len(values))) for count in counts]
    for level in range(64 // _BITS):
        prefixes = {each.prefix for each in found}
        bins = {prefix: torch.zeros(2, 1 << _BITS, dtype=torch.float64) for prefix in prefixes}
        for part in values.split(_AT_ONCE):
            own = part.to(torch.float64)
            keys = own.view(torch.int64) >> (64 - _BITS * (level + 1))
            for prefix, totals in bins.items():
                inside = slice(None) if not level else keys >> _BITS == prefix
                places = keys[inside] & ((1 << _BITS) - 1)
                totals[0] += places.bincount(minlength=1 << _BITS)
                totals[1] += places.bincount(own[inside], minlength=1 << _BITS)
        for each in found:
            each.go_on(*bins[each.prefix])
    return [each.total() for each in found]


@dataclass(kw_only=True)
class _Largest:
    """How far the sum of the largest values is known: that of those above all that begin with a prefix."""

    left: int
    prefix: int = 0
    above: float = 0.0

    def go_on(self, counts: Tensor, sums: Tensor) -> None:
        """Add the bins of the prefix from the top, to the one in which the last value is."""
        reached = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, torch.tensor(float(self.left)).double()))
        bin_ = len(counts) - 1 - place
        self.above += float(sums[bin_ + 1 :].sum())
        self.left -= int(counts[bin_ + 1 :].sum())
        self.prefix = (self.prefix << _BITS) | bin_

    def total(self) -> float:
        """The sum, once the prefix is a value."""
        return self.above + self.left * float(torch.tensor(self.prefix).view(torch.float64))


def _sum(values: Tensor) -> float:
    return sum(float(part.to(torch.float64).sum()) for part in values.split(_AT_ONCE))
