"""AutoDim: tables learn what each of their widths weighs, and are trained again at those that fit."""

from __future__ import annotations

import copy

import pytest
import torch

from embcomp import AutoDim, BudgetError, ConfigError, Hash, LowDim
from embcomp.backends.base import StageInputs
from embcomp.backends.widths.width_mixture import (
    MixedTable,
    MixtureNoise,
    WidthMixture,
    column_shares,
)
from embcomp.layers.hashing import table_salt
from embcomp.testing.cases import BackendCase, pooled
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit
from tests.helpers.long import long_but

GRID = (1, 2, 4, 8)


def mixture(tables=(("t0", 8, GRID), ("t1", 4, (2, 4))), temperature=1.0):
    return WidthMixture(
        [MixedTable(name=n, dim=d, widths=w, num_features=1) for n, d, w in tables],
        temperature=temperature,
        seed=0,
    )


def test_a_column_counts_what_the_widths_that_have_it_weigh_together():
    mixed = mixture().eval()
    with torch.no_grad():
        mixed.weights.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 3.0]).log())
        found = mixed(torch.ones(1, 12))[0]
    wanted = [1.0, 0.9, 0.7, 0.7, 0.4, 0.4, 0.4, 0.4, 1.0, 1.0, 0.75, 0.75]
    torch.testing.assert_close(found, torch.tensor(wanted))
    own = column_shares(mixed.weights.values[:4], GRID, 8)
    torch.testing.assert_close(own, found[:8], rtol=0, atol=0)
    parts = mixed.each([torch.ones(3, 8), torch.ones(2, 4)], None)
    torch.testing.assert_close(parts[1][1], found[8:])


def test_noise_is_gumbels_other_in_each_step_and_the_same_beside_other_tables():
    noise = MixtureNoise([[table_salt(1, "t", n) for n in range(500)]])
    drawn = torch.stack([noise.next()[0] for _ in range(40)])
    assert abs(float(drawn.mean()) - 0.5772) < 0.03 and abs(float(drawn.var()) - 1.645) < 0.08
    assert int(noise.step) == 40 and not torch.equal(drawn[0], drawn[1])
    alone, beside = mixture((("t1", 4, (2, 4)),)), mixture()
    for _ in range(3):
        one, two = alone.train()(torch.ones(1, 4)), beside.train()(torch.ones(1, 12))
        torch.testing.assert_close(one[0], two[0, 8:], rtol=0, atol=0)
        assert one[0, 0].item() == 1 and 0 < one[0, 2].item() < 1


def test_it_cools_to_a_tenth():
    mixed = mixture([(f"t{n}", 2, (1, 2)) for n in range(400)]).train()
    mixed.planned_steps = 100
    between = []
    for step in (0, 100, 500):
        mixed.draws.step.fill_(step)
        shares = mixed(torch.ones(1, 800)).detach()[0, 1::2]
        between.append(int(((shares > 0.05) & (shares < 0.95)).sum()))
    # Differences of noise are logistic: 0.05 and 0.95 are 2.94 temperatures from the middle.
    assert 340 < between[0] < 380 and 35 < between[1] < 80 and 35 < between[2] < 80


def collection_with(method, weights, tables):
    collection = pooled(BackendCase(config=method), tables)
    with torch.no_grad():
        for name, values in weights.items():
            n = int(name[1:])
            size = len(values)
            collection.combine.combines["autodim"].weights.values[n * size : (n + 1) * size] = (
                torch.tensor(values)
            )
    return collection


def test_widths_are_the_likeliest_that_fit():
    tables = plain_tables(8, rows=(100, 100))
    weights = {"t0": [0.0, 1.0, 5.0, 5.5], "t1": [0.5, 0.2, 0.3, 0.1]}
    for target, wanted in ((None, (8, 1)), (10_000, (8, 1)), (2_400, (4, 1)), (800, (1, 1))):
        method = AutoDim(target_bytes=target, width_grid=GRID)
        collection = collection_with(method, weights, tables)
        (state,) = collection.states()
        found = method.chosen_widths(state.tables, state.form)
        assert tuple(found.values()) == wanted
    batch = batch_of({"f0": [[3], [99]], "f1": [[5], [6, 7]]})
    whole = collection_with(AutoDim(width_grid=GRID), weights, tables).eval()
    torch.testing.assert_close(whole.compact()(batch).values(), whole(batch).values())
    cut = collection_with(AutoDim(target_bytes=2_400, width_grid=GRID), weights, tables).eval()
    assert cut.compact().footprint.serve_bytes == 100 * 4 * 5


def search_and_retrain(planted, method, *, seed=0):
    """Its two stages in memory: the widths, and the model that is left."""
    torch.manual_seed(seed)
    model = Clicks(planted, method, 8)
    initial, network = model.form, copy.deepcopy(model.linear.state_dict())
    fit(model, planted, epochs=3, structure_rate=method.weight_learning_rate, plans=True)
    past = StageInputs(before=model.form, initial=lambda: initial, counts=planted.counts(TRAIN))
    form = method.start_stage(method.stages()[-1], model.specs, past)
    after = Clicks(planted, form.config, 8)
    after.load(form)
    after.linear.load_state_dict(network)
    fit(after, planted, epochs=3)
    return form.config, after


@pytest.mark.parametrize("seed", long_but([1], range(1, 4)))
def test_tables_that_need_width_get_it_and_it_beats_one_width_for_all(seed):
    planted = plant(num_values=(60, 60, 300, 300), rank=4, seed=seed)
    most = 720 * 8 * 4 * 3 // 10
    found, model = search_and_retrain(planted, AutoDim(target_bytes=most))
    widths = found.widths
    assert min(widths["t0"], widths["t1"]) > max(widths["t2"], widths["t3"])
    assert model.tables.footprint.serve_bytes <= most
    scores = {"autodim": auc(model, planted)}
    for method in (LowDim(), Hash(collisionless=0)):
        torch.manual_seed(0)
        other = Clicks(planted, method.fit_budget(model.specs, most), 8)
        fit(other, planted, epochs=3)
        scores[method.name] = auc(other, planted)
    assert scores["autodim"] > scores["low_dim"] + 0.005
    assert scores["autodim"] > scores["hash"] + 0.1


def test_two_stages_and_what_is_refused():
    assert [stage.name for stage in AutoDim().stages()] == ["search", "retrain"]
    assert AutoDim().stages()[0].alternate and AutoDim().stages()[0].holds_out
    tables = plain_tables(8, rows=(100,))
    specs = pooled(BackendCase(config=AutoDim()), tables).plan.tables
    with pytest.raises(
        BudgetError, match="autodim: 1 table.*smallest autodim reaches is 800 bytes"
    ):
        AutoDim().fit_budget(specs, 799)
    with pytest.raises(ConfigError, match="autodim"):
        AutoDim(weight_learning_rate=0.0)
