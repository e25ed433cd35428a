"""Samplers see what was tried, never repeat it, and beat the equal share when widths matter."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from embcomp.errors import ConfigError
from embcomp.search.api import directions_of
from embcomp.search.attempts import KIND, SURPLUS, originals
from embcomp.search.samplers.baselines import starts, uniform
from embcomp.search.samplers.candidate_encoding import Encoding
from embcomp.search.samplers.optuna_sampler import RepairedSampler, make_encoding, make_source
from embcomp.search.space.repair import USED
from embcomp.search.trials.retraining import select_candidates
from tests.helpers.long import long_but
from tests.helpers.search_cases import WIDTHS, prepare, write_recipe
from tests.search.test_search_repair import EVERY_METHOD

ROWS = [4000, 2000, 2000, 1500, 1000, 900, 800, 500, 700, 1200]
PLANTED = [1.0, 0.1, 4.0, 0.3, 3.0, 0.05, 2.0, 0.6, 0.2, 5.0]
GRID = [{"method": "low_dim", "width": [1, 2, 3, 4, 6, 8, 12, 16]}]
SAMPLERS = ["tpe", "nsga2", "cmaes", "random", "greedy"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_samplers"))


def quality(repair, candidate) -> float:
    """A metric whose gain from each table's bytes is known: importance times log of the share."""
    return sum(
        weight * math.log2(unit.options[place].bytes / unit.full_bytes)
        for weight, unit, place in zip(PLANTED, repair.space.units, candidate)
    )


def make_study(prepared, storage=None):
    config, repair = prepared.config, prepared.repair
    encoding = make_encoding(config, repair)
    source = make_source(config, repair, encoding)
    sampler = RepairedSampler(
        source, encoding, repair, fill=config.fills, quality_sign=1, seed=config.seed
    )
    study = optuna.create_study(directions=directions_of(config), sampler=sampler, storage=storage)
    return study, sampler


def run(prepared, count):
    """Ask, scores and tells; returns candidates in order, and their scores."""
    study, sampler = make_study(prepared)
    found = []
    count = sampler.source.count or count
    for _ in range(count):
        trial = study.ask(fixed_distributions=sampler.encoding.distributions)
        candidate = sampler.encoding.decode(trial.params)
        score = quality(prepared.repair, candidate)
        trial.set_user_attr("serve_bytes", prepared.repair.costs.of(candidate).serve)
        trial.set_user_attr(KIND, "uniform" if candidate == uniform(prepared.repair) else "")
        values = [score]
        if "bytes" in prepared.config.objectives:
            values.append(float(prepared.repair.costs.of(candidate).serve))
        study.tell(trial, values)
        found.append((candidate, score))
    return study, sampler, found


def search_of(recipe, sampler, **changes):
    settings = {"budget": "20%", "groups": [{"choices": GRID}], "sampler": sampler}
    return prepare(recipe, ROWS, **{**settings, **changes})


@pytest.mark.parametrize("sampler", long_but(["greedy", "nsga2"], SAMPLERS))
def test_each_beats_the_equal_share_and_follows_the_planted_importance(recipe, sampler):
    overrides = {"tables": {"embedding_dim": 16}}
    prepared = search_of(recipe, {"name": sampler, "population": 10}, overrides=overrides)
    repair = prepared.repair
    _, _, found = run(prepared, 150)
    best = sorted(found, key=lambda pair: -pair[1])[:5]
    assert best[0][1] > quality(repair, uniform(repair)) + 0.5
    widths = np.mean([widths_of(repair, candidate) for candidate, _ in best], axis=0)
    worth = np.array(PLANTED) / np.array(ROWS)  # an optimal width goes with this
    assert rank_correlation(widths, worth) > (0.8 if sampler != "random" else 0.5)
    assert all(repair.costs.of(candidate).serve <= repair.budget for candidate, _ in found)


def widths_of(repair, candidate):
    return [unit.options[p].bytes / unit.rows for unit, p in zip(repair.space.units, candidate)]


def rank_correlation(a, b):
    """Spearman's, ties by their mean rank."""
    ranks = [np.array([np.mean([np.sum(x < v), np.sum(x <= v) - 1]) for v in x]) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("baseline", [True, False])
def test_the_equal_share_is_retrained_beside_the_best_unless_not_wanted(recipe, baseline):
    finals = {"points": 2, "seeds": 1, "baseline": baseline}
    prepared = search_of(recipe, {"name": "tpe"}, finals=finals)
    study, sampler, found = run(prepared, 30)
    points = select_candidates(prepared.config, study, sampler)
    ranked = sorted(found, key=lambda pair: -pair[1])
    equal = [uniform(prepared.repair)] if baseline else []
    assert [p.candidate for p in points] == [ranked[0][0], ranked[1][0], *equal]
    assert [p.baseline for p in points] == [False, False, True][: len(points)]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes", "random"])
def test_the_study_records_the_repaired_candidate_and_none_twice(recipe, sampler):
    choices = GRID if sampler == "cmaes" else EVERY_METHOD
    prepared = search_of(recipe, {"name": sampler}, groups=[{"choices": choices}])
    repair = prepared.repair
    study, sampler_, found = run(prepared, 30)
    assert len({candidate for candidate, _ in found}) == 30
    for trial, (candidate, _) in zip(study.trials, found):
        assert sampler_.encoding.decode(trial.params) == candidate
        assert repair(candidate) == candidate or repair.costs.of(candidate).serve <= repair.budget
        used = repair.costs.of(candidate).serve / repair.budget
        assert USED <= used <= 1


def test_the_same_seed_proposes_the_same_and_another_does_not(recipe):
    first = run(search_of(recipe, {"name": "tpe", "startup": 5}), 20)[2]
    assert run(search_of(recipe, {"name": "tpe", "startup": 5}), 20)[2] == first
    assert run(search_of(recipe, {"name": "tpe", "startup": 5}, seed=9), 20)[2] != first


def test_workers_that_ask_at_the_same_time_get_different_candidates(recipe):
    prepared = search_of(recipe, {"name": "random", "starts": False})
    storage = optuna.storages.InMemoryStorage()
    study, sampler = make_study(prepared, storage)
    other = make_study(prepared)[1]
    again = optuna.load_study(study_name=study.study_name, storage=storage, sampler=other)
    asked = []
    for _ in range(6):
        for worker in (study, again):
            trial = worker.ask(fixed_distributions=sampler.encoding.distributions)
            asked.append(sampler.encoding.decode(trial.params))
    assert len(set(asked)) == 12


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_several_objectives_leave_the_budget_open_below(recipe, sampler):
    prepared = search_of(recipe, {"name": sampler}, objectives=["auc", "bytes"])
    study, _, found = run(prepared, 40)
    used = [prepared.repair.costs.of(c).serve / prepared.repair.budget for c, _ in found]
    assert max(used) <= 1 and min(used) < 0.9
    assert len(study.best_trials) > 3


def test_nsga2_breeds_from_the_starts_too(recipe):
    prepared = search_of(recipe, {"name": "nsga2", "population": 5})
    study, _, _ = run(prepared, 6)
    generations = [
        value
        for trial in study.trials
        for key, value in trial.system_attrs.items()
        if "generation" in key
    ]
    assert len(generations) >= 5


def test_a_grid_is_every_repaired_combination_once(recipe):
    prepared = prepare(recipe, [300, 60], sampler={"name": "grid"}, objectives=["auc", "bytes"])
    study, sampler = make_study(prepared)
    repair = prepared.repair
    possible = {
        repair((a, b), fill=False) for a in range(len(WIDTHS[0]["width"])) for b in range(4)
    }
    asked = set()
    for _ in range(sampler.source.count):
        trial = study.ask(fixed_distributions=sampler.encoding.distributions)
        asked.add(sampler.encoding.decode(trial.params))
        study.tell(trial, [0.5, 1.0])
    assert asked == possible and len(study.trials) == len(possible)


def test_a_grid_that_would_never_end_is_refused(recipe):
    prepared = prepare(recipe, [300] * 12, sampler={"name": "grid"})
    with pytest.raises(ConfigError, match="16,777,216 combinations"):
        make_study(prepared)


def test_an_exhausted_space_is_noticed(recipe):
    prepared = prepare(recipe, [1000, 1000], budget="25%", groups=[{"choices": WIDTHS}])
    study, sampler = make_study(prepared)
    for _ in range(8):
        trial = study.ask(fixed_distributions=sampler.encoding.distributions)
        if sampler.exhausted:
            break
        study.tell(trial, 0.5)
    assert sampler.exhausted


@pytest.mark.parametrize("relaxed", [False, True])
def test_parameters_and_candidates_translate_both_ways(recipe, relaxed):
    space = prepare(recipe, [3000, 60, 500], groups=[{"choices": EVERY_METHOD}]).space
    encoding = Encoding(space, relaxed=relaxed)
    draw = np.random.default_rng(0)
    for _ in range(200):
        candidate = tuple(int(draw.integers(len(unit.options))) for unit in space.units)
        parameters = encoding.encode(candidate)
        assert set(parameters) == set(encoding.distributions)
        assert encoding.decode(parameters) == candidate
        for name, value in parameters.items():
            distribution = encoding.distributions[name]
            assert distribution._contains(distribution.to_internal_repr(value))
        # What still means the same is left as it was proposed.
        assert encoding.encode(candidate, parameters) == parameters


def test_greedy_probes_each_table_alone_and_within_the_budget(recipe):
    prepared = search_of(recipe, {"name": "greedy"}, overrides={"tables": {"embedding_dim": 16}})
    _, sampler, found = run(prepared, 0)
    base = found[0][0]
    assert sampler.source.count == len(found) == len(ROWS) + 2
    for u, (probe, _) in enumerate(found[1:-1]):
        assert [i for i, (a, b) in enumerate(zip(base, probe)) if a != b] == [u]
        assert probe[u] == 0


def test_greedy_waits_for_its_probes(recipe):
    prepared = search_of(recipe, {"name": "greedy"}, overrides={"tables": {"embedding_dim": 16}})
    study, sampler = make_study(prepared)
    space = sampler.encoding.distributions
    trials = [study.ask(fixed_distributions=space) for _ in range(len(ROWS) + 1)]
    for trial in trials[:-1]:
        study.tell(trial, 0.5)
    assert not sampler.source.ready(len(trials), sampler.tried(study))
    study.tell(trials[-1], state=TrialState.FAIL)
    assert sampler.source.ready(len(trials), sampler.tried(study))


@pytest.mark.parametrize("sampler", ["grid", "greedy", "tpe"])
def test_a_worker_that_dies_while_it_proposes_leaves_no_gap(recipe, sampler):
    prepared = prepare(recipe, [300, 60, 500], sampler={"name": sampler}, budget="40%")
    study, made = make_study(prepared)
    space, alone = made.encoding.distributions, run(prepared, 12)[2]
    asked = [study.ask(fixed_distributions=space) for _ in range(3)]
    # The second is taken off the books when others have gone on: all numbers after it shift.
    asked[1].set_user_attr(SURPLUS, True)
    study.tell(asked[1], state=TrialState.FAIL)
    for trial in (asked[0], asked[2]):
        study.tell(trial, quality(prepared.repair, made.encoding.decode(trial.params)))
    for _ in range(len(alone) - 2):
        trial = study.ask(fixed_distributions=space)
        study.tell(trial, quality(prepared.repair, made.encoding.decode(trial.params)))
    tried = [made.encoding.decode(t.params) for t in originals(study)]
    if sampler == "tpe":
        assert len(tried) == len(set(tried)) == len(alone)
        assert set(starts(prepared.repair).values()) <= set(tried)
    else:
        assert sorted(tried) == sorted(candidate for candidate, _ in alone)
