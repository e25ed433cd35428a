"""OptEmbed finds what was planted: ids that mean nothing, features that need few columns."""

from __future__ import annotations

import json

import pytest
import torch

from embcomp import ConfigError, Full, LowDim, OptEmbed
from embcomp.backends.base import MethodState, StageInputs
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import Plan
from embcomp.tables.specs import TableSpec
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import SEARCH, TRAIN, Clicks, Memory, auc, begin, fit

USELESS = plant(useful_share=0.4)
NARROW = plant(num_values=(60, 60, 300, 300), rank=4, seed=1)
LEARN = {"epochs": 3, "decay": 0.1, "structure_rate": 1.0}
PACE = {"structure_rate": 0.1}
QUICK = {"alpha": 0.005, "generations": 4, "population": 10, "mutants": 6, "crossovers": 6}


def supernet(planted, method, dim=8, **learn):
    """A trained supernet, and its form before the first step."""
    torch.manual_seed(0)
    model = Clicks(planted, method.first_method(), dim)
    initial = model.form
    fit(model, planted, **(LEARN | learn))
    return model, initial


def search(method, model, planted):
    context = Memory(model, planted)
    return method.search(method.stages()[1], model.specs, context), context


def shares_kept(masks, planted):
    """Of the useful and of the useless ids that occur ten times or more."""
    counts = planted.counts(TRAIN)
    frequent = torch.cat([counts[f"t{n}"] >= 10 for n in range(len(planted.useful))])
    kept, useful = torch.cat([mask.whole() for mask in masks.values()]), torch.cat(planted.useful)
    return (
        kept[useful & frequent].float().mean().item(),
        kept[~useful & frequent].float().mean().item(),
    )


@pytest.fixture(scope="module")
def useless():
    """A supernet over data with useless ids, and where it began."""
    return supernet(USELESS, OptEmbed(**QUICK))


def test_thresholds_prune_useless_ids_and_the_table_without_them_is_better(useless):
    method = OptEmbed(**QUICK)
    model, initial = useless
    found, _ = search(method, model, USELESS)
    masks = method.ranking(model.specs, model.form, USELESS.counts(TRAIN)).masks(found["kept"])
    useful, other = shares_kept(masks, USELESS)
    assert useful > 0.85 and other < 0.65

    retrained = begin(method, model, USELESS, initial, found)
    assert retrained.tables.footprint.serve_bytes == found["bytes"]
    assert found["bytes"] < 0.5 * retrained.tables.plan.full_bytes
    retrained.linear.reset_parameters()
    fit(retrained, USELESS, **LEARN)
    torch.manual_seed(0)
    full = Clicks(USELESS, Full(), 8)
    fit(full, USELESS, **LEARN)
    assert auc(retrained, USELESS) > auc(full, USELESS)


def kept_after(epochs):
    """The share of rows that pass after trainings that decay rows alike in all, and the thresholds."""
    method = OptEmbed(prune="rows")
    model, _ = supernet(USELESS, method, epochs=epochs, decay=0.3 / epochs, plans=True, **PACE)
    gate = model.eval().tables.combine.combines["optembed"]
    rows = {name: bag.weight for name, bag in model.tables.unpooled_rows.embedding_bags.items()}
    kept = torch.cat([gate.keeps_row(name, rows[name]) for name in gate.names])
    return kept.float().mean().item(), gate.thresholds().detach()


def test_the_pruned_share_does_not_follow_from_the_number_of_steps():
    short, at_short = kept_after(1)
    long, at_long = kept_after(3)
    assert 0.3 < short < 0.9
    assert abs(short - long) < 0.15
    torch.testing.assert_close(at_short, at_long, rtol=0.2, atol=0)


def test_steps_together_pull_as_far_whatever_their_number():
    method = OptEmbed(prune="rows")
    model = Clicks(USELESS, method, 8)
    supernet_of = model.tables.combine.combines["optembed"]
    pulls = []
    for steps in (None, 500, 5_000, 50_000):
        if steps is not None:
            model.tables.plan_steps(steps)
        model(USELESS.features(slice(0, 20)))
        pulls.append(float(supernet_of.penalty.detach()) * (steps or 5_000))
    assert pulls == pytest.approx([pulls[0]] * 4)


def test_kept_rows_are_those_whose_norm_is_above_the_threshold():
    model = Clicks(USELESS, OptEmbed(prune="rows"), 8).eval()
    gate = model.tables.combine.combines["optembed"]
    with torch.no_grad():
        gate.norms.ensure_filled()
        gate.norms.means.fill_(2.0)
        gate.thresholds.values.copy_(torch.tensor([0.5, 1.5, 0.5, 0.5]))
    rows = torch.tensor([[2.0] + [0.0] * 7, [0.9] + [0.0] * 7, [0.0] * 8])
    assert gate.keeps_row("t0", rows).tolist() == [True, False, False]
    assert gate.keeps_row("t1", rows).tolist() == [False, False, False]
    assert model.tables.may_stop_rows
    whole = Clicks(USELESS, OptEmbed(prune="widths"), 8).tables
    assert not whole.may_stop_rows


@pytest.mark.parametrize("prune", ["rows", "both"])
def test_a_budget_is_met_and_spent_on_useful_ids(useless, prune):
    model, initial = useless
    full = model.tables.plan.full_bytes
    method = OptEmbed(prune=prune, target_bytes=full // 8, **QUICK)
    if prune == "rows":
        model, initial = supernet(USELESS, method)
    found, context = search(method, model, USELESS)
    assert found["bytes"] <= full // 8
    retrained = begin(method, model, USELESS, initial, found)
    assert retrained.tables.footprint.serve_bytes == found["bytes"]
    masks = method.ranking(model.specs, model.form, context.counts).masks(found["kept"])
    useful, other = shares_kept(masks, USELESS)
    assert useful > 0.6 and useful > 1.2 * other
    if prune == "both":  # several shares of rows were tried
        assert sum("rows: best score" in line for line in context.said) >= 3


def test_narrow_features_are_found():
    bytes_of_columns = 4 * (60 * 10 + 60 * 10 + 300 * 3 + 300 * 3)
    settings = {**QUICK, "seed": 2029}  # most seeds find narrow widths for all
    method = OptEmbed(prune="widths", width_grid=2, target_bytes=bytes_of_columns, **settings)
    model, _ = supernet(NARROW, method, dim=16, epochs=6, decay=0.0)
    found, _ = search(method, model, NARROW)
    wide = [found["widths"][name] for name in ("t0", "t1")]
    narrow = [found["widths"][name] for name in ("t2", "t3")]
    assert min(wide) > max(narrow)
    model.tables.combine.combines["optembed"].fix_widths((4, 4, 4, 4))
    assert found["score"] > auc(model, NARROW, SEARCH)


def test_rows_that_fused_optimizers_never_touch_are_pruned_first():
    """Their norms stay as drawn, above those of rows that decay while they learn."""
    table = TableSpec(name="t", num_embeddings=1000, embedding_dim=8, feature_names=("t",))
    torch.manual_seed(0)
    rows = 0.01 * torch.rand(1000, 8)
    rows[300:] = 1.0  # never touched
    counts = torch.zeros(1000, dtype=torch.int64)
    counts[:300] = 5
    tensors = {
        "rows.t": rows,
        "combine.thresholds.values": torch.zeros(1),
        "combine.norms.means": torch.ones(1),
    }
    before = MethodState(config=OptEmbed(), tensors=tensors)
    for method in (
        OptEmbed(prune="rows"),
        OptEmbed(prune="rows", target_bytes=8000),
        OptEmbed(prune="rows", target_bytes=8000, importance="norm"),
    ):
        order = method.ranking([table], before, {"t": counts})
        past = StageInputs(
            before=before,
            initial=lambda: before,
            counts={"t": counts},
            results={"search": {"kept": order.most, "widths": {"t": 8}}},
        )
        form = method.start_stage(method.stages()[-1], [table], past)
        assert form.config.kept == {"t": 300}
        assert form.rows("t").shape == (301, 8)


def test_decay_lets_rare_useless_rows_fall_below_the_thresholds():
    kept = {}
    for decay in (0.0, 0.6):
        model, _ = supernet(USELESS, OptEmbed(prune="rows", alpha=0.005), decay=decay)
        masks = OptEmbed()._passing(model.specs, model.form)
        rare = torch.cat([c <= 3 for c in USELESS.counts(TRAIN).values()])
        kept[decay] = (
            torch.cat([mask.whole() for mask in masks.values()])[rare].float().mean().item()
        )
    assert kept[0.6] < 0.75 * kept[0.0]


def test_retraining_begins_from_initial_rows_or_goes_on_from_trained_ones(useless):
    model, initial = useless
    for inherit in (False, True):
        method = OptEmbed(inherit=inherit, **QUICK)
        widths = {"t0": 3, "t1": 8, "t2": 2, "t3": 1}
        found = {"kept": 400, "widths": widths}
        masks = method.ranking(model.specs, model.form, USELESS.counts(TRAIN)).masks(400)
        retrained = begin(method, model, USELESS, initial, found)
        source = model.form if inherit else initial
        for name, width in widths.items():
            kept = source.rows(name).whole()[masks[name].whole(), :width]
            rows = retrained.form.rows(name).whole()
            torch.testing.assert_close(rows[:-1], kept, rtol=0, atol=0)
            assert not rows[-1].any()
        assert method.stages()[-1].reinit_network is not inherit


def test_a_search_goes_on_where_it_was_interrupted(useless):
    model, _ = useless
    method = OptEmbed(target_bytes=model.tables.plan.full_bytes // 5, **QUICK)
    whole, _ = search(method, model, USELESS)

    class Stopped(Memory):
        evaluations = 0

        def evaluate(self, rows=None):
            self.evaluations += 1
            if self.evaluations == 25:
                raise KeyboardInterrupt
            return super().evaluate(rows)

    first = Stopped(model, USELESS)
    with pytest.raises(KeyboardInterrupt):
        method.search(method.stages()[1], model.specs, first)
    rest = Memory(model, USELESS)
    rest.progress = json.loads(json.dumps(first.progress))
    assert method.search(method.stages()[1], model.specs, rest) == whole


def test_evaluation_is_at_full_width_with_gates_on(useless):
    model, _ = useless
    model.eval()
    features = USELESS.features(slice(0, 50))
    out = model.tables(features)
    masks = OptEmbed()._passing(model.specs, model.form)
    for n, (key, embeddings) in enumerate(out.to_dict().items()):
        ids = USELESS.ids[:50, n]
        wanted = model.form.rows(f"t{n}").whole()[ids] * masks[f"t{n}"].whole()[ids].unsqueeze(1)
        torch.testing.assert_close(embeddings, wanted, msg=key)
    assert not all(bool(mask.whole().all()) for mask in masks.values())


def test_what_trains_without_stages_compacts_to_what_the_thresholds_leave_or_to_the_target(useless):
    model, _ = useless
    compacted = model.tables.eval().compact()
    features = USELESS.features(slice(0, 500))
    torch.testing.assert_close(compacted(features).values(), model.tables(features).values())
    assert compacted.footprint.serve_bytes < 0.8 * model.tables.plan.full_bytes
    for prune, share in (("both", 0.02), ("rows", 0.1), ("widths", 0.3)):
        size = int(share * model.tables.plan.full_bytes)
        form = OptEmbed(prune=prune, target_bytes=size).compact(model.specs, model.form)
        assert isinstance(form.config, LowDim)
        assert 0.5 * size < form.config.footprint(model.specs).serve_bytes <= size
        model_of_form = Clicks(USELESS, form.config, 8)
        model_of_form.tables.load_states([GroupState(tables=model.specs, form=form)])


def test_a_budget_becomes_the_target_and_the_supernet_is_whole():
    tables = [
        TableSpec(name=f"t{n}", num_embeddings=1000, embedding_dim=8, feature_names=(f"f{n}",))
        for n in range(2)
    ]
    plan = Plan(default=OptEmbed(), budget="10%").resolve(tables)
    method = plan.methods["t0"]
    assert isinstance(method, OptEmbed)
    assert method.target_bytes == plan.footprint.serve_bytes == 6400
    assert method.first_method() == OptEmbed()
    assert [stage.name for stage in method.stages()] == ["supernet", "search", "retrain"]
    assert OptEmbed().footprint(tables).serve_bytes == 64_000
    with pytest.raises(ConfigError, match="target_bytes is 100, but 2 table"):
        OptEmbed(target_bytes=100).footprint(tables)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"prune": "columns"}, "prune must be one of both, rows, widths, got 'columns'"),
        ({"norm": 3}, "norm must be one of 1, 2, got 3"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"target_bytes": 0}, "target_bytes must be positive"),
        ({"width_grid": (0, 4)}, "expected a step or a list of widths above 0"),
        ({"generations": -1}, "generations must be at least 0"),
        ({"target_bytes": 10, "budget": "10%"}, "expected one of target_bytes, budget"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        OptEmbed(**settings)
