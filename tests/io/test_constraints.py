"""Constraints that annotations declare: what they refuse, in which words, from Python and from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic_core import PydanticCustomError

from embcomp.backends import BACKENDS
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Constrained, Count, Ge, Le, Positive
from embcomp.io.yaml_reading import bind_dataclass
from embcomp.models import MODELS


@dataclass(frozen=True, kw_only=True)
class Settings(Constrained):
    """One field for each kind of rule."""

    rows: Annotated[int | None, Ge(1), Le(1000)] = None
    least: Annotated[float, Ge(0)] = 0.0
    rate: Annotated[float, Positive()] = 0.1
    share: Annotated[float, Between(0, 1, "(]")] = 1.0
    decay: Annotated[float, Between(0, 1, "[)")] = 0.0
    width: Annotated[int | Literal["auto"], Ge(1)] = "auto"
    by_table: Annotated[Mapping[str, int], Count(1, of="table")] = field(default_factory=dict)
    chunks: Annotated[Mapping[str, int], Ge(1)] = field(default_factory=dict)
    grid: Annotated[int | tuple[int, ...], Le(8)] = 1
    order: Literal["up", "down"] = "up"
    norm: Literal[1, 2] = 1
    flag: bool = True
    groups: tuple[tuple[str, ...], ...] = ()
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    title: ClassVar[str] = "settings"

    @classmethod
    def owner(cls) -> str:
        return f"{cls.title}: "


REFUSED = [
    ({"rows": 0}, "rows must be at least 1, got 0"),
    ({"rows": 1001}, "rows must be at most 1,000, got 1001"),
    ({"least": -0.5}, "least must be at least 0, got -0.5"),
    ({"rate": 0.0}, "rate must be positive, got 0.0"),
    ({"share": 0.0}, "share must be in (0, 1], got 0.0"),
    ({"decay": 1.0}, "decay must be in [0, 1), got 1.0"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"width": "half"}, "width must be at least 1, or 'auto', got 'half'"),
    ({"by_table": {"C1": 1, "C2": 0}}, "by_table of table 'C2' must be an integer of at least 1"),
    ({"chunks": {"C1": 0}}, "chunks of 'C1' must be at least 1, got 0"),
    ({"grid": [1, 9]}, "grid must be at most 8, got 9"),
    ({"order": "sideways"}, "order must be one of up, down, got 'sideways'"),
    ({"norm": 3}, "norm must be one of 1, 2, got 3"),
    ({"flag": "no"}, "flag must be true or false, got 'no'"),
    ({"flag": 1}, "flag must be true or false, got 1"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED)
def test_a_mistake_has_one_text_from_python_and_from_yaml(given, text):
    with pytest.raises(ConfigError) as from_python:
        Settings(**given)
    assert str(from_python.value).startswith(f"settings: {text}")
    with pytest.raises(PydanticCustomError) as from_yaml:
        bind_dataclass(Settings, given)
    assert str(from_yaml.value) == str(from_python.value)


@pytest.mark.parametrize(
    "given",
    [
        {"rows": 1, "share": 1.0, "decay": 0.0, "width": 1, "order": "down", "norm": 2},
        {"rows": None, "width": "auto", "chunks": {"C1": 1}, "grid": (8,), "by_table": {"C1": 1}},
    ],
)
def test_what_lies_on_the_edge_is_taken(given):
    made = Settings(**given)
    assert {key: getattr(made, key) for key in given} == given


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rows": True}, "rows=True: expected a number"),
        ({"least": float("inf")}, "least=inf: expected a finite number"),
        ({"share": float("nan")}, r"share must be in \(0, 1\], got nan"),
        ({"by_table": {"C1": 2.5}}, "an integer of at least 1, got 2.5"),
        ({"least": None}, "least must be a number, got None"),
        ({"norm": True}, "norm must be one of 1, 2, got True"),
    ],
)
def test_what_looks_like_a_number_is_refused_from_python(given, text):
    with pytest.raises(ConfigError, match=text):
        Settings(**given)


def test_lists_become_tuples_however_settings_are_made():
    given = {"grid": [1, 2], "groups": [["a", "b"], ["c"]], "cuts": {"C1": [3, 5]}}
    for made in (Settings(**given), bind_dataclass(Settings, given)):
        assert made.grid == (1, 2)
        assert made.groups == (("a", "b"), ("c",))
        assert made.cuts == {"C1": (3, 5)}


@pytest.mark.parametrize("cls", [*BACKENDS.values(), *MODELS.values()])
def test_every_method_and_model_checks_by_its_annotations(cls):
    assert issubclass(cls, Constrained)
    assert cls() == bind_dataclass(cls, {})
