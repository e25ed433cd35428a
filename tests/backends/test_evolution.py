"""The search over widths: what the public reference gets wrong, budgets, and going on after a stop."""

from __future__ import annotations

import copy
import inspect
import json
import math
import random

import pytest

from embcomp import BudgetError, ConfigError
from embcomp.backends.widths import evolution as module
from embcomp.backends.widths.evolution import Evolution, cross, evolve, mutate
from embcomp.backends.widths.width_space import WidthSpace, width_choices

QUICK = Evolution(generations=8, population=12, parents=8, mutants=6, crossovers=6, finalists=3)


def space_of(rows=(1000, 200, 50, 10), widest=16, grid=1, budget=None):
    choices = tuple(width_choices(grid, widest) for _ in rows)
    return WidthSpace(
        names=tuple(f"C{n}" for n in range(len(rows))),
        choices=choices,
        sizes=tuple(tuple(4 * n * w for w in widths) for n, widths in zip(rows, choices)),
        rows=rows,
        budget=budget,
    )


def score_near(wanted):
    """Best at the wanted widths, worse by the distance."""
    return lambda widths: -sum(abs(w - t) for w, t in zip(widths, wanted))


class Recorder:
    """A score that remembers every call."""

    def __init__(self, score):
        self.score, self.calls = score, []

    def __call__(self, widths):
        self.calls.append(widths)
        return self.score(widths)


def test_parents_are_not_changed_by_their_mutants():
    draw = random.Random(0)
    parent = (4, 4, 4, 4)
    mutants = [mutate(space_of(), parent, 0.5, draw) for _ in range(50)]
    assert parent == (4, 4, 4, 4)
    assert parent not in mutants


def test_a_score_stays_with_its_candidate():
    scored = {}

    def score(widths):
        scored[widths] = random.Random(str(widths)).random()
        return scored[widths]

    found = evolve(space_of(), score, QUICK, seed=1)
    assert found.score == max(scored.values()) == scored[found.widths]


def test_one_point_crossover_cuts_between_any_two_fields_and_nowhere_else():
    draw = random.Random(0)
    one, other = (1,) * 5, (9,) * 5
    children = [cross(one, other, draw) for _ in range(400)]
    cuts = {c.index(9) for c in children if 9 in c and list(c) == sorted(c)}
    assert {1, 2, 3, 4} <= cuts
    assert sum(c == one for c in children) < 20  # by field-wise mixing only


def test_bytes_count_every_column():
    space = space_of(rows=(1000, 200))
    assert space.size((16, 1)) == 4 * (1000 * 16 + 200)


def test_the_beginning_and_mutation_propose_the_least_width_and_the_greatest():
    draw = random.Random(0)
    space = space_of()
    mutants = [mutate(space, (8, 8, 8, 8), 0.3, draw) for _ in range(400)]
    beginning = [space.random_candidate(draw) for _ in range(400)]
    for candidates in (mutants, beginning):
        for column in zip(*candidates):
            assert {1, 16} <= set(column)
            assert set(column) <= set(range(1, 17))


def test_the_best_is_never_lost():
    found = evolve(space_of(), score_near((3, 7, 11, 15)), QUICK, seed=2)
    assert list(found.best_so_far) == sorted(found.best_so_far)
    assert found.score == found.best_so_far[-1]


def test_no_candidate_beyond_the_budget_is_ever_scored_and_none_is_rejected():
    space = space_of(budget=4 * 1260 * 4)
    score = Recorder(score_near((16, 16, 16, 16)))
    found = evolve(space, score, QUICK, seed=3)
    assert all(space.size(widths) <= space.budget for widths in score.calls)
    assert len(score.calls) == found.evaluations >= QUICK.population + 8 * QUICK.mutants
    assert space.budget * 0.9 < found.size <= space.budget


def test_selection_sees_validation_scores_alone():
    assert not {"test", "test_score"} & set(inspect.signature(evolve).parameters)
    first = score_near((8, 8, 8, 8))
    final = Recorder(score_near((9, 8, 8, 8)))
    found = evolve(space_of(), first, QUICK, seed=4, final_score=final)
    assert len(final.calls) == QUICK.finalists
    assert found.score == max(final.score(widths) for widths in final.calls)
    assert found.score == final.score(found.widths)


def test_no_candidate_is_scored_twice():
    score = Recorder(score_near((3, 7, 11, 15)))
    evolve(space_of(), score, QUICK, seed=5)
    assert len(set(score.calls)) == len(score.calls)


@pytest.mark.parametrize("stop", [1, 5, 12, 13, 20, 40])
def test_a_search_that_was_interrupted_ends_as_if_it_had_not_been(stop):
    wanted, space = (3, 7, 11, 15), space_of(budget=40_000)
    whole = Recorder(score_near(wanted))
    end = evolve(space, whole, QUICK, seed=6, final_score=score_near(wanted))
    kept = {}

    def cut(widths):
        if len(first.calls) > stop:
            raise KeyboardInterrupt
        return score_near(wanted)(widths)

    first = Recorder(cut)
    with pytest.raises(KeyboardInterrupt):
        evolve(space, first, QUICK, seed=6, save=lambda p: kept.update(text=json.dumps(p)))
    rest = Recorder(score_near(wanted))
    again = evolve(
        space,
        rest,
        QUICK,
        seed=6,
        final_score=score_near(wanted),
        load=lambda: json.loads(kept["text"]),
    )
    assert again == end
    assert first.calls[:-1] + rest.calls == whole.calls


def test_another_seed_is_another_search_and_the_same_seed_the_same():
    calls = []
    for seed in (1, 1, 2):
        score = Recorder(score_near((3, 7, 11, 15)))
        evolve(space_of(), score, QUICK, seed=seed)
        calls.append(score.calls)
    assert calls[0] == calls[1] != calls[2]


def test_progress_of_another_space_is_refused():
    kept = []
    evolve(space_of(), score_near((1, 1, 1, 1)), QUICK, seed=0, save=lambda p: kept.append(p))
    with pytest.raises(ConfigError, match="over other fields, widths or bytes"):
        evolve(space_of(grid=4), score_near((4, 4, 4, 4)), QUICK, seed=0, load=lambda: kept[-1])


def test_saved_progress_does_not_change_afterwards():
    kept = []
    evolve(space_of(), score_near((3, 7, 11, 15)), QUICK, seed=0, save=kept.append)
    again = copy.deepcopy(kept)
    assert [len(p["scores"]) for p in again[:3]] == [1, 2, 3]


def test_planted_widths_are_found():
    longer = Evolution(generations=40, population=20)
    wanted = (3, 7, 11, 15)
    found = evolve(space_of(), score_near(wanted), longer, seed=7)
    assert sum(abs(w - t) for w, t in zip(found.widths, wanted)) <= 2


def test_among_equals_the_smaller_is_best():
    found = evolve(space_of(grid=4), lambda widths: 0.5, QUICK, seed=8)
    space = space_of(grid=4)
    assert found.size <= space.size(space.widest) / 2


def test_a_score_that_is_no_number_never_wins():
    def score(widths):
        return math.nan if widths[0] > 4 else 0.1 * widths[0]

    found = evolve(space_of(), score, QUICK, seed=9)
    assert found.widths[0] <= 4
    assert math.isfinite(found.best_so_far[0])


def test_a_space_with_one_candidate_or_one_field_ends():
    assert evolve(space_of(widest=1), lambda w: 1.0, QUICK, seed=0).evaluations == 1
    found = evolve(space_of(rows=(10,)), score_near((5,)), QUICK, seed=0)
    assert found.widths == (5,)


def test_half_of_the_beginning_follows_power_laws_of_the_rows():
    score = Recorder(score_near((1, 1, 1, 1)))
    evolve(space_of(), score, Evolution(generations=0, population=10), seed=0)
    laws = score.calls[:5]
    assert len(score.calls) == 10
    assert laws[0] == (16, 16, 16, 16)
    assert all(list(law) == sorted(law) for law in laws)  # rows fall from field to field


def test_power_laws_fill_a_budget():
    space = space_of(budget=4 * 1260 * 6)
    assert space.power_law(0) == (6, 6, 6, 6)
    tilted = space.power_law(0.3)
    assert tilted[0] < 7 < tilted[-1]
    assert space.budget * 0.8 < space.size(tilted) <= space.budget


def test_repair_is_a_function_of_candidate_and_seed_that_spares_no_field():
    space = space_of(rows=(100, 100, 100), budget=4 * 100 * 24)
    repaired = {c: space.repair(c, seed=1) for c in [(16, 16, 16), (16, 15, 16), (9, 16, 16)]}
    assert all(space.fits(r) for r in repaired.values())
    assert all(space.repair(c, seed=1) == r for c, r in repaired.items())
    assert space.repair((1, 2, 3), seed=1) == (1, 2, 3)
    assert all(width < 16 for width in repaired[16, 16, 16])


@pytest.mark.parametrize(
    ("grid", "widest", "wanted"),
    [(4, 16, (4, 8, 12, 16)), (4, 10, (4, 8, 10)), (20, 10, (10,)), ([6, 2, 64], 16, (2, 6, 16))],
)
def test_width_grids(grid, widest, wanted):
    assert width_choices(grid, widest) == wanted


@pytest.mark.parametrize("grid", [0, -4, [0, 4], [2.5]])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ConfigError, match="expected a step or a list of widths above 0"):
        width_choices(grid, 16)


def test_a_budget_below_the_narrowest_names_it():
    with pytest.raises(BudgetError, match="take 5,040 bytes, over the budget of 5,000"):
        space_of(budget=5000)


@pytest.mark.parametrize(
    "settings", [{"generations": -1}, {"population": 0}, {"mutation_probability": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be"):
        Evolution(**settings)


def test_it_knows_nothing_of_training():
    source = inspect.getsource(module)
    assert "import torch" not in source and "embcomp.training" not in source
