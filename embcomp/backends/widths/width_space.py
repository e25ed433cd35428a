"""The widths that fields may have, their bytes, and where a search over them begins."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from embcomp.errors import BudgetError, ConfigError

Widths = tuple[int, ...]
"""A candidate: one width for each field, in the space's order."""

_LEVELS = 256  # steps in which a power law is scaled down to a budget


@dataclass(frozen=True, kw_only=True)
class WidthSpace:
    """What a search over widths may choose.

    Args:
        names: the fields.
        choices: for each field, its possible widths, ascending.
        sizes: for each field, the bytes of each of these widths; wider is never smaller.
        rows: for each field, its number of rows; power laws narrow the long ones.
        fixed_bytes: bytes that are there whatever the widths are.
        budget: bytes that no candidate may exceed; None for no limit.
    """

    names: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    fixed_bytes: int = 0
    budget: int | None = None

    def __post_init__(self) -> None:
        counts = {len(part) for part in (self.names, self.choices, self.sizes, self.rows)}
        if counts == {0} or len(counts) > 1:
            raise ValueError("expected names, choices, sizes and rows of the same fields")
        for name, widths, sizes in zip(self.names, self.choices, self.sizes):
            if not widths or list(widths) != sorted(set(widths)) or len(widths) != len(sizes):
                raise ValueError(f"field {name!r}: expected ascending widths with bytes for each")
            if list(sizes) != sorted(sizes):
                raise ValueError(f"field {name!r}: a wider choice takes fewer bytes: {sizes}")
        least = self.size(self.narrowest)
        if self.budget is not None and least > self.budget:
            raise BudgetError(
                f"widths: {len(self.names)} field(s) at their least widths take {least:,} bytes, "
                f"over the budget of {self.budget:,}. Raise the budget or allow narrower widths."
            )

    @property
    def narrowest(self) -> Widths:
        """Every field at its least width."""
        return tuple(widths[0] for widths in self.choices)

    @property
    def widest(self) -> Widths:
        """Every field at its greatest width; maybe beyond the budget."""
        return tuple(widths[-1] for widths in self.choices)

    def size(self, candidate: Widths) -> int:
        """Bytes of a candidate."""
        return self.fixed_bytes + sum(
            sizes[widths.index(width)]
            for width, widths, sizes in zip(candidate, self.choices, self.sizes)
        )

    def fits(self, candidate: Widths) -> bool:
        """Whether a candidate is within the budget."""
        return self.budget is None or self.size(candidate) <= self.budget

    def named(self, candidate: Widths) -> dict[str, int]:
        """A candidate's widths by field."""
        return dict(zip(self.names, candidate))

    def narrowed(self, candidate: Widths, field: int) -> tuple[Widths, int] | None:
        """A candidate with one field a choice narrower, and the bytes saved; None if it is least.

        Args:
            candidate: of this space.
            field: which field, by position.
        """
        widths, sizes = self.choices[field], self.sizes[field]
        at = widths.index(candidate[field])
        if at == 0:
            return None
        changed = (*candidate[:field], widths[at - 1], *candidate[field + 1 :])
        return changed, sizes[at] - sizes[at - 1]

    def repair(self, candidate: Widths, *, seed: int) -> Widths:
        """A candidate within the budget: itself, or itself with some fields narrowed.

        Which fields are narrowed is drawn in proportion to the bytes that this saves, from the
        seed and the candidate alone: the same candidate is always repaired alike, yet candidates do
        not all lose the same fields.
        """
        if self.fits(candidate):
            return candidate
        draw = random.Random(f"repair/{seed}/{candidate}")
        while not self.fits(candidate):
            steps = [self.narrowed(candidate, field) for field in range(len(candidate))]
            saving = [step for step in steps if step is not None and step[1] > 0]
            weights = [saved for _, saved in saving]
            candidate = draw.choices(saving, weights=weights)[0][0]
        return candidate

    def random_candidate(self, draw: random.Random) -> Widths:
        """Each field's width uniform over its choices; maybe beyond the budget."""
        return tuple(draw.choice(widths) for widths in self.choices)

    def power_law(self, exponent: float) -> Widths | None:
        """Widths falling with a field's rows, as wide as fits; None where even the narrowest does not.

        Args:
            exponent: width goes with `(least rows / rows) ** exponent`; 0 is one width for all.
        """
        least = max(1, min(self.rows))
        for level in range(_LEVELS, 0, -1):
            scale = level / _LEVELS
            found = tuple(
                _nearest(widths, widths[-1] * scale * (least / max(1, rows)) ** exponent)
                for widths, rows in zip(self.choices, self.rows)
            )
            if self.fits(found):
                return found
        return None

    def power_laws(self, exponents: Iterable[float]) -> Iterator[Widths]:
        """The distinct candidates of several exponents."""
        seen: set[Widths] = set()
        for exponent in exponents:
            found = self.power_law(exponent)
            if found is not None and found not in seen:
                seen.add(found)
                yield found


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: (abs(width - wanted), width))


def width_choices(grid: int | Sequence[int], widest: int) -> tuple[int, ...]:
    """The widths of a grid that a field may have; its full width is always one of them.

    Args:
        grid: a step, or the widths themselves.
        widest: the field's full width.

    Raises:
        ConfigError: for a grid of nothing, or with anything but positive integers.
    """
    listed = list(range(grid, widest + 1, grid)) if isinstance(grid, int) and grid > 0 else grid
    is_step = isinstance(grid, int)
    if isinstance(listed, int) or not (is_step or listed) or not all(map(_is_width, listed)):
        raise ConfigError(f"width grid: expected a step or a list of widths above 0, got {grid!r}")
    return tuple(sorted({width for width in listed if width < widest} | {widest}))


def _is_width(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given > 0
