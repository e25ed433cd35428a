"""Byte budgets: how they are written, and how a method's size is found that meets one."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from embcomp.errors import ConfigError
from embcomp.io.byte_sizes import parse_bytes

_MOST = 2**60  # an exbibyte
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


RESERVE = "10%"
"""Memory of each device that is kept for all but tables, where nobody says otherwise."""

SHARD_CODES_ABOVE = "64MiB"
"""Bytes of a table's codes, bitmaps and pointers up to which they are on every rank, where nobody says
otherwise."""


def reserved_bytes(reserve: str | int, memory: int, *, name: str = "reserve") -> int:
    """Bytes of a device that tables may not use.

    Args:
        reserve: as a budget, a share being one of the device; `0` and `0%` keep nothing.
        memory: bytes of the device.
        name: what an error calls it.
    """
    none = str(reserve) in ("0", "0%")
    return 0 if none else parse_budget(reserve, full_bytes=memory, name=name)


def parse_budget(budget: str | int, *, full_bytes: int | None = None, name: str = "budget") -> int:
    """Read a budget.

    Args:
        budget: a number of bytes, `"64MiB"` (`embcomp.io.byte_sizes`), or a share of what
            the full tables take, `"10%"`.
        full_bytes: bytes of the full tables, needed to resolve a share.
        name: what an error calls it.

    Returns:
        Bytes, rounded down; 0 for a share whose `full_bytes` is not given (only the syntax is
        checked then).

    Raises:
        ConfigError: when it is not positive or cannot be read.
    """
    wanted = f"{name}: expected a positive number of bytes such as 67108864, '64MiB' or '10%'"
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise ConfigError(f"{wanted}; got {budget!r}")
    if isinstance(budget, int):
        if budget < 1:
            raise ConfigError(f"{wanted}; got {budget}")
        return _possible(budget, name)
    share = _SHARE.fullmatch(budget)
    if share:
        part = Fraction(share[1]) / 100
        if part <= 0:
            raise ConfigError(f"{wanted}; got {budget!r}")
        if part > 1:
            raise ConfigError(f"{name}: a share is one of the whole, at most 100%; got {budget!r}")
        return 0 if full_bytes is None else int(part * full_bytes)
    value = parse_bytes(budget)
    if value is None or value < 1:
        raise ConfigError(f"{wanted}; got {budget!r}")
    return _possible(value, name)


def _possible(size: int, name: str) -> int:
    if size >= _MOST:
        raise ConfigError(f"{name}: no memory holds so many bytes: {size:.3g}")
    return size


def why_unreadable(budget: Any) -> str:
    """What is wrong with a budget, for a message that names its key; empty if nothing is."""
    try:
        parse_budget(budget)
    except ConfigError as error:
        return str(error).removeprefix("budget: ")
    return ""


def format_bytes(size: int) -> str:
    """Bytes for people: `"64.0 MiB"`, three to four significant digits."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def largest_int(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest integer in `[low, high]` that fits, when fitting is monotone; None if none."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
