"""Evaluators without training per candidate, evolution, and `dnis` as a search."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest
import torch
import yaml
from scipy.stats import rankdata, spearmanr
from torch import nn
from torchrec import KeyedJaggedTensor
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.errors import ConfigError
from embcomp.search.api import search
from embcomp.search.config.search_config import parse_search
from embcomp.search.reporting.correlation import choose_spread, mean_ranks, spearman
from embcomp.search.reporting.results import SearchResult
from embcomp.training.distributed.process import Process
from embcomp.training.reporting.report import Report
from embcomp.training.stages import search_stage
from embcomp.training.stages.batch_norm import refit, running_norms
from tests.helpers.search_cases import search_document, train_here, write_recipe

pytestmark = pytest.mark.slow

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
        ({"finals": {"correlation": 7}, "evaluator": SUPERNET}, "take at least 8, or 0"),
        ({"finals": {"correlation": 8}}, "take evaluator supernet"),
        ({"finals": {"correlation": 8}, "evaluator": SUPERNET}, "is above trials.count 3"),
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


@pytest.mark.long
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
    supernet = json.loads((tmp_path / result.name / "supernet" / "report.json").read_text())
    assert len(supernet["stages"]) > 1  # its time is that of all of them, not of the last one
    assert result.cost.prepared_hours == supernet["train_seconds"] / 3600 > 0
    assert len({tuple(one.options.values()) for one in result.candidates}) == 8
    again = search(parse_search(document), folder=tmp_path, quiet=True)
    assert again == result


@pytest.mark.long
def test_batch_norms_are_fitted_to_each_candidate(recipe, tmp_path, monkeypatch):
    train_here(monkeypatch)
    document = search_document(
        recipe,
        evaluator={**SUPERNET, "rows": 64},
        overrides={"model": {"batch_norm": True}, "data": {"eval_batch_size": 64}},
        finals={"points": 0},
        fill=False,
    )
    found = []
    for fitted in (True, False):
        with monkeypatch.context() as patch:
            if not fitted:
                patch.setattr(search_stage, "running_norms", lambda model: [])
            result = search(parse_search(document), folder=tmp_path / str(fitted), quiet=True)
            found.append([one.values["auc"] for one in result.candidates])
    assert len(found[0]) == 3 and found[0] != found[1]


def test_refitted_norms_hold_the_mean_of_the_batches_and_nothing_else_changes():
    torch.manual_seed(0)
    task = Normed()
    task(a_batch(torch.randn(8, 2)))  # what training left
    batches = [a_batch(torch.randn(rows, 2) + rows) for rows in (4, 4, 1)]
    refit(task, running_norms(task), batches, Process(0, 1, torch.device("cpu")))
    wanted = torch.stack([batch.dense.mean(dim=0) for batch in batches[:2]]).mean(dim=0)
    torch.testing.assert_close(task.norm.running_mean, wanted)
    assert task.norm.momentum == 0.1 and not task.norm.training
    assert task.others_trained == [True, False, False]


class Normed(nn.Module):
    """A batch norm on the numeric columns; notes whether the rest was in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.others_trained: list[bool] = []

    def forward(self, batch):
        self.others_trained.append(self.training)
        return self.norm(batch.dense)


def a_batch(dense):
    sparse = KeyedJaggedTensor(keys=[], values=torch.empty(0), lengths=torch.empty(0))
    return Batch(dense=dense, sparse=sparse, labels=torch.zeros(len(dense)))


def test_ranks_share_the_mean_of_ties_and_agree_with_scipy():
    draw = np.random.default_rng(0)
    for _ in range(20):
        one, other = draw.integers(0, 5, size=(2, 12)).tolist()
        assert mean_ranks(one).tolist() == rankdata(one).tolist()
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert spearman([1, 2, 3], [2, 2, 2]) is None


def scored(scores):
    """A study's candidates with these scores, as `choose_spread` reads them."""
    trials = {
        (number,): optuna.trial.create_trial(
            values=[score], user_attrs={"kind": "random", "serve_bytes": 8}
        )
        for number, score in enumerate(scores)
    }
    for number, trial in enumerate(trials.values()):
        trial.number = number
    return trials


@pytest.mark.parametrize("metric", ["auc", "log_loss"])
def test_candidates_to_rank_are_spread_over_all_scores(recipe, monkeypatch, metric):
    config = parse_search(
        search_document(
            recipe,
            evaluator=SUPERNET,
            objectives=[metric],
            trials={"count": 40},
            finals={"correlation": 8},
        )
    )
    # A search that settled: two bad beginnings, a few on the way, then many that are all alike.
    sign = 1 if metric == "auc" else -1
    scores = [0.1, 0.2, 0.35, 0.5, 0.62, *(0.7 + i / 1000 for i in range(30))]
    monkeypatch.setattr(
        "embcomp.search.reporting.correlation.completed",
        lambda *_: scored([sign * s for s in scores]),
    )
    chosen = choose_spread(config, None, None)
    assert [point.number for point in chosen[:1]] == [34]
    assert [point.number for point in chosen[-5:]] == [4, 3, 2, 1, 0]
    assert len({point.number for point in chosen}) == 8
    assert {point.seeds for point in chosen} == {(config.seed + 1,)}
    assert choose_spread(config, None, None) == chosen
    monkeypatch.setattr(
        "embcomp.search.reporting.correlation.completed", lambda *_: scored(range(7))
    )
    assert choose_spread(config, None, None) == []


@pytest.fixture(scope="module")
def ranked(recipe, tmp_path_factory):
    """A search on a supernet that retrains eight candidates, some of which are finals as well."""
    folder = tmp_path_factory.mktemp("ranked")
    path = folder / "search.yaml"
    document = search_document(
        recipe,
        evaluator=SUPERNET,
        sampler={"name": "evolution", "population": 4},
        groups=[{"choices": [{"method": "low_dim", "width": list(range(1, 9))}]}],
        overrides={"train": {"max_steps": 2}},
        trials={"count": 10, "devices": "cpu"},
        fidelity={"max_steps": 6},
        finals={"points": 1, "seeds": 1, "correlation": 8},
        fill=False,
    )
    path.write_text(yaml.safe_dump(document))
    with pytest.MonkeyPatch.context() as monkeypatch:
        started = train_here(monkeypatch)
        return path, folder / "all" / "toy_search", search_command(path, folder), started


def search_command(path, folder):
    result = CliRunner().invoke(app, ["search", str(path), "--searches", str(folder / "all"), "-q"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.long
def test_scores_of_a_supernet_are_compared_with_retrained_ones(ranked):
    _, home, printed, _ = ranked
    result = SearchResult.load(home)
    found = result.correlation
    assert len(found.candidates) == 8 and all(c.retrained is not None for c in found.candidates)
    by_number = {c.number: c for c in result.candidates}
    for one in found.candidates:
        assert one.score == by_number[one.number].values["auc"]
        report = Report.load(home / "finals" / f"trial-{one.number:04d}_seed-{one.seed}")
        assert one.retrained == report.valid["auc"] and one.steps == report.steps == 2
    scores = [(c.score, c.retrained) for c in found.candidates]
    assert found.spearman == pytest.approx(spearmanr(*zip(*scores)).statistic)
    # What the finals trained anyway is no cost of this.
    finals = {(p.number, run.seed) for p in result.points for run in p.runs}
    shared = sum((c.number, c.seed) in finals for c in found.candidates)
    assert shared and found.trainings == 8 - shared
    assert found.full_trainings == pytest.approx(found.trainings * 2 / 2)
    assert f"rank correlation {found.text()}" in printed
    page = (home / "search.html").read_text()
    assert "How well the supernet ranks" in page and f"correlation {found.text()}" in page


def test_candidates_that_were_retrained_are_not_trained_again(ranked, monkeypatch):
    path, home, printed, started = ranked
    again = train_here(monkeypatch)
    assert search_command(path, home.parent.parent) == printed
    assert len(started) >= 8 and again == []
