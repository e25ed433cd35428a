"""Reading YAML mappings and binding them to pydantic models and dataclasses, with errors that help.

Each error names the key by its path, says what is wrong with it, and lists the keys that are valid.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from embcomp.errors import ConfigError, one_line
from embcomp.io.constraints import Constrained, broken_rule, choices_of
from embcomp.io.numeric_settings import hints_of, why_no_number
from embcomp.io.yaml_documents import MOST_LEVELS, UnreadableYamlError, parse_yaml

_LONGEST_LINE = 1000


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; repeated keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {one_line(error)}") from None
    try:
        document = parse_yaml(text)
    except UnreadableYamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(document).__name__}")
    return document


def describe_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: the key's path, what is wrong, and which keys are valid."""
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"] if part != "function-before"]
        if item["type"] == "extra_forbidden":
            where, valid = ".".join(path[:-1]), _valid_keys(model, item["loc"][:-1])
            hint = did_you_mean(path[-1], valid)
            text = f"unknown key {path[-1]!r}{hint}; the keys are {listed(valid)}"
        elif item["type"] == "missing" and isinstance(item["loc"][-1], int):
            count, got = item["loc"][-1], _shown(item["input"])
            where, text = ".".join(path[:-1]), f"expected more than {count} values, got {got}"
        elif item["type"] == "missing":
            where, text = ".".join(path[:-1]), f"the key {path[-1]!r} is missing"
        elif item["type"] in ("embcomp", "value_error"):
            where, text = ".".join(path), _plain(item)
        else:
            where, text = ".".join(path), f"{_plain(item)}, got {_shown(item['input'])}"
        lines.append(_shortened(f"{where}: {text}" if where else text, _LONGEST_LINE))
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])


def _plain(item: ErrorDetails) -> str:
    """What pydantic says, in the words of YAML where it speaks of Python's types."""
    if item["type"] == "too_short":
        return f"expected at least {item['ctx']['min_length']} item(s)"
    if item["type"] == "tuple_type":
        return "expected a list"
    return item["msg"].removeprefix("Value error, ")


def apply_override(document: dict[str, Any], override: str) -> None:
    """Put one `key.path=value` into a document; the value is parsed as YAML."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        value = parse_yaml(text)
    except UnreadableYamlError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node = document
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = {}
        elif isinstance(child, str):  # the short form of {name: ...}
            child = {"name": child}
        elif not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: depth + 1])} has no keys")
        node[part] = child
        node = child
    node[parts[-1]] = value


def bind_dataclass(cls: type, options: dict[str, Any]) -> Any:
    """An instance of the dataclass, its types coerced (a YAML list to a tuple) and checked."""
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in options:
        if key not in fields:
            takes = f"{cls.__name__} takes {listed(fields)}" if fields else "it takes no other key"
            raise config_error(f"unknown key {key!r}{did_you_mean(str(key), fields)}; {takes}")
    hints = hints_of(cls)
    for key, value in options.items():  # before pydantic makes 1 of True
        if not isinstance(value, str) and (problem := why_no_number(key, value, hints[key])):
            raise config_error(f"{key}: {problem.partition(': ')[2]}")
        ours = hints[key] is bool or choices_of(hints[key])  # in our words, not pydantic's
        if issubclass(cls, Constrained) and ours:
            broken = broken_rule(cls, key, value)
            if broken is not None:
                raise config_error(cls.refusal(broken))
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            message = _plain(item)
            got = (
                ""
                if item["type"] in ("value_error", "missing")
                else f", got {_shown(item['input'])}"
            )
            problems.append(f"{where}: {message}{got}" if where else f"{message}{got}")
        raise config_error("; ".join(problems)) from None
    except (
        ValueError
    ) as error:  # raised by __post_init__ under TypeAdapter of some pydantic versions
        raise config_error(str(error)) from None


def _valid_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that a path of keys leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # a key of a dict of sections
        for candidate in _sections_in(field.annotation):
            model = candidate
            break
    return list(model.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = []
    for argument in getattr(annotation, "__args__", ()):
        found += _sections_in(argument)
    return found


def plain(value: Any, _level: int = 0) -> Any:
    """Mappings to dicts and sequences to lists, all the way down, so that YAML can hold them."""
    if _level > MOST_LEVELS:
        raise ConfigError(
            f"a config nested more than {MOST_LEVELS} levels deep, or one that holds itself"
        )
    if isinstance(value, Mapping):
        return {key: plain(item, _level + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, _level + 1) for item in value]
    return value


def config_error(text: str) -> PydanticCustomError:
    """An error of ours inside a pydantic validator, its text kept word for word."""
    # Braces would be read as placeholders of pydantic's message template.
    return PydanticCustomError("embcomp", "{text}", {"text": text})


def _shown(value: Any) -> str:
    """A value as an error shows it: in one line that is not too long."""
    return _shortened(repr(value), 200)


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """What was likely meant, in brackets after a blank; empty where nothing is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(words: Iterable[str]) -> str:
    """Words for a sentence, with commas."""
    return ", ".join(words)
