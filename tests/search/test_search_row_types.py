"""Row types as choices of a search: their bytes, their labels, and points that keep their figures."""

from __future__ import annotations

import json

import pytest
import yaml

from embcomp.config.train_config import load_config
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import plan_config
from embcomp.search.api import search
from embcomp.search.config.search_config import parse_search
from embcomp.search.samplers.candidate_encoding import Encoding
from embcomp.search.space.recipes import config_of, point_yaml
from embcomp.serving.artefact_loading import load
from embcomp.training import Report, train
from embcomp.training.export.export import export_run
from tests.helpers.search_cases import prepare, search_document, write_recipe

pytestmark = pytest.mark.slow

TYPED = [
    {"method": "low_dim", "width": [4, 6], "row_type": ["fp32", "int8"]},
    {"method": "full", "row_type": ["fp16", "int4"]},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_types"))


def test_options_have_the_bytes_and_the_name_of_their_type(recipe):
    prepared = prepare(recipe, [300, 100], groups=[{"choices": TYPED}])
    sizes = {option.label: option.bytes for option in prepared.space.units[0].options}
    assert sizes == {
        "low_dim width=4 fp16": 300 * 8,  # as short as int8, and more exact
        "full int4": 300 * 8,
        "low_dim width=6 int8": 300 * 10,
        "full fp16": 300 * 16,
        "low_dim width=4": 300 * 16,
        "low_dim width=6": 300 * 24,
    }


def test_any_candidate_is_its_bytes_its_parameters_and_its_recipe(recipe, tmp_path):
    shared = {"method": "hash", "ratio": [0.1, 0.3], "collisionless": 0, "row_type": "int8"}
    prepared = prepare(
        recipe,
        [3000, 600, 80],
        groups=[{"choices": [*TYPED, shared]}],
        fixed={"C3": {"method": "full", "row_type": "int8"}},
    )
    encoding = Encoding(prepared.space)
    for proposal in [(0, 1, 0), (5, 3, 0), (2, 6, 0), (7, 0, 0)]:
        candidate = prepared.repair(proposal)
        assert encoding.decode(encoding.encode(candidate)) == candidate
        assert prepared.space.candidate_of(prepared.space.labels(candidate)) == candidate
        path = tmp_path / "point.yaml"
        path.write_text(point_yaml(config_of(prepared.space, candidate, "point"), "Found."))
        config = load_config(path)
        types = {name: config.tables.row_types.get(name) for name in ("C1", "C2", "C3")}
        default = config.tables.row_types.get("default", "fp32")
        assert (types["C3"] or default) == "int8"
        lines = plan_config(config, prepared.space.sizes).lines()
        cost = prepared.repair.costs.of(candidate).serve
        assert sum(line.serve for line in lines) == cost <= prepared.budget


def test_a_search_of_row_types_is_read_back_equal(recipe):
    config = parse_search(search_document(recipe, groups=[{"choices": TYPED}]))
    assert parse_search(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [{"choices": [{"method": "full", "row_type": ["int9"]}]}]}, "got 'int9'"),
        ({"groups": [{"choices": [{"method": "full", "row_type": []}]}]}, "the list is empty"),
        ({"fixed": {"C1": {"method": "full", "row_type": ["int8", "fp16"]}}}, "not a list"),
        ({"evaluator": {"name": "supernet", "method": "matryoshka"}}, "in fp32 rows; got"),
        ({"objectives": ["auc", "latency"]}, "latency is that of rows as they are trained"),
        (
            {"groups": [{"choices": ["full", {"method": "optembed", "row_type": "int8"}]}]},
            "optembed is trained in another form",
        ),
        (
            {
                "groups": [
                    {
                        "choices": [
                            {
                                "method": "unified",
                                "num_buckets": 50,
                                "collisionless": 0,
                                "row_type": ["fp32", "int8"],
                            }
                        ]
                    }
                ]
            },
            "unified stores rows of C1, C2 together, and they could differ",
        ),
    ],
)
def test_row_types_that_cannot_be_searched_are_refused(recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(recipe, [300, 600], **{"groups": [{"choices": TYPED}], **changes})


@pytest.mark.long
def test_a_found_point_trains_and_exports_to_the_bytes_and_the_figures_reported(recipe, tmp_path):
    choices = [{"method": "low_dim", "width": [6, 8], "row_type": "int8"}]
    config = parse_search(
        search_document(
            recipe,
            groups=[{"choices": choices}],
            budget="35%",
            trials={"count": 1, "devices": "cpu"},
            finals={"points": 1, "seeds": 1, "baseline": False},
        )
    )
    result = search(config, folder=tmp_path / "searches", quiet=True)
    (point,) = result.points
    (run,) = point.runs
    home = tmp_path / "searches" / "toy_search"
    trained = load_config(home / point.recipe, [f"seed={run.seed}"])
    assert trained.tables.row_types == {"default": "int8"}
    report = train(trained, runs=tmp_path, quiet=True)
    assert report.test["auc"] == run.test["auc"]
    found = export_run(tmp_path / trained.name, tmp_path / "a", tolerance=1)
    served = load(tmp_path / "a", verify=True)
    assert served.tables.footprint.serve_bytes == found.saved.config.tables.bytes
    assert found.saved.config.tables.bytes == point.serve_bytes == report.serve_bytes
    assert point.serve_bytes <= result.budget
    assert found.parity.served.rows == report.test["rows"] == 256
    assert found.parity.served.auc == pytest.approx(report.test["auc"], abs=1e-9)
    # The trial's score is of rounded rows as well; its log is of rows as they are trained.
    trial = home / "trials" / "trial-0000"
    scored = Report.load(trial).valid
    assert result.candidates[0].values["auc"] == scored["auc"]
    logged = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert scored["log_loss"] not in [line.get("log_loss") for line in logged]
