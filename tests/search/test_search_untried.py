"""No candidate of a small space is out of reach, and that all were tried is only said when it is so."""

from __future__ import annotations

import itertools

import optuna
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from optuna.trial import TrialState

from embcomp.errors import BudgetError, ConfigError
from embcomp.search.attempts import RETRY_OF, latest_attempts
from embcomp.search.evaluators.base import TrialHandle, TrialResult
from embcomp.search.space.repair import USED
from embcomp.search.space.untried import Untried
from embcomp.search.trials.trial_queue import TrialQueue
from embcomp.search.trials.worker import Worker
from tests.helpers.search_cases import WIDTHS, prepare, write_recipe
from tests.search.test_search_ledger import EndlessJobs, Silent
from tests.search.test_search_samplers import make_study

SEVERAL_METHODS = [
    {"method": "low_dim", "width": [2, 4]},
    {"method": "hash", "ratio": [0.3, 0.5], "collisionless": 0},
]
SHARED = [{"method": "unified", "num_buckets": [20, 100]}, {"method": "low_dim", "width": [1, 4]}]
PROPOSING = ["tpe", "nsga2", "cmaes", "random", "evolution"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_untried"))


def within_limits(prepared):
    """Every candidate that may be trained."""
    repair = prepared.repair
    every = itertools.product(*(range(len(unit.options)) for unit in prepared.space.units))
    return {
        c for c in every if repair.costs.of(c).serve <= repair.budget and repair.devices.fits(c)
    }


def propose_all(prepared, most=200):
    """Candidates in order until the sampler says that nothing is left."""
    study, sampler = make_study(prepared)
    found = []
    for n in range(sampler.source.count or most):
        trial = study.ask(fixed_distributions=sampler.encoding.distributions)
        if sampler.exhausted:
            break
        found.append(sampler.encoding.decode(trial.params))
        study.tell(trial, [n % 7 / 10] * len(study.directions))
    return found, sampler


@pytest.mark.parametrize("sampler", [*PROPOSING, "grid"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.integers(5, 500), min_size=1, max_size=3),
    share=st.integers(10, 100),
    choices=st.sampled_from([WIDTHS, SEVERAL_METHODS, SHARED]),
    tied=st.booleans(),
    objectives=st.sampled_from([["auc"], ["auc", "bytes"]]),
)
def test_every_candidate_of_a_small_space_is_tried_once_by_every_sampler(
    recipe, sampler, rows, share, choices, tied, objectives
):
    if sampler in ("cmaes", "evolution"):
        objectives = ["auc"]
    try:
        prepared = prepare(
            recipe,
            rows,
            budget=f"{share}%",
            groups=[{"choices": choices, "tied": tied}],
            sampler={"name": sampler, "population": 4, "startup": 3},
            objectives=objectives,
        )
    except (BudgetError, ConfigError):
        return  # nothing to search
    found, _ = propose_all(prepared)
    assert len(found) == len(set(found))
    assert set(found) == within_limits(prepared)


@pytest.mark.parametrize("sampler", PROPOSING)
def test_a_method_that_filling_leaves_is_tried_early(recipe, sampler):
    # At half of the bytes all proposals fill up to the two options that take just half.
    prepared = prepare(
        recipe,
        [7, 5],
        budget="50%",
        groups=[{"choices": SEVERAL_METHODS}],
        sampler={"name": sampler},
    )
    assert prepared.space.size == 16
    found, _ = propose_all(prepared, most=5)
    assert len(set(found)) == 5
    methods = {prepared.space.methods(candidate)["C1"].name for candidate in found}
    assert methods == {"low_dim", "hash"}


def test_candidates_that_use_the_budget_come_first(recipe):
    prepared = prepare(
        recipe, [300, 200], budget="50%", groups=[{"choices": WIDTHS}], sampler={"name": "random"}
    )
    repair = prepared.repair
    used = [repair.costs.of(c).serve >= USED * repair.budget for c in propose_all(prepared)[0]]
    assert used == sorted(used, reverse=True) and set(used) == {True, False}


@pytest.mark.parametrize("fill", [True, False])
def test_a_large_space_is_walked_from_what_was_tried(recipe, fill):
    prepared = prepare(recipe, [100 * n for n in range(2, 10)], budget="100%")
    repair, untried = prepared.repair, Untried(prepared.repair, fill=fill)
    assert not untried.lists_all
    taken = {repair((3,) * 8)}
    for _ in range(40):
        found = untried.next((3,) * 8, taken)
        assert found is not None and found not in taken
        assert repair.costs.of(found).serve <= repair.budget
        taken.add(found)


def test_a_search_of_a_large_space_does_not_say_that_all_were_tried(recipe):
    prepared = prepare(recipe, [300] * 8, budget="100%")
    _, sampler = make_study(prepared)
    assert "could be found" in sampler.exhausted_because
    small = make_study(prepare(recipe, [300] * 2, budget="100%"))[1]
    assert small.exhausted_because.startswith("every candidate within the limits was tried, of 16")


class Quick(TrialHandle):
    """A candidate that is scored at once."""

    def poll(self):
        return TrialResult(quality=0.5)


class NothingNew(EndlessJobs):
    """Finds nothing to propose, and then that another worker has died."""

    def start(self, trial, slot):
        if RETRY_OF in trial.user_attrs:
            return Quick()
        self._when_started(0)
        return None

    def values(self, trial, outcome):
        return [outcome.quality]


def test_what_a_dead_worker_left_is_done_though_nothing_new_is_left(recipe):
    prepared = prepare(recipe, [30], budget="100%", groups=[{"choices": WIDTHS}])
    study, sampler = make_study(prepared)
    space = sampler.encoding.distributions
    lost = study.ask(fixed_distributions=space)
    study.tell(lost, state=TrialState.FAIL)
    jobs = NothingNew(lambda _: study.enqueue_trial(lost.params, user_attrs={RETRY_OF: 0}))
    queue = TrialQueue(study, study._storage, space, count=9, retries=2)
    Worker(queue, jobs, Silent(), 1).run()
    assert [trial.state for trial in latest_attempts(study)] == [TrialState.COMPLETE]
