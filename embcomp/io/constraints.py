"""What a setting may be, said in its annotation and checked wherever settings are made.

    divisor: Annotated[int | None, Ge(1)] = None
    combine: Literal["mult", "add"] = "mult"

Of a sequence or a mapping a rule asks every number. pydantic does not know these rules, so that a
mistake has one text, whether it comes from Python or from YAML. What relates two fields is code.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.io.numeric_settings import hints_of, shown, why_no_number


class Rule:
    """What a number must be; subclasses are frozen dataclasses that say `holds` and `words`."""

    whole = False
    """Whether the rule looks at the value as it is, rather than at each number in it."""
    of = ""
    """What the keys of a mapping are, where errors are to say it."""

    def expected(self, value: Any) -> str:
        """What was expected, in words; empty where the value is that."""
        return self.words() if _is_number(value) and not self.holds(value) else ""

    def holds(self, number: float) -> bool:
        """Whether a number is what it must be."""
        raise NotImplementedError

    def words(self) -> str:
        """What it must be."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ge(Rule):
    """At least so much."""

    least: float

    @override
    def holds(self, number: float) -> bool:
        return number >= self.least

    @override
    def words(self) -> str:
        return f"at least {self.least}"


@dataclass(frozen=True)
class Positive(Rule):
    """More than 0."""

    @override
    def holds(self, number: float) -> bool:
        return number > 0

    @override
    def words(self) -> str:
        return "positive"


@dataclass(frozen=True)
class Le(Rule):
    """At most so much, where all integers up to 2^53 would be too many."""

    most: int

    @override
    def holds(self, number: float) -> bool:
        return abs(number) <= self.most

    @override
    def words(self) -> str:
        return f"at most {self.most:,}"


@dataclass(frozen=True)
class Between(Rule):
    """A range, whose ends belong to it where the brackets say so: `[)` is low <= x < high."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    @override
    def holds(self, number: float) -> bool:
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        return above and below

    @override
    def words(self) -> str:
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


@dataclass(frozen=True)
class Count(Rule):
    """An integer and nothing like one, of at least so much."""

    least: int
    of: str = ""

    @override
    def expected(self, value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= self.least
        return "" if fits else self.words()

    @override
    def words(self) -> str:
        return f"an integer of at least {self.least}"


class Broken(NamedTuple):
    """A rule that a value does not keep.

    Attributes:
        field: the setting.
        key: the key in its mapping, quoted, with what such keys are; empty elsewhere.
        value: the setting's value.
        part: what of it breaks the rule.
        expected: what was expected.
        choices: the only values there are; empty where there are others.
    """

    field: str
    key: str
    value: Any
    part: Any
    expected: str
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Constrained:
    """Settings that are checked by their annotations, and whose lists become tuples."""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            if not field.init:
                continue
            value = as_tuples(getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            broken = broken_rule(type(self), field.name, value)
            if broken is not None:
                raise ConfigError(self.refusal(broken))
            if problem := why_no_number(field.name, value, hints[field.name]):
                raise ConfigError(f"{self.owner()}{problem}")

    @classmethod
    def owner(cls) -> str:
        """What errors begin with; nothing, or a name and a colon."""
        return ""

    @classmethod
    def refusal(cls, broken: Broken) -> str:
        """The text of an error."""
        place = f"{broken.field} of {broken.key}" if broken.key else broken.field
        return f"{cls.owner()}{place} must be {broken.expected}, got {shown(broken.part)}"


def as_tuples(value: Any, hint: Any) -> Any:
    """Lists as tuples where an annotation says so, as JSON and YAML know lists only."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        hint = next((each for each in arguments if get_origin(each) is tuple), None)
        return value if hint is None else as_tuples(value, hint)
    if isinstance(value, Mapping):
        if origin is None or get_origin(arguments[-1]) is not tuple:
            return value
        return {key: as_tuples(each, arguments[-1]) for key, each in value.items()}
    if origin is tuple and isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return tuple(as_tuples(each, arguments[0]) for each in value)
    return value


def broken_rule(cls: type, field: str, value: Any) -> Broken | None:
    """The first rule in a field's annotation that a value does not keep; None where it keeps all.

    Args:
        cls: a dataclass.
        field: one of its fields.
        value: what the field is given.
    """
    hint = hints_of(cls)[field]
    if value is None and hint in (int, float):
        return Broken(field, "", value, value, "a number")
    if hint is bool and not isinstance(value, bool):
        return Broken(field, "", value, value, "true or false")
    choices = choices_of(hint)
    if (value is None and type(None) in get_args(hint)) or _is_one_of(value, choices):
        return None
    rules = _rules_of(cls)[field]
    if choices and not rules:
        expected = f"one of {', '.join(map(str, choices))}"
        return Broken(field, "", value, value, expected, choices)
    for rule in rules:
        for key, part in [("", value)] if rule.whole else _parts(value):
            if choices and isinstance(part, str):
                expected = f"{rule.words()}, or {' or '.join(map(repr, choices))}"
                return Broken(field, "", value, part, expected)
            if expected := rule.expected(part):
                place = f"{rule.of} {key!r}".strip() if key != "" else ""
                return Broken(field, place, value, part, expected)
    return None


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The literals that an annotation names."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for each in get_args(hint) for choice in choices_of(each))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    return any(value == choice and type(value) is type(choice) for choice in choices)


def _rules_of(cls: type) -> Mapping[str, Sequence[Rule]]:
    if cls not in _RULES:
        _RULES[cls] = {
            field: [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Rule)]
            for field, hint in get_type_hints(cls, include_extras=True).items()
        }
    return _RULES[cls]


_RULES: dict[type, Mapping[str, Sequence[Rule]]] = {}  # a search makes settings by the thousand


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a mapping or a sequence holds, with the mapping's keys; other values as they are."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from ((key, part) for _, part in _parts(each))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _parts(each)
    else:
        yield "", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
