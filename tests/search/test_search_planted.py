"""Every searcher finds the widths that were planted in generated logs, and beats equal shares.

Pairs of fields interact through as many latents as their rank says, so how wide their tables need to
be is known. In a tenth of the bytes there is not enough for all of them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.search.api import search
from embcomp.search.config.search_config import parse_search
from embcomp.search.reporting.correlation import spearman
from embcomp.training import load_model, train
from embcomp.training.reporting.report import Report
from tests.helpers.long import long_but
from tests.helpers.search_cases import search_document, train_here

pytestmark = pytest.mark.slow

# C9 is left out, which has three values whatever the settings.
RANKS = (7, 5, 3, 2, 0, 1, 1)
PLANTED = {(f"C{2 * p + 1}", f"C{2 * p + 2}"): rank for p, rank in enumerate(RANKS) if rank}
LOG = SyntheticConfig(
    rows=30_000,
    scale=0.0,
    min_cardinality=16,
    exponent=0.0,
    ranks=RANKS,
    interaction=3.0,
    first_order=0.0,
    numeric=0.0,
    click_rate=0.5,
    seed=1,
)
RECIPE = """# Inner products of fields, which need as many columns as their interaction has ranks.
name: planted
data: {path: %s, batch_size: 512, eval_batch_size: 4096}
tables: {embedding_dim: 32, method: full, init: {name: normal, scale: 0.1}}
model: {name: dlrm, top_hidden_units: [16]}
train:
  epochs: 8
  device: cpu
  row_optimizer: {name: adam, mode: dense, learning_rate: 0.02}
  dense_optimizer: {learning_rate: 0.005}
"""
WIDTHS = [{"method": "low_dim", "width": [1, 2, 3, 4, 5, 6, 7, 8]}]
PAIRS = [{"tables": list(pair), "tied": True, "choices": WIDTHS} for pair in PLANTED]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    write_criteo_log(home / "raw.txt", LOG)
    command = ["prepare", "criteo", str(home / "raw.txt"), str(home / "data")]
    assert CliRunner().invoke(app, command).exit_code == 0
    info = DatasetInfo.load(home / "data")
    named = [name for pair in PLANTED for name in pair]
    own = [feature for feature in info.categorical if feature.name in named]
    info.model_copy(update={"categorical": own, "numeric": []}).save(home / "data")
    path = home / "recipe.yaml"
    path.write_text(RECIPE % (home / "data"))
    return path


@pytest.fixture(scope="module")
def retrained(recipe, tmp_path_factory):
    """Train widths in full, each choice once; gives the AUC on the test split."""
    folder = tmp_path_factory.mktemp("retrained")

    @functools.cache
    def score(widths: tuple[int, ...]) -> float:
        named = {table: w for pair, w in zip(PLANTED, widths) for table in pair}
        method = {"name": "low_dim", "widths": named}
        config = load_config(
            recipe, [f"tables.method={method}", f"name=w{'_'.join(map(str, widths))}"]
        )
        report = train(config, runs=folder, quiet=True)
        assert report.test is not None
        return report.test["auc"]

    return score


def document(recipe, **changes):
    return search_document(
        recipe,
        **{"budget": "10%", "groups": PAIRS, "fidelity": {}, "finals": {"points": 0}, **changes},
    )


def widths_of(candidate):
    return tuple(
        int(option.removeprefix("low_dim width=")) for option in candidate.options.values()
    )


def on_supernet(recipe, sampler):
    return parse_search(
        document(
            recipe,
            sampler={"name": sampler, "population": 12},
            seed=6,  # margins are thin, and one supernet's luck is that of its seed
            evaluator={"name": "supernet", "method": "matryoshka"},
            trials={"count": 200 if sampler in ("random", "cmaes") else 100, "devices": "cpu"},
        )
    )


@pytest.fixture(scope="module")
def shared(recipe, tmp_path_factory):
    """The search of the equal share alone, which trains the supernet that others share."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_here(monkeypatch)
        result = search(on_supernet(recipe, "uniform"), folder=folder, quiet=True)
    (uniform,) = result.candidates
    return folder / result.name, uniform


@pytest.mark.parametrize(
    "sampler", long_but(["greedy"], ["evolution", "tpe", "nsga2", "random", "greedy", "cmaes"])
)
def test_a_search_finds_the_planted_widths(recipe, shared, retrained, tmp_path, sampler):
    supernet, uniform = shared
    config = on_supernet(recipe, sampler)
    home = tmp_path / config.name
    home.mkdir()
    for part in ("data", "supernet"):
        (home / part).symlink_to(supernet / part)
    result = search(config, folder=tmp_path, quiet=True)
    best = max(result.candidates, key=lambda candidate: candidate.values["auc"])
    assert best.serve_bytes <= result.budget
    assert 0.98 * result.budget <= uniform.serve_bytes <= result.budget
    assert best.values["auc"] > uniform.values["auc"] + 0.01
    assert spearman(widths_of(best), list(PLANTED.values())) > 0.8
    assert retrained(widths_of(best)) > retrained(widths_of(uniform)) + 0.01


@pytest.mark.long
def test_gradients_find_the_planted_widths(recipe, shared, retrained, tmp_path, monkeypatch):
    """An inner product only has columns that both of its tables kept. The penalty makes them agree: a
    column that one of them closes has no gradient left in the other."""
    _, uniform = shared
    train_here(monkeypatch)
    choice = {"method": "dnis", "quantiles": [[]], "l1": [0.003], "search_epochs": [6]}
    groups = [{"tables": "all", "choices": [choice]}]
    finals = {"points": 1, "seeds": 1}  # a trial's tables are not kept
    sampler = {"name": "gradient"}
    config = parse_search(document(recipe, sampler=sampler, groups=groups, finals=finals))
    result = search(config, folder=tmp_path, quiet=True)
    (candidate,) = result.candidates
    assert candidate.state == "complete" and candidate.serve_bytes <= result.budget
    (run,) = (tmp_path / result.name / "finals").glob("*/report.json")
    assert Report.load(run.parent).test["auc"] > retrained(widths_of(uniform)) + 0.005
    tables = load_model(run.parent).tables
    kept = {name: method.widths[name][0] for name, method in tables.plan.methods.items()}
    widths = [sum(kept[table] for table in pair) for pair in PLANTED]
    assert spearman(widths, list(PLANTED.values())) > 0.8


def test_a_wrong_choice_would_fail(retrained):
    """The figures that searches are held against tell right from wrong."""
    right, wrong = (7, 5, 3, 2, 1, 1), (1, 1, 2, 3, 5, 7)
    assert spearman(wrong, list(PLANTED.values())) < -0.8
    assert retrained(wrong) < retrained((4, 3, 3, 3, 3, 3)) - 0.01 < retrained(right) - 0.02
