"""Evaluators without training per candidate, evolution, and `dnis` as a search."""

from __future__ import annotations

import pytest

from embcomp.errors import ConfigError
from embcomp.search.api import search
from embcomp.search.config import parse_search
from tests.search_cases import search_document, write_recipe

SUPERNET = {"name": "supernet", "method": "matryoshka"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("supernet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluator": "supernet"}, "needs a method"),
        ({"evaluator": {**SUPERNET, "settings": {"width_grid": 2}}}, "leave them out"),
        ({"evaluator": SUPERNET, "objectives": ["auc", "latency"]}, "knows no latency"),
        ({"sampler": {"name": "gradient"}}, "give it one group"),
        ({"sampler": {"name": "evolution"}, "objectives": ["auc", "bytes"]}, "takes one objective"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_search(search_document(recipe, **changes))


def test_a_supernet_refuses_what_is_not_a_width(recipe, tmp_path):
    groups = [{"choices": [{"method": "hash", "ratio": [0.1, 0.2], "collisionless": 0}]}]
    config = parse_search(search_document(recipe, evaluator=SUPERNET, groups=groups))
    with pytest.raises(ConfigError, match="every choice must be full or low_dim"):
        search(config, folder=tmp_path, quiet=True)


def test_a_supernet_scores_candidates_after_one_training(recipe, tmp_path):
    groups = [{"choices": [{"method": "low_dim", "width": list(range(1, 9))}]}]
    document = search_document(
        recipe,
        evaluator=SUPERNET,
        sampler={"name": "evolution", "population": 4},
        groups=groups,
        trials={"count": 8, "devices": "cpu"},
        finals={"points": 0},
        fill=False,
    )
    result = search(parse_search(document), folder=tmp_path, quiet=True)
    assert len(result.candidates) == 8
    assert all(one.state == "complete" and not one.steps for one in result.candidates)
    assert all(one.serve_bytes <= result.budget for one in result.candidates)
    assert result.cost.trainings == 0 and result.cost.prepared_trainings > 0
    assert len({tuple(one.options.values()) for one in result.candidates}) == 8
    again = search(parse_search(document), folder=tmp_path, quiet=True)
    assert again == result
