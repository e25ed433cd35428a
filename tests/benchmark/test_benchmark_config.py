"""The YAML of a benchmark: what it takes, and what it says of what it does not."""

from __future__ import annotations

import pytest

from embcomp.benchmark.benchmark_config import is_benchmark, parse_benchmark
from embcomp.errors import ConfigError
from embcomp.search.config.search_config import is_search
from tests.helpers.benchmark_cases import benchmark_document


def test_full_tables_are_in_every_benchmark():
    config = parse_benchmark(benchmark_document("r"))
    assert [each.name for each in config.methods] == ["full", "hash", "unified"]
    named = parse_benchmark(benchmark_document("r", methods=["hash", "full"]))
    assert [each.name for each in named.methods] == ["hash", "full"]


def test_lists_are_tuned_and_values_fixed():
    unified = parse_benchmark(
        benchmark_document(
            "r", methods=[{"method": "unified", "num_chunks": [1, 2], "seed": 3, "label": "U"}]
        )
    ).methods[1]
    assert unified.name == "U"
    assert unified.tuned == {"num_chunks": (1, 2)} and unified.fixed == {"seed": 3}


def test_what_is_written_is_read_again():
    config = parse_benchmark(
        benchmark_document(
            "r",
            methods=[
                "hash",
                {"method": "pq", "label": "k-means", "overrides": {"train": {"epochs": 2}}},
            ],
            models=["deepfm"],
        )
    )
    assert parse_benchmark(config.model_dump(mode="json")) == config


def test_seeds_of_final_runs_tuned_nothing():
    config = parse_benchmark(benchmark_document("r", seed=7, seeds=3))
    assert config.final_seeds == (8, 9, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "methods: expected at least 1 item"),
        ({"methods": ["hahs"]}, "did you mean 'hash'"),
        ({"methods": [{"method": "unified", "chunk": 2}]}, "unknown key 'chunk'"),
        ({"methods": ["hash", "hash"]}, "give one of them a label"),
        ({"methods": [{"method": "hash", "row_type": "int8"}]}, "embcomp export --dtype"),
        ({"budgets": ["10%", "10%"]}, "'10%' is there twice"),
        ({"budgets": ["0%"]}, "positive number of bytes"),
        ({"budget_of": "whole"}, "budget_of"),
        ({"seeds": 0}, "seeds"),
        ({"quality": "gauc"}, "quality"),
        ({"tuning": {"trials": 2, "rounds": 3}}, "rounds 3 is above trials 2"),
        ({"tuning": {"row_learning_rate": [0.1, 0.01]}}, "low below high"),
        ({"tuning": {"row_learning_rate": [0.1]}}, "row_learning_rate"),
        ({"fidelity": {"max_steps": 9, "rungs": {"min_steps": 3}}}, "all get the same"),
        ({"resamples": 3}, "resamples"),
        ({"processes": {"count": 3}}, "unknown key 'count'"),
        ({"method": "hash"}, "unknown key 'method'"),
    ],
)
def test_mistakes_are_named_with_their_key(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse_benchmark(benchmark_document("r", **changes))
    text = str(caught.value)
    assert message in text and "pydantic" not in text.lower()
    assert next(iter(changes)) in text


def test_a_benchmark_is_no_search(tmp_path):
    path = tmp_path / "b.yaml"
    path.write_text("recipe: r\nmethods: [hash]\n")
    assert is_benchmark(path) and not is_search(path)
    path.write_text("recipe: r\ngroups: []\n")
    assert is_search(path) and not is_benchmark(path)
