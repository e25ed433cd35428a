"""YAML text to plain values, or one line that says what is wrong with it and where.

PyYAML keeps the last of two equal keys, follows aliases into themselves, and lets the exceptions of
Python's own types through; none of that may reach who wrote the file.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MOST_LEVELS = 50
"""How deep a document may be nested; ours need about 6."""
MOST_VALUES = 100_000
"""How many values a document may hold once aliases are followed."""


class UnreadableYamlError(ValueError):
    """Text that is no document of ours; its message names line and column."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        UnreadableYamlError: On text that is not YAML, or that no document of ours can mean.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise UnreadableYamlError(_one_line(f"{where}{what}")) from None
    except yaml.YAMLError as error:
        raise UnreadableYamlError(_one_line(str(error))) from None
    except RecursionError:
        raise UnreadableYamlError(f"nested more than {MOST_LEVELS} levels deep") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what it cannot stand for, with the place."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _refused(
                f"nested more than {MOST_LEVELS} levels deep", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            OverflowError,
        ) as error:
            shown = node.value if isinstance(node.value, str) else "this"
            raise _refused(
                f"{shown[:60]!r} is not a {node.tag.rpartition(':')[2]} ({error})", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                kind = "mapping" if isinstance(key_node, yaml.MappingNode) else "list"
                raise _refused(
                    f"a {kind} stands where a key or a value is expected; a placeholder such as "
                    "{{ NAME }} must be filled in, or quoted",
                    key_node.start_mark,
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refused("a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise _refused(f"the key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refused(problem: str, mark: yaml.Mark) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _count(node: yaml.Node, known: dict[int, int], open_: set[int]) -> int:
    """Values below a node, aliases followed; refuses those that lead back to themselves."""
    if id(node) in open_:
        raise _refused("an alias (*name) refers to what it is a part of", node.start_mark)
    if id(node) in known or isinstance(node, yaml.ScalarNode):
        return known.get(id(node), 1)
    open_.add(id(node))
    total = 1
    for item in node.value:
        for child in item if isinstance(item, tuple) else (item,):
            total += _count(child, known, open_)
    open_.remove(id(node))
    known[id(node)] = total
    if total > MOST_VALUES:
        raise _refused(f"more than {MOST_VALUES:,} values, aliases followed", node.start_mark)
    return total
