"""Numbers that no setting can mean, refused for every method, model and section alike.

A type says too little: `True` passes for 1, 1e309 for a rate, and a network of 10^8 layers for one that
can be built. A setting's constraints say what it needs; these are the rules that all share.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**53
"""No integer is larger: JSON readers and floats hold them exactly up to here."""
SEEDS = 2**32
"""Seeds are below this: numpy's generators take no larger ones."""


def hints_of(cls: type) -> Mapping[str, Any]:
    """The annotations of a dataclass, resolved."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


_HINTS: dict[type, Mapping[str, Any]] = {}  # a search makes settings by the thousand


def why_no_number(name: str, value: Any, hint: Any) -> str:
    """What is wrong with the numbers in a field's value; empty if nothing is.

    Args:
        name: the field.
        value: what it was given, of any type.
        hint: its annotation.
    """
    wanted = set(_leaves(hint))
    if not wanted & {int, float} or Any in wanted:
        return ""
    for number in _scalars(value):
        expected = ""
        if isinstance(number, bool):
            expected = "" if bool in wanted else "a number"
        elif isinstance(number, str):
            expected = "" if str in wanted else "a number"
        elif isinstance(number, float) and not math.isfinite(number):
            expected = "a finite number"
        elif number is value and _is_broken(number) and float not in wanted:
            expected = "an integer"
        elif isinstance(number, int) and name == "seed" and not 0 <= number < SEEDS:
            expected = f"a seed from 0 to {SEEDS - 1}"
        elif isinstance(number, int) and abs(number) > MOST:
            expected = f"at most {MOST:,}"  # rates and penalties have bounds of their own
        if expected:
            return f"{name}={shown(value)}: expected {expected}, got {shown(number)}"
    return ""


def _is_broken(number: Any) -> bool:
    return isinstance(number, float) and not number.is_integer()


def _scalars(value: Any) -> Iterator[Any]:
    """The value, or what a sequence or a mapping holds, all the way down."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _scalars(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _leaves(hint: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of; `str` stands for literals."""
    origin = get_origin(hint)
    if origin is Literal:
        yield str
        yield from (type(each) for each in get_args(hint))
    elif origin in (Union, types.UnionType) or origin is None:
        arguments = get_args(hint)
        if not arguments:
            yield hint
        for each in arguments:
            yield from _leaves(each)
    elif issubclass(origin, Mapping):
        yield from _leaves(get_args(hint)[1])
    else:
        for each in get_args(hint):
            yield from _leaves(each)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
