"""What is tried, in which order, for whom; and who gets another seed when hours are short."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from embcomp.benchmark.benchmark_config import parse_benchmark
from embcomp.benchmark.cells import Cell, prepare_benchmark
from embcomp.benchmark.planned_runs import final_run, tuning_run
from embcomp.benchmark.seed_halving import Standing, going_on
from embcomp.benchmark.tuning import TuningTrial, best_of, propose, round_sizes
from embcomp.errors import ConfigError
from tests.helpers.benchmark_cases import benchmark_document
from tests.helpers.search_cases import RECIPE, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("tuning"))


def prepared_with(path, **changes):
    return prepare_benchmark(parse_benchmark(benchmark_document(path) | changes))


@pytest.fixture(scope="module")
def prepared(recipe):
    return prepared_with(recipe, tuning={"trials": 8, "rounds": 2})


def optimum(tuned) -> float:
    """A validation metric that is best at rates of .02 and .001."""
    return -abs(math.log(tuned["row"] / 0.02)) - abs(math.log(tuned["dense"] / 0.001))


def tried(tuned, quality=None) -> TuningTrial:
    return TuningTrial(
        tuned=tuned, quality=optimum(tuned) if quality is None else quality, seconds=1.0
    )


def test_rounds_share_the_trials():
    def sizes(trials, rounds):
        tuning = {"trials": trials, "rounds": rounds}
        return round_sizes(parse_benchmark(benchmark_document("r", tuning=tuning)))

    assert sizes(8, 2) == [4, 4] and sizes(7, 3) == [3, 2, 2] and sizes(1, 1) == [1]


def test_everyone_tries_the_same_rates_first_and_the_recipes_own_among_them(prepared):
    first = [propose(prepared, cell, [], 4) for cell in prepared.cells]
    rates = [[(each["row"], each["dense"]) for each in found] for found in first]
    assert rates[0] == rates[1] == rates[2] and len(set(rates[0])) == 4
    assert rates[0][0] == (0.05, 0.001)
    for row, dense in rates[0]:
        assert 0.005 <= row <= 0.2 and 0.0003 <= dense <= 0.003


def test_first_points_are_spread_over_the_whole_square(prepared):
    points = propose(prepared, prepared.cells[0], [], 16)[1:]
    low, high = prepared.config.tuning.row_learning_rate
    places = sorted(math.log(each["row"] / low) / math.log(high / low) for each in points)
    assert places[0] < 0.2 and places[-1] > 0.8
    assert max(b - a for a, b in itertools.pairwise(places)) < 0.25


def test_later_rounds_follow_the_scores_alone_and_repeat_nothing(prepared):
    cell = prepared.cells[-1]
    past = [tried(each) for each in propose(prepared, cell, [], 6)]
    later = propose(prepared, cell, past, 6)
    assert later == propose(prepared, cell, past, 6)
    assert not [each for each in later if each in [one.tuned for one in past]]
    assert {each["settings"] for each in later} <= {0, 1}
    other = [replace(each, quality=-(each.quality or 0)) for each in past]
    assert propose(prepared, cell, other, 6) != later


def test_what_tpe_proposes_gets_nearer_to_the_best_rates(prepared):
    """Twelve trials in four rounds against the first twelve points of the even spread."""
    cell = prepared.cells[0]
    spread = max(optimum(each) for each in propose(prepared, cell, [], 4))
    past = [tried(each) for each in propose(prepared, cell, [], 4)]
    for _ in range(4):
        past += [tried(each) for each in propose(prepared, cell, past, 4)]
    best = best_of(prepared.config, past)
    assert best is not None and optimum(best.tuned) > spread / 2


def test_failed_trials_are_learnt_from_and_never_chosen(prepared):
    tuned = propose(prepared, prepared.cells[0], [], 3)
    past = [
        TuningTrial(tuned=each, quality=None, seconds=1.0, failure="diverged") for each in tuned
    ]
    assert best_of(prepared.config, past) is None
    assert len(propose(prepared, prepared.cells[0], past, 2)) == 2
    past.append(tried(propose(prepared, prepared.cells[0], past, 1)[0]))
    assert best_of(prepared.config, past) is past[-1]


def test_less_log_loss_is_better(recipe):
    config = parse_benchmark(benchmark_document(recipe, quality="log_loss"))
    past = [tried({}, 0.5), tried({}, 0.4), tried({}, 0.6)]
    assert best_of(config, past) is past[1]


def test_trials_that_tune_never_see_the_test_split_and_runs_that_count_are_the_recipe(prepared):
    cell, tuned = prepared.cells[-1], {"row": 0.0123, "dense": 0.00045, "settings": 1}
    trial = tuning_run(prepared, cell, tuned, view="/view", dataset="d").config
    assert trial.data.path == "/view" and trial.train.max_steps == 4
    final = final_run(prepared, cell, tuned, 2022, dataset="d").config
    assert final.data.path == prepared.base.data.path and final.train.max_steps is None
    for run in (trial, final):
        assert run.train.row_optimizer.learning_rate == 0.0123
        assert run.train.dense_optimizer.learning_rate == 0.00045
        assert run.tables.method.settings.num_chunks == 2
        assert run.tables.budget == int(0.3 * prepared.full_bytes)


def test_equal_trainings_have_one_number_and_others_another(prepared):
    cell, tuned = prepared.cells[0], {"row": 0.01, "dense": 0.001, "settings": 0}

    def number(seed=1, dataset="d", **changes):
        return final_run(prepared, cell, {**tuned, **changes}, seed, dataset=dataset).number

    numbers = [number(), number(seed=2), number(dataset="e"), number(row=0.02)]
    numbers.append(tuning_run(prepared, cell, tuned, view="v", dataset="d").number)
    assert number() == numbers[0] and len(set(numbers)) == len(numbers)
    assert all(0 <= each < 2**48 for each in numbers)


def test_budgets_count_from_the_uncut_vocabulary_where_told(tmp_path):
    from embcomp.data_pipelines.schema import DatasetInfo

    recipe = write_recipe(tmp_path)
    info = DatasetInfo.load(tmp_path / "toy")
    for feature in info.categorical:
        feature.num_raw_values = 10 * feature.num_embeddings - 2
    info.save(tmp_path / "toy")
    cut = prepared_with(recipe)
    assert cut.uncut_bytes == 10 * cut.full_bytes
    uncut = prepared_with(recipe, budgets=["5%", "20%"], budget_of="uncut", methods=["hash"])
    assert [cell.budget_bytes for cell in uncut.cells] == [None, cut.full_bytes // 2]
    assert any("the full tables fit" in note for note in uncut.notes)


def test_what_no_setting_of_a_method_can_meet_is_left_out_with_the_reason(recipe):
    found = prepared_with(recipe, methods=["hash", "low_dim"], budgets=["30%", "4%"])
    assert ("low_dim", "4%") not in [(cell.method, cell.budget) for cell in found.cells]
    assert any(note.startswith("deepfm, low_dim at 4%: ") for note in found.notes)


def test_a_method_with_a_size_of_its_own_has_no_budget(recipe):
    found = prepared_with(recipe, methods=["hash", {"method": "low_dim", "width": 2}])
    assert [(c.method, c.budget) for c in found.cells][-1] == ("low_dim", None)


def test_a_method_may_have_other_keys_of_the_recipe(recipe):
    own = {"method": "hash", "label": "long", "overrides": {"train": {"epochs": 3}}}
    found = prepared_with(recipe, methods=["hash", own])
    tuned = {"row": 0.01, "dense": 0.001, "settings": 0}
    runs = [final_run(found, cell, tuned, 1, dataset="d").config for cell in found.cells]
    assert [run.train.epochs for run in runs] == [1, 1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "no_such_recipe"}, "no recipe 'no_such_recipe'"),
        ({"models": ["lr"]}, "lr has no embedding tables"),
        ({"methods": [{"method": "hash", "overrides": {"trian": {}}}]}, "did you mean 'train'"),
        ({"overrides": {"tables": {"embedding_dim": 0}}}, "embedding_dim"),
        ({"methods": ["full"]}, "nothing is left to compare"),
        ({"budgets": ["100%"]}, "the full tables fit"),
    ],
)
def test_mistakes_surface_before_anything_is_trained(recipe, changes, message):
    with pytest.raises(ConfigError) as caught:
        prepared_with(recipe, **changes)
    assert message in str(caught.value)


def test_a_dataset_without_test_rows_is_refused(tmp_path):
    from embcomp.data_pipelines.schema import DatasetInfo

    recipe = write_recipe(tmp_path)
    info = DatasetInfo.load(tmp_path / "toy")
    info.splits.pop("test")
    info.save(tmp_path / "toy")
    with pytest.raises(ConfigError, match="split 'test'"):
        prepared_with(recipe)
    assert "path" in RECIPE


def standing(method, aucs, *, seconds=10.0, budget="10%", noise=0.001, draws=True) -> Standing:
    generator = np.random.default_rng(len(method))
    cell = Cell(
        model="m", method=method, backend=method, budget=budget, budget_bytes=1, document={}
    )
    by_seed = dict(enumerate(aucs))
    drawn = {seed: auc + noise * generator.normal(size=200) for seed, auc in by_seed.items()}
    return Standing(cell=cell, aucs=by_seed, seconds=seconds, draws=drawn if draws else {})


FIELD = [
    standing("hash", [0.70]),
    standing("best", [0.76]),
    standing("good", [0.755]),
    standing("close", [0.7549]),
    standing("lost", [0.71]),
    standing("worse", [0.705]),
]


def names(cells):
    return [cell.method for cell in cells]


def test_certain_losers_get_no_more_seeds_but_references_and_the_undecided_do():
    kept, lost = going_on(FIELD, seconds_left=1e9, seed=0)
    assert names(kept) == ["hash", "best", "good", "close"] and names(lost) == ["lost", "worse"]


def test_the_better_half_goes_on_whatever_the_difference():
    field = [standing("a", [0.8]), standing("b", [0.7]), standing("c", [0.6]), standing("d", [0.5])]
    kept, lost = going_on(field, seconds_left=1e9, seed=0)
    assert names(kept) == ["a", "b"] and names(lost) == ["c", "d"]


def test_budgets_are_judged_apart():
    small = standing("small", [0.6], budget="1%")
    kept, lost = going_on([*FIELD, small], seconds_left=1e9, seed=0)
    assert "small" in names(kept) and "small" not in names(lost)


def test_without_scores_nobody_is_certainly_behind_but_who_failed():
    field = [standing("a", [0.8], draws=False), standing("b", [0.5], draws=False)]
    assert names(going_on(field, seconds_left=1e9, seed=0)[0]) == ["a", "b"]
    failed = standing("failed", [])
    assert names(going_on([*field, failed], seconds_left=1e9, seed=0)[1]) == ["failed"]


def test_what_time_is_left_for_goes_to_references_and_the_best():
    kept, _ = going_on(FIELD, seconds_left=25.0, seed=0)
    assert names(kept) == ["hash", "best"]
    assert going_on(FIELD, seconds_left=15.0, seed=0)[0] == []
    assert going_on(FIELD, seconds_left=-5.0, seed=0)[0] == []
