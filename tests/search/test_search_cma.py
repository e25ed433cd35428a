"""CMA-ES leaves no pickle in a study, reads none, and goes on from the trials alone."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler

from embcomp.search.samplers.derived_cma import GENERATION, DerivedCma, has_pickled_state, told
from embcomp.search.trials.storage import open_storage
from tests.helpers.search_cases import prepare, write_recipe
from tests.search.test_search_samplers import GRID, ROWS, make_study, quality

SPACE = {f"x{i}": FloatDistribution(0.0, 9.0) for i in range(3)}
GOAL = np.array([7.0, 1.0, 4.0])


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def distance(params):
    return float(((np.array([params[name] for name in SPACE]) - GOAL) ** 2).sum())


class Seeded(optuna.samplers.BaseSampler):
    """A new sampler for every trial, as searches have it."""

    def __init__(self):
        self.own = None

    def infer_relative_search_space(self, study, trial):
        return SPACE

    def sample_relative(self, study, trial, space):
        self.own = DerivedCma(trial.number * 977, 5)
        return self.own.sample_relative(study, trial, space)

    def sample_independent(self, study, trial, name, distribution):
        return self.own.sample_independent(study, trial, name, distribution)


def run(study, count):
    study.sampler = Seeded()
    for _ in range(count):
        trial = study.ask(fixed_distributions=SPACE)
        study.tell(trial, distance(trial.params))


def test_it_finds_a_minimum_and_writes_no_pickle(tmp_path):
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    run(study, 120)
    late = np.mean([distance(trial.params) for trial in study.trials[-20:]])
    early = np.mean([distance(trial.params) for trial in study.trials[:20]])
    assert study.best_value < 0.5 and late < early / 10
    assert not has_pickled_state(study)
    assert "optimizer" not in (tmp_path / "study.journal").read_text()
    assert max(trial.system_attrs.get(GENERATION, 0) for trial in study.trials) > 5


def test_it_is_told_what_optunas_own_sampler_is_told():
    theirs = optuna.create_study(sampler=CmaEsSampler(seed=1, n_startup_trials=5))
    theirs.optimize(
        lambda trial: distance({n: trial.suggest_float(n, 0.0, 9.0) for n in SPACE}), n_trials=60
    )
    kept = [t for t in theirs.trials if any("optimizer" in key for key in t.system_attrs)][-1]
    parts = sorted(
        ((int(k.rpartition(":")[2]), v) for k, v in kept.system_attrs.items() if "optimizer" in k)
    )
    own = pickle.loads(bytes.fromhex("".join(part for _, part in parts)))  # made in this test
    before = [trial for trial in theirs.trials if trial.number < kept.number]
    ours = told(before, dict.fromkeys(SPACE, (0.0, 9.0)), 1.0, seed=0)
    assert ours.generation == own.generation > 2
    assert np.allclose(ours._mean, own._mean) and np.isclose(ours._sigma, own._sigma)
    assert np.allclose(ours._C, own._C)


def test_a_study_that_goes_on_is_the_study_that_would_have_been(tmp_path):
    whole = optuna.create_study()
    run(whole, 40)
    parted = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    run(parted, 23)
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    run(again, 17)
    assert [t.params for t in again.trials] == [t.params for t in whole.trials]


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("startup", [2, 4])
def test_a_pickle_in_an_older_study_is_never_read(tmp_path, startup):
    recipe = write_recipe(tmp_path)
    prepared = prepare(
        recipe,
        ROWS,
        budget="20%",
        groups=[{"choices": GRID}],
        sampler={"name": "cmaes", "startup": startup, "starts": False},
    )
    study, sampler = make_study(prepared)
    trap = pickle.dumps(Trap(tmp_path / "sprung")).hex()
    for _ in range(10):
        trial = study.ask(fixed_distributions=sampler.encoding.distributions)
        study._storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", trap)
        study.tell(trial, quality(prepared.repair, sampler.encoding.decode(trial.params)))
    assert has_pickled_state(study) and not Path(tmp_path / "sprung").exists()


def test_no_sampler_of_a_search_unpickles():
    root = Path(__file__).resolve().parents[2]
    texts = {path.name: path.read_text() for path in (root / "search").rglob("*.py")}
    assert len(texts) > 30
    for name, text in texts.items():
        assert "import pickle" not in text and "CmaEsSampler" not in text, name
