"""Whatever stands in a config: it is read, or refused in one line that names the place."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st

from embcomp.backends import BACKENDS, DNIS, Hash, LowDim, OptEmbed, Unified
from embcomp.config.train_config import load_config, parse_config
from embcomp.errors import ConfigError, EmbcompError
from embcomp.io.yaml_reading import read_yaml
from embcomp.models import MODELS
from embcomp.models.autoint import AutoIntConfig
from embcomp.models.dcnv2 import DCNv2Config
from embcomp.models.deepfm import DeepFMConfig
from embcomp.planning.config_plan import TableSize, plan_config
from embcomp.search.config.search_config import load_search, parse_search
from embcomp.tables.budget import parse_budget

CONFIGS = Path(__file__).parents[2] / "configs"
DOCUMENTS = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
TRAININGS = sorted(name for name, document in DOCUMENTS.items() if "model" in document)
SEARCHES = sorted(set(DOCUMENTS) - set(TRAININGS))
TABLES = [
    TableSize(name=name, num_embeddings=rows, mean_length=length)
    for name, rows, length in (("C1", 1000, 1.0), ("C2", 5, 1.0), ("C3", 60, 2.5))
]

HOSTILE: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(True, False, None, 0, -1, 1, 2**31, 2**63 - 1, 2**64, -(2**63), 10**100),
        *(0.0, -0.5, 1.0, 1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
        *("", " ", "\x00", "a\nb", "{{ x }}", "1000%", "0%", "-3%", "1e999", "9" * 99, "١٢"),
        *([], {}, [[]], [5, -3], [1.0, 1.0], [True, True], [None], {"a": 1}, {1: 2}, {"name": []}),
        *(
            {"name": "full", "name ": 1},
            [{}],
            ["x"] * 99,
            datetime.date(2026, 1, 1),
            b"x",
            {1, 2},
        ),
    ]
)


def places(document: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a document."""
    found = [path] if path else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += places(value, (*path, index))
    return found


def resolved(name: str) -> dict:
    """A recipe with all its defaults, so that each of them can be replaced."""
    return parse_config(DOCUMENTS[name]).model_dump(mode="json")


RESOLVED = {name: resolved(name) for name in TRAININGS}
PLACES = {name: places(document) for name, document in {**DOCUMENTS, **RESOLVED}.items()}


def replaced(document: dict, path: tuple, value: Any) -> dict:
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def check_refusal(error: EmbcompError) -> None:
    text = str(error)
    assert len(text) < 9000
    assert not any(ord(character) < 32 for character in text if character != "\n")
    head, *rest = text.split("\n")  # several problems are a line each
    assert not rest or " problems" in head


@given(data=st.data(), name=st.sampled_from(TRAININGS), value=HOSTILE)
@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_a_hostile_value_in_a_recipe_is_read_or_refused_in_one_line(data, name, value):
    path = data.draw(st.sampled_from(PLACES[name]))
    try:
        config = parse_config(replaced(RESOLVED[name], path, value), source="x.yaml")
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        plan_config(config, TABLES)
    except EmbcompError as error:
        check_refusal(error)


@given(data=st.data(), name=st.sampled_from(SEARCHES), value=HOSTILE)
@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_a_hostile_value_in_a_search_is_read_or_refused_in_one_line(data, name, value):
    path = data.draw(st.sampled_from(PLACES[name]))
    try:
        parse_search(replaced(DOCUMENTS[name], path, value), source="x.yaml")
    except EmbcompError as error:
        check_refusal(error)


@given(data=st.data(), registry=st.sampled_from([BACKENDS, MODELS]), value=HOSTILE)
@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_a_hostile_number_from_python_is_taken_or_refused_in_one_line(data, registry, value):
    cls = registry[data.draw(st.sampled_from(sorted(registry)))]
    hints = get_type_hints(cls)
    numbers = [key for key in cls.__annotations__ if hints[key] in NUMBERS]
    if not numbers or not isinstance(value, int | float | str | None):
        return
    try:
        cls(**{data.draw(st.sampled_from(numbers)): value})
    except EmbcompError as error:
        check_refusal(error)


NUMBERS = (int, float, int | None, float | None)

NONSENSE = (
    ("model.attention_layers=100000000", "attention_layers"),
    ("model.attention_dim=100000000", "attention_dim"),
    ("model.dnn_hidden_units=[100000000]", "dnn_hidden_units"),
    ("train.dense_optimizer.betas=[5, -3]", "train.dense_optimizer.betas"),
    ("train.dense_optimizer.betas=[0.9]", "betas: expected more than 1 values, got [0.9]"),
    ("train.dense_optimizer.betas=[0.9, 1.0]", "train.dense_optimizer.betas"),
    ("train.row_optimizer={name: adam, mode: dense, betas: [1.0, 0.9]}", "train.row_optimizer"),
    ("train.dense_optimizer={name: sgd, momentum: 50}", "train.dense_optimizer.momentum"),
    ("train.dense_optimizer.eps=1e30", "train.dense_optimizer.eps"),
    ("train.dense_optimizer.weight_decay=1e30", "train.dense_optimizer.weight_decay"),
    ("seed=true", "seed"),
    ("seed=9223372036854775807", "seed"),
    ("data.batch_size=true", "data.batch_size"),
    ("data.batch_size=9223372036854775807", "data.batch_size"),
    ("data.search_share=true", "data.search_share"),
    ("train.epochs=1000000000000", "train.epochs"),
    ("train.max_steps=100000000000000000000", "train.max_steps"),
    ("tables.embedding_dim=100000000", "tables.embedding_dim"),
    ("tables.budget=1000%", "tables.budget"),
    ("tables.budget=1e9TiB", "tables.budget"),
    ("tables.budget=100000000TiB", "tables.budget"),
    ("tables.method={name: hash, ratio: true}", "ratio"),
    ("tables.method={name: hash, ratio: 0.5, seed: -1}", "seed"),
    ("tables.method={name: hash, ratio: 0.5, seed: 9223372036854775807}", "seed"),
    ("tables.method={name: unified, num_chunks: 100000000}", "num_chunks"),
    ("tables.method={name: unified, chunks: {C1: 100000000}}", "chunks"),
    ("tables.method={name: optembed, generations: 100000000}", "generations"),
    ("tables.method={name: optembed, alpha: .inf}", "alpha"),
    ("tables.method={name: low_dim, width: 100000000}", "width"),
    ('name="a\\tb"', "control character"),
    ('name="a\\u0085b"', "control character"),
    ('name="' + "a" * 300 + '"', "at most"),
    ('name=" a"', "spaces"),
)


@pytest.mark.parametrize(("override", "place"), NONSENSE)
def test_nonsense_is_refused_in_yaml_with_its_key(override, place):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "criteo_autoint_full.yaml", [override])
    assert place in str(error.value)
    check_refusal(error.value)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: AutoIntConfig(attention_layers=10**8), "attention_layers"),
        (lambda: AutoIntConfig(attention_dim=True), "attention_dim"),
        (lambda: DCNv2Config(num_cross_layers=10**8), "num_cross_layers"),
        (lambda: DeepFMConfig(hidden_units=(10**8,)), "hidden_units"),
        (lambda: DeepFMConfig(hidden_units=(8,) * 10**5), "hidden_units"),
        (lambda: DeepFMConfig(dropout=float("nan")), "dropout"),
        (lambda: Hash(ratio=0.5, seed=True), "seed"),
        (lambda: Hash(ratio=0.5, seed=2**63 - 1), "seed"),
        (lambda: Hash(ratio=float("nan")), "ratio"),
        (lambda: Hash(num_buckets=10**30), "num_buckets"),
        (lambda: Hash(num_buckets="many"), "num_buckets"),  # type: ignore[arg-type]
        (lambda: Hash(num_buckets=1.5), "num_buckets"),  # type: ignore[arg-type]
        (lambda: Unified(num_chunks=10**8), "num_chunks"),
        (lambda: Unified(budget="1000%"), "100%"),
        (lambda: LowDim(widths={"a": 10**8}), "widths"),
        (lambda: DNIS(learning_rate=float("inf")), "learning_rate"),
        (lambda: OptEmbed(population=10**9), "population"),
        (lambda: parse_budget(2**62), "bytes"),
    ],
)
def test_nonsense_is_refused_from_python_alike(make, place):
    with pytest.raises(ConfigError, match=place) as error:
        make()
    assert "\n" not in str(error.value)


UNREADABLE = {
    "an unfilled template": ("name: x\ndata: {path: {{DATA}}}\n", "line 2, column 15.*placeholder"),
    "a template as value": ("name: {{ NAME }}\n", "line 1, column 8.*placeholder"),
    "a list as key": ("name: x\n? [a, b]\n: 1\n", "line 2, column 3.*list"),
    "an alias to itself": ("name: x\ndata: &a {path: *a}\n", "line 2, column 7.*alias"),
    "a list in itself": ("a: &a [1, *a]\n", "line 1, column 4.*alias"),
    "deep nesting": ("a: " + "[" * 3000, "line 1, column .*levels deep"),
    "deep blocks": ("".join(" " * n + f"k{n}:\n" for n in range(90)), "line 5[01], .*levels deep"),
    "an explosion": (
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "line .*values",
    ),
    "no date": ("name: 2026-13-45\n", "line 1, column 7.*timestamp"),
    "no integer": ("name: !!int abc\n", "line 1, column 7.*int"),
    "no truth": ("name: !!bool perhaps\n", "line 1, column 7.*bool"),
    "a Python object": ("name: !!python/object/apply:os.system [x]\n", "line 1, column 7"),
    "a NUL": ("name: a\0b\n", "unacceptable character"),
    "an endless number": ("seed: " + "9" * 5000 + "\n", "line 1, column 7"),
    "a tab": ("name: x\n\tdata: 1\n", "line 2, column 1"),
    "a torn bracket": ("name: [a\n", "line 2, column 1"),
}


@pytest.mark.parametrize("load", [load_config, load_search, read_yaml])
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_yaml_is_one_line_that_names_file_and_place(tmp_path, load, case):
    text, message = UNREADABLE[case]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml: not valid YAML: .*{message}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_mapping_that_holds_itself_is_refused_from_python():
    document: dict[str, Any] = {"name": "x"}
    document["data"] = document
    with pytest.raises(ConfigError, match="holds itself"):
        parse_config(document)


@given(text=st.text(alphabet="ab:{}[]&*!?-,'\"\n \t|>%@#01.", max_size=60))
@example("&a : *a")
@example("? ? ?")
@example("!!set {a, b}")
@example("<<: [1]")
@example("<<: {a: 1}")
@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_any_text_is_read_or_refused_in_one_line(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    try:
        read_yaml(path)
    except ConfigError as error:
        assert "\n" not in str(error)
