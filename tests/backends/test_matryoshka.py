"""Matryoshka tables: every prefix is good, widths go where they are needed, draws are fair."""

from __future__ import annotations

import json

import pytest
import torch

from embcomp import ConfigError, Full, Matryoshka
from embcomp.backends.widths.greedy_widths import allocate_greedily
from embcomp.backends.widths.masks import WidthDraws
from embcomp.backends.widths.width_space import WidthSpace, width_choices
from embcomp.collection.plan import Plan
from embcomp.layers.lookup_context import LookupContext
from embcomp.tables.specs import TableSpec
from embcomp.testing.check_data import plain_tables, random_batch
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, Memory, auc, begin, fit

NARROW = plant(num_values=(60, 60, 300, 300), rank=4, seed=1)
DIM = 16


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    model = Clicks(NARROW, Matryoshka(seed=2023), DIM)  # half of the seeds find wide tables wide
    fit(model, NARROW, epochs=6)
    return model


@pytest.fixture(scope="module")
def ordinary():
    torch.manual_seed(0)
    model = Clicks(NARROW, Full(), DIM)
    fit(model, NARROW, epochs=6)
    return model


def cut(model, widths):
    """The model with its tables cut to these widths."""
    form = Matryoshka().slice_columns(model.specs, model.form, widths)
    narrow = Clicks(NARROW, form.config, DIM)
    narrow.load(form)
    narrow.linear.load_state_dict(model.linear.state_dict())
    return narrow


def test_prefixes_are_better_than_those_of_an_ordinary_table(nested, ordinary):
    for width in (4, 8):
        widths = {f"t{n}": width for n in range(4)}
        assert auc(cut(nested, widths), NARROW) > auc(cut(ordinary, widths), NARROW) + 0.03
    assert auc(nested, NARROW) > auc(ordinary, NARROW) - 0.01
    assert auc(cut(nested, widths), NARROW) > auc(nested, NARROW) - 0.005


def test_whole_and_least_widths_are_drawn_for_all_fields_of_a_sample():
    tables = plain_tables(8, rows=(50, 60, 70))
    pairs = [(table.name, feature) for table in tables for feature in table.features]
    choices = [(2, 4, 6, 8)] * len(pairs)
    draws = WidthDraws(pairs, choices, None, 7, full=0.3, least=0.2)
    batch = random_batch(tables, seed=0, batch_size=400, shape="single")
    widths = torch.cat(
        [draws(LookupContext(batch, slice(0, len(pairs)), 400, False))[:400] for _ in range(5)]
    )
    whole, least = (widths == 8).all(1).float().mean(), (widths == 2).all(1).float().mean()
    assert whole == pytest.approx(0.3 + 0.5 / 4 ** len(pairs), abs=0.03)
    assert least == pytest.approx(0.2 + 0.5 / 4 ** len(pairs), abs=0.03)
    assert {2, 4, 6, 8} == set(widths.flatten().tolist())


def test_shares_of_samples_are_no_more_than_all():
    with pytest.raises(ConfigError, match="together at most 1"):
        Matryoshka(full_share=0.7, least_share=0.6)


def test_a_slice_holds_prefixes_and_names_mistakes(nested):
    form = Matryoshka().slice_columns(nested.specs, nested.form, {"t1": 3})
    assert torch.equal(form.rows("t1").whole(), nested.form.rows("t1").whole()[:, :3])
    assert torch.equal(form.rows("t0").whole(), nested.form.rows("t0").whole())
    for widths, complaint in (
        ({"t9": 3}, "no table 't9' to cut; there are t0, t1, t2, t3"),
        ({"t1": 17}, "table 't1' has widths from 1 to 16, got 17"),
        ({"t1": 0}, "table 't1' has widths from 1 to 16, got 0"),
        ({"t1": 2.5}, "width of 't1' must be whole, got 2.5"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Matryoshka().slice_columns(nested.specs, nested.form, widths)


@pytest.mark.parametrize("choose", ["greedy", "evolution"])
def test_widths_are_chosen_within_a_budget_and_where_they_are_needed(nested, choose):
    full = nested.tables.plan.full_bytes
    method = Matryoshka(target_bytes=full * 3 // 10, choose=choose, generations=4)
    context = Memory(nested, NARROW)
    found = method.search(method.stages()[1], nested.specs, context)
    assert found["bytes"] <= full * 3 // 10
    widths = found["widths"]
    assert min(widths["t0"], widths["t1"]) >= 6 > max(widths["t2"], widths["t3"])
    chosen = begin(method, nested, NARROW, nested.form, found)
    assert chosen.tables.footprint.serve_bytes == found["bytes"]
    assert auc(chosen, NARROW) > auc(nested, NARROW) - 0.01
    again = Memory(nested, NARROW)
    again.progress = json.loads(json.dumps(context.progress))
    assert method.search(method.stages()[1], nested.specs, again) == found


def space_of(rows, budget):
    choices = tuple(width_choices(2, 8) for _ in rows)
    return WidthSpace(
        names=tuple(f"t{n}" for n in range(len(rows))),
        choices=choices,
        sizes=tuple(tuple(n * w for w in widths) for n, widths in zip(rows, choices)),
        rows=rows,
        budget=budget,
    )


def test_greedy_widths_are_best_where_losses_add_up():
    space = space_of((100, 100, 10), budget=1080)
    need = (2, 8, 4)

    def score(widths):
        return -sum(max(0, n - w) for n, w in zip(need, widths))

    widths, best, scored = allocate_greedily(space, score)
    assert (widths, best) == ((2, 8, 8), 0.0)
    assert scored <= 1 + 3 * 3 + 3


def test_greedy_widths_use_the_bytes_that_are_left():
    space = space_of((100, 1), budget=250)

    def score(widths):
        return -1.0 * (8 - widths[0]) - 0.001 * (8 - widths[1])

    widths, _, _ = allocate_greedily(space, score)
    assert widths == (2, 8)


PAIRS = [("t0", "f0"), ("t1", "f1"), ("t2", "f2")]


def looked_up(batch_size=4000, bags="single"):
    tables = plain_tables(8)
    batch = random_batch(tables, seed=0, batch_size=batch_size, shape=bags)
    rows = max(batch.length_per_key())
    return LookupContext(batch, slice(0, 3), rows)


def test_widths_are_drawn_as_often_as_they_weigh_anew_in_each_step():
    draws = WidthDraws(PAIRS, [(2, 4, 8)] * 3, [(1, 1, 2), (1, 0.5, 0.5), (1, 1, 1)], seed=1)
    first, second = draws(looked_up()), draws(looked_up())
    shares = torch.stack([(first == width).float().mean(0) for width in (2, 4, 8)], dim=1)
    wanted = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.03)
    same = (first == second).float().mean(0)
    torch.testing.assert_close(same, wanted.square().sum(1), rtol=0, atol=0.03)
    assert draws.step == 2
    equal = WidthDraws(PAIRS, [(2, 4, 8), (4, 8), (8,)], None, seed=1)(looked_up())
    assert [sorted(set(column.tolist())) for column in equal.t()] == [[2, 4, 8], [4, 8], [8]]


def test_the_ids_of_one_bag_are_cut_to_one_width():
    draws = WidthDraws(PAIRS, [tuple(range(1, 9))] * 3, None, seed=1)
    batch = looked_up(batch_size=50, bags="full_bags")
    widths, samples = draws(batch), batch.samples()
    for pair in range(3):
        for sample in range(50):
            assert len(set(widths[samples[:, pair] == sample, pair].tolist())) == 1


def test_a_budget_brings_a_search_and_a_short_finetuning():
    tables = [TableSpec(name="t", num_embeddings=1000, embedding_dim=8, feature_names=("t",))]
    assert [stage.name for stage in Matryoshka().stages()] == ["nested"]
    plan = Plan(default=Matryoshka(), budget="50%").resolve(tables)
    stages = plan.methods["t"].stages()
    assert [stage.name for stage in stages] == ["nested", "search", "finetune"]
    assert stages[-1].epochs == 1
    assert Matryoshka(budget="50%", finetune_epochs=0).stages()[-1].epochs == 0
    assert plan.footprint.serve_bytes == 16_000


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"choose": "luck"}, "choose must be one of greedy, evolution, got 'luck'"),
        ({"weights": {4: 0.0}}, "the weight of width 4 must be positive, got 0.0"),
        ({"finetune_epochs": -1}, "finetune_epochs must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Matryoshka(**settings)
