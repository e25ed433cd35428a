"""Conditions on a raw label column, as a schema writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl
from typing_extensions import Self

Rule = str | tuple[str | bool | int | float, ...]
"""`"> 3"`, `"== bought"`, or the values themselves: `[bought, kept]`."""
_NUMBER = re.compile(r"\s*(<=|>=|==|!=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")
_WORD = re.compile(r"\s*(==|!=)\s*(\S.*?)\s*", re.DOTALL)
_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A comparison with a number, or with words of which one has to be met (`!=`: none)."""

    operator: str
    number: float = 0.0
    words: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()

    @classmethod
    def parse(cls, rule: Rule) -> Self:
        """Read a rule; a ValueError says what is wrong with it."""
        if not isinstance(rule, str):
            if not rule:
                raise ValueError("an empty list is met by no row")
            numbers = [float(v) for v in rule if not isinstance(v, str)]
            numbers += [_TRUTH[v.lower()] for v in rule if isinstance(v, str) and _is_truth(v)]
            words = tuple(v for v in rule if isinstance(v, str) and not _is_truth(v))
            return cls(operator="in", words=words, numbers=tuple(numbers))
        if match := _NUMBER.fullmatch(rule):
            return cls(operator=match.group(1), number=float(match.group(2)))
        match = _WORD.fullmatch(rule)
        if match is None:
            raise ValueError(f"{rule!r} is not a condition such as '> 3', '== 1' or '== bought'")
        operator, word = match.groups()
        if _is_truth(word):
            return cls(operator=operator, number=_TRUTH[word.lower()])
        return cls(operator=operator, words=(word,))

    def holds(self, text: pl.Expr, number: pl.Expr) -> pl.Expr:
        """Return whether rows meet the condition, null where the value is missing."""
        if self.operator == "in":
            return text.is_in(self.words) | number.is_in(self.numbers).fill_null(False)
        if self.words:
            return text == self.words[0] if self.operator == "==" else text != self.words[0]
        return {
            "<": number < self.number,
            "<=": number <= self.number,
            ">": number > self.number,
            ">=": number >= self.number,
            "==": number == self.number,
            "!=": number != self.number,
        }[self.operator]


def _is_truth(word: str) -> bool:
    return word.lower() in _TRUTH
