"""Columns by frequency block: blocks keep answers, searches keep bounds, budgets are used and kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import (
    DNIS,
    Blocks,
    BudgetError,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    ConfigError,
    DNISSearch,
    Full,
    Sparse,
)
from embcomp.backends.dnis_elements import largest, least_element_bytes
from embcomp.backends.dnis_optimizer import SelectionSGD, normalized
from embcomp.backends.dnis_pruning import choose_columns, column_scores
from embcomp.config import parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.toy import write_toy_dataset
from embcomp.forms import GroupForm
from embcomp.frequency import traffic_cuts
from embcomp.stages import Form, Past
from embcomp.tables import TableSpec
from embcomp.testing.cases import embed_ids
from embcomp.testing.data import awkward_tables, batch_of, plain_tables, random_batch
from embcomp.training import load_model, train
from embcomp.training.checkpoint import saved_steps
from embcomp.training.life import Life
from embcomp.training.loading import load_unsharded
from embcomp.training.run_folder import RunFolder
from tests.joined_batches import batches_of_ranks
from tests.training_cases import train_on_ranks

CUTS = {"t0": (5, 20), "t1": (30,), "t2": (10, 11, 40)}


def spec(name="t0", rows=60, dim=8):
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=(name.replace("t", "f"),)
    )


def mixed_tables():
    """Tables of two widths, so that their selections are grouped and put back in order."""
    return [replace(table, dim=dim) for table, dim in zip(plain_tables(), (8, 4, 8))]


def collection_of(tables, plan):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection([t.bag() for t in tables], plan).eval()


def holding(tables, form):
    """A collection in a form, filled with its tensors."""
    collection = collection_of(tables, form.config)
    group = GroupForm(tables=collection.plan.tables, form=form)
    collection.load_forms([group])
    return collection


def searched(tables, **options):
    """A search form with random selections, a third of them closed."""
    collection = collection_of(tables, DNISSearch(cuts=CUTS, **options))
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for alpha in collection.combine.parameters():
            alpha.copy_((torch.rand(alpha.shape, generator=random) * 1.5 - 0.5).clamp(0, 1))
    return collection


# --- the serving form


def test_ids_find_their_block_and_their_columns():
    tables = plain_tables(4, rows=(6, 3))
    config = Blocks(widths={"t0": (2, 0, 3), "t1": (4,)}, cuts={"t0": (2, 3)})
    collection = collection_of(tables, config)
    first = torch.arange(1.0, 5).view(2, 2)
    last = torch.arange(5.0, 14).view(3, 3)
    form = Form(
        config=config,
        tensors={
            "rows.t0__block_0": first,
            "rows.t0__block_2": last,
            "combine.columns": torch.tensor([3, 1, 0, 1, 2, 0, 1, 2, 3], dtype=torch.uint8),
        },
    )
    collection.load_forms([GroupForm(tables=collection.plan.tables, form=form)])
    wanted = torch.zeros(6, 4)
    wanted[:2, [3, 1]] = first
    wanted[3:, :3] = last
    assert torch.equal(embed_ids(collection, tables)["f0"], wanted)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_id_is_looked_up_once_or_not_at_all(ragged):
    tables = plain_tables(4, rows=(60, 30))
    widths = {"t0": (4, 0, 1), "t1": (2, 3)}
    collection = collection_of(tables, Blocks(widths=widths, cuts={"t0": (5, 20), "t1": (7,)}))
    bags = {"f0": [[id_] for id_ in range(30)], "f1": [[id_] for id_ in range(30)]}
    if ragged:
        bags["f0"] = [[], list(range(30)), *[[]] * 28]
    routed, _, _ = collection.route(batch_of(bags))
    counts = {key: jagged.values().tolist() for key, jagged in routed.to_dict().items()}
    assert counts == {
        "t0/f0#0": list(range(5)),
        "t0/f0#2": list(range(10)),
        "t1/f1#0": list(range(7)),
        "t1/f1#1": list(range(23)),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": {"t0": (4, 4)}}, "has 1 block"),
        ({"widths": {"t0": (4, -1)}, "cuts": {"t0": (3,)}}, "at least 0"),
        ({"widths": {"t0": (4, 4)}, "cuts": {"t0": (0,)}}, "must rise strictly"),
        ({"widths": {"t0": (4, 4, 4)}, "cuts": {"t0": (5, 5)}}, "must rise strictly"),
        ({"widths": {"t0": (4, 4)}, "cuts": {"t0": (60,)}}, "less than its 60 rows"),
        ({"widths": {"other": (4,)}}, "say nothing of table 't0'"),
        ({"widths": {"t0": (0,)}}, "leave at least one"),
    ],
)
def test_blocks_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        collection_of(plain_tables(4, rows=(60,)), Blocks(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t0": -1}, "at least 0"),
        ({"other": 4}, "say nothing of table 't0'"),
        ({"t0": 0}, "leave at least one"),
    ],
)
def test_sparse_rows_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        collection_of(plain_tables(4, rows=(60,)), Sparse(nonzeros=settings))


# --- blocks by traffic


def test_blocks_end_where_their_share_of_the_traffic_is_reached():
    counts = torch.tensor([50, 20, 10, 10, 5, 3, 1, 1])
    assert traffic_cuts(8, counts, (0.5, 0.7, 0.9)) == (1, 2, 4)
    assert traffic_cuts(8, torch.zeros(8), (0.5,)) == traffic_cuts(8, None, (0.5,))
    assert traffic_cuts(1) == ()


def test_uncounted_ids_follow_zipfs_law():
    zipf = 1 / torch.arange(1, 10_001, dtype=torch.float64)
    for found, counted in zip(traffic_cuts(10_000), traffic_cuts(10_000, zipf)):
        assert found == pytest.approx(counted, rel=0.02, abs=1)


# --- the search


def test_normalized_gradients_have_a_mean_size_of_one_for_each_block():
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 16, generator=random) * torch.tensor([1e3, 1, 1e-3, 1e-5, 0])[:, None]
    sizes = normalized(gradient).abs().mean(1)
    torch.testing.assert_close(sizes, torch.tensor([1.0, 1, 1, 1, 0]), rtol=2e-3, atol=0)
    assert torch.equal(normalized(gradient).sign(), gradient.sign())


def test_selections_stay_between_0_and_1_and_move_by_the_learning_rate():
    random = torch.Generator().manual_seed(0)
    alpha = torch.nn.Parameter(torch.full((3, 8), 0.5))
    optimizer = SelectionSGD([alpha], lr=0.1, decay=1.0)
    for step in range(40):
        before = alpha.detach().clone()
        alpha.grad = torch.randn(3, 8, generator=random) + 0.5
        optimizer.step()
        assert 0 <= alpha.min() <= alpha.max() <= 1
        if step < 2:
            moved = (before - alpha.detach()).abs().mean(1)
            torch.testing.assert_close(moved, torch.full((3,), 0.1 / (1 + step)))
    before = alpha.detach().clone()
    alpha.grad = None
    optimizer.step()
    assert torch.equal(alpha, before)


def test_rows_are_multiplied_by_the_selection_of_their_block():
    tables = mixed_tables()
    collection = searched(tables)
    found, form = embed_ids(collection, tables), collection.forms()[0].form
    selections = form.config.selections(collection.plan.tables, form)
    for table in tables:
        block = sum((torch.arange(table.rows) >= cut).long() for cut in CUTS[table.name])
        wanted = form.rows(table.name) * selections[table.name][block]
        assert torch.equal(found[table.features[0]], wanted)


def test_a_prefix_selects_whole_columns_a_part_and_nothing():
    tables = plain_tables(4, rows=(60,))
    collection = collection_of(tables, DNISSearch(cuts={"t0": (10,)}, selection="prefix"))
    with torch.no_grad():
        next(collection.combine.parameters()).copy_(torch.tensor([[1.0], [0.625]]))
    rows = collection.forms()[0].form.rows("t0")
    found = embed_ids(collection, tables)["f0"]
    assert torch.equal(found[:10], rows[:10])
    assert torch.equal(found[10:], rows[10:] * torch.tensor([1, 1, 0.5, 0]))


def test_the_penalty_is_the_sum_of_what_rows_are_multiplied_by():
    tables = awkward_tables((8, 4, 8))
    collection = searched(tables, l1=0.25).train()
    collection(random_batch(tables, seed=0))
    total = sum(alpha.sum() for alpha in collection.combine.parameters())
    torch.testing.assert_close(collection.penalty(), 0.25 * total)
    collection.eval()(random_batch(tables, seed=0))
    assert collection.penalty() is None


def test_the_penalty_rests_while_what_is_selected_fits():
    tables = awkward_tables((8, 4, 8))
    form = searched(tables).forms()[0].form
    specs = collection_of(tables, Full()).plan.tables
    taken = form.config.compact(specs, form).config.footprint(specs).serve_bytes
    for budget, rests in ((taken, True), (taken - 1, False)):
        collection = searched(tables, l1=0.25, serve_bytes=budget).train()
        collection(random_batch(tables, seed=0))
        assert bool(collection.penalty() == 0) is rests


# --- pruning


@pytest.mark.parametrize("selection", ["free", "prefix"])
def test_blocks_answer_exactly_as_the_search_for_every_id(selection):
    tables = mixed_tables()
    collection = searched(tables, selection=selection)
    compacted = collection.compact()
    assert isinstance(compacted.forms()[0].form.config, Blocks)
    there = embed_ids(compacted, tables)
    for key, rows in embed_ids(collection, tables).items():
        assert torch.equal(there[key], rows), key
    assert compacted.footprint.serve_bytes < collection.footprint.serve_bytes


def test_unpooled_blocks_answer_exactly_as_the_search_in_ragged_batches():
    tables = awkward_tables((8, 8, 8))
    form = searched(tables).forms()[0].form
    outputs = []
    for each in (form, form.config.compact(collection_of(tables, Full()).plan.tables, form)):
        collection = CompressedEmbeddingCollection([t.unpooled() for t in tables], each.config)
        group = GroupForm(tables=collection.plan.tables, form=each)
        collection.load_forms([group])
        outputs.append(collection.eval()(random_batch(tables, seed=3)))
    for key, jagged in outputs[0].items():
        assert torch.equal(jagged.values(), outputs[1][key].values())


@pytest.mark.parametrize("structure", ["block", "element"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_pruned_tables_keep_what_they_keep_exactly_and_use_the_budget(structure, share):
    tables = mixed_tables()
    collection = searched(tables)
    form, specs = collection.forms()[0].form, collection.plan.tables
    budget = int(share * sum(table.full_bytes for table in specs))
    method = DNIS(structure=structure, serve_bytes=budget)
    pruned = holding(tables, method.pruned_form(specs, form))
    size = pruned.footprint.serve_bytes
    assert size == sum(t.numel() * t.element_size() for t in pruned.serving_tensors().values())
    closed = all(
        bool(((there == 0) == (rows == 0)).all())
        for there, rows in zip(
            embed_ids(pruned, tables).values(), embed_ids(collection, tables).values()
        )
    )
    assert closed or 0.98 * budget <= size
    assert size <= budget
    for key, rows in embed_ids(collection, tables).items():
        there = embed_ids(pruned, tables)[key]
        assert torch.equal(there, torch.where(there != 0, rows, 0.0)), key


@pytest.mark.parametrize("structure", ["block", "element"])
def test_retraining_begins_from_initial_weights_where_none_are_inherited(structure):
    tables = mixed_tables()
    collection = searched(tables)
    form, specs = collection.forms()[0].form, collection.plan.tables
    initial = Form(
        config=Full(),
        tensors={f"rows.{t.name}": torch.rand(t.num_embeddings, t.embedding_dim) for t in specs},
    )
    past = Past(before=form, initial=lambda: initial)
    budget = sum(table.full_bytes for table in specs) // 2
    fresh = collection_of(tables, Full())
    fresh.load_forms([GroupForm(tables=specs, form=initial)])
    for inherit, source in ((True, collection), (False, fresh)):
        method = DNIS(structure=structure, serve_bytes=budget, inherit=inherit)
        retrain = method.stages()[-1]
        assert retrain.restarts is not inherit
        began = embed_ids(holding(tables, method.begin(retrain, specs, past)), tables)
        for key, rows in embed_ids(source, tables).items():
            assert torch.equal(began[key], torch.where(began[key] != 0, rows, 0.0)), key
        kept = {key: there != 0 for key, there in began.items()}
        if inherit:
            inherited = kept
    for key, there in kept.items():
        assert torch.equal(there, inherited[key]), key


@st.composite
def scored_tables(draw):
    tables, cuts, scores = [], {}, {}
    for n in range(draw(st.integers(1, 3))):
        rows, dim = draw(st.integers(1, 300)), draw(st.sampled_from([1, 3, 8]))
        table = spec(f"t{n}", rows, dim)
        own = draw(st.sets(st.integers(1, rows - 1), max_size=4)) if rows > 1 else set()
        cuts[table.name] = tuple(sorted(own))
        values = st.floats(0, 4).map(lambda value: value if value > 0.5 else 0.0)
        row = st.lists(values, min_size=dim, max_size=dim)
        wanted = len(own) + 1
        scores[table.name] = torch.tensor(
            draw(st.lists(row, min_size=wanted, max_size=wanted)), dtype=torch.float64
        )
        tables.append(table)
    full = sum(table.full_bytes for table in tables)
    return tables, cuts, scores, draw(st.integers(5, full + 200))


@given(scored_tables())
@settings(max_examples=150, deadline=None)
def test_chosen_columns_stay_within_any_budget_and_use_it(drawn):
    tables, cuts, scores, budget = drawn
    chosen = choose_columns(tables, scores, cuts, budget)
    size = 0
    for table in tables:
        bounds = [0, *chosen.cuts[table.name], table.num_embeddings]
        kept = chosen.kept[table.name].sum(1).tolist()
        size += sum(4 * (high - low) * k + k for low, high, k in zip(bounds, bounds[1:], kept))
    assert size <= budget
    config = Blocks(
        widths={t.name: chosen.kept[t.name].sum(1).tolist() for t in tables}, cuts=chosen.cuts
    )
    assert config.footprint(tables).serve_bytes == size
    wanted = sum(int((score > 0).sum()) for score in scores.values())
    left_out = wanted and any(
        bool((scores[t.name] > 0)[chosen.source[t.name]].gt(chosen.kept[t.name]).any())
        for t in tables
    )
    # A column is given to single rows, which cost 4 bytes and, once, a list of up to 9 columns.
    assert not left_out or budget - size < 4 + 9
    assert not left_out or budget < 650 or size >= 0.98 * budget


def test_a_column_that_no_longer_fits_goes_to_the_most_frequent_ids():
    table = spec(rows=100, dim=2)
    scores = {"t0": torch.tensor([[4.0, 3.0], [2.0, 0.0]], dtype=torch.float64)}
    chosen = choose_columns([table], scores, {"t0": (10,)}, 2 * 41 + 4 * 30 + 2)
    assert chosen.cuts == {"t0": (10, 40)}
    assert chosen.kept["t0"].tolist() == [[True, True], [True, False], [False, False]]
    assert chosen.source == {"t0": [0, 1, 1]}


def test_scores_are_selection_times_root_mean_square():
    rows = torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 2.0]])
    selections = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    found = column_scores(spec(rows=3, dim=2), rows, selections, (2,), nested=False)
    wanted = torch.tensor([[12.5**0.5, 0.5], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    nested = column_scores(spec(rows=3, dim=2), rows, selections, (2,), nested=True)
    assert nested[1].tolist() == [0, 0]


def test_the_largest_elements_are_kept_and_ties_go_to_the_first():
    values = torch.tensor([0.0, 2.0, 1.0, 1.0, 3.0, 1.0, 0.0])
    assert largest(values, 3).nonzero().flatten().tolist() == [1, 2, 4]
    assert largest(values, 7).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("structure", ["block", "element"])
def test_searches_that_close_everything_leave_a_row_that_can_learn(structure):
    tables = plain_tables(4, rows=(60, 30))
    collection = collection_of(tables, DNISSearch())
    with torch.no_grad():
        for alpha in collection.combine.parameters():
            alpha.zero_()
    form = collection.forms()[0].form
    method = DNIS(serve_bytes=600, structure=structure)
    pruned = holding(tables, method.pruned_form(collection.plan.tables, form))
    assert not any(bool(rows.any()) for rows in embed_ids(pruned, tables).values())
    assert 0 < pruned.footprint.serve_bytes <= 600


@pytest.mark.parametrize("structure", ["block", "element"])
def test_budgets_below_the_floor_are_refused_with_a_way_out(structure):
    tables = plain_tables(4, rows=(60, 30))
    collection = collection_of(tables, DNISSearch())
    form, specs = collection.forms()[0].form, collection.plan.tables
    floor = least_element_bytes(specs) if structure == "element" else 5
    with pytest.raises(BudgetError, match="Raise the budget"):
        DNIS(serve_bytes=floor - 1, structure=structure).pruned_form(specs, form)
    least = holding(tables, DNIS(serve_bytes=floor, structure=structure).pruned_form(specs, form))
    assert least.footprint.serve_bytes <= floor


def test_unpruned_tables_are_not_passed_off_as_compressed():
    tables = plain_tables(8)
    collection = collection_of(tables, DNIS(budget="20%"))
    with pytest.raises(ConfigError, match="have not been pruned"):
        collection.serving_tensors()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantiles": (0.5, 0.5)}, "rise strictly"),
        ({"quantiles": (0.5, 1.0)}, "rise strictly"),
        ({"selection": "suffix"}, "free, prefix"),
        ({"structure": "rows"}, "block, element"),
        ({"l1": -1.0}, "l1 must be at least 0"),
        ({"search_epochs": 0}, "search_epochs must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"serve_bytes": 0}, "serve_bytes must be positive"),
        ({"cuts": {"t0": (4, 2)}}, "must rise strictly"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DNIS(**settings)


def test_cuts_of_a_table_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="cuts name other, which this method does not hold"):
        collection_of(plain_tables(4), DNIS(budget="20%", cuts={"other": (3,)}))


def test_a_search_begins_with_the_weights_that_it_was_given_and_blocks_by_count():
    tables = plain_tables(4, rows=(60, 30, 20))
    collection = collection_of(tables, Full())
    specs, full = collection.plan.tables, collection.forms()[0].form
    method = DNIS(serve_bytes=200, quantiles=(0.5,), cuts={"t1": (7,), "t2": ()})
    past = Past(
        before=full,
        initial=lambda: full,
        counts={"t0": torch.cat([torch.full((6,), 10), torch.full((54,), 1)])},
    )
    form = method.begin(method.stages()[1], specs, past)
    assert form.config.cuts == {"t0": (6,), "t1": (7,), "t2": ()}
    there = embed_ids(holding(tables, form), tables)
    for key, rows in embed_ids(collection, tables).items():
        assert torch.equal(there[key], rows)


# --- training


def planted(folder, rows=(3000, 500, 500), seed=0):
    """Clicks that follow feature C1 where its value is frequent, and nothing where it is rare."""
    write_toy_dataset(folder, rows=rows, num_values=(400, 5), num_numeric=1)
    random = np.random.default_rng(seed)
    effect = random.choice([-2.5, 2.5], size=402)
    effect[20:] = 0
    for path in sorted(folder.glob("*/part-*.parquet")):
        table = pq.read_table(path)
        chance = 1 / (1 + np.exp(-effect[table["C1"].to_numpy()]))
        labels = (random.random(len(table)) < chance).astype(np.float32)
        place = table.column_names.index("label")
        pq.write_table(table.set_column(place, "label", pa.array(labels)), path)
    return folder


def planted_config(dataset, **method):
    return parse_config(
        {
            "name": "planted",
            "data": {"path": str(dataset), "batch_size": 64, "search_share": 0.3},
            "tables": {"embedding_dim": 8, "method": {"name": "dnis", **method}, "budget": "15%"},
            "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
            "train": {"dense_optimizer": {"learning_rate": 0.01}, "epochs": 2},
        }
    )


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_rare_ids_get_fewer_columns_than_frequent_ones(tmp_path):
    dataset = planted(tmp_path / "data")
    config = planted_config(dataset, quantiles=[0.6, 0.8], learning_rate=0.03, l1=1e-4)
    report = train(config, runs=tmp_path, quiet=True)
    assert report.test["auc"] > 0.6
    info, folder = DatasetInfo.load(dataset), RunFolder(tmp_path / "planted")
    life = Life.of(config, info)
    place = folder.stage(1, life.names)
    step = saved_steps(place.checkpoints)[-1]
    tables = load_unsharded(config, info, life, folder, 1, step).tables
    form = tables.forms()[0].form
    selections = form.config.selections(life.tables, form)["C1"]
    assert 0 <= selections.min() <= selections.max() <= 1
    selections = selections.mean(1)
    assert selections[0] > selections[-1] + 0.2
    kept = load_model(tmp_path / "planted").tables.forms()[0].form.config
    assert kept.widths["C1"][0] > kept.widths["C1"][-1]


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_four_ranks_search_and_prune_as_one_process_does(workers, tmp_path):
    dataset = write_toy_dataset(tmp_path / "data", rows=(192, 64, 64), multi_valued=["C2"]).folder
    config = planted_config(dataset, structure="element", learning_rate=0.1)
    config = parse_config(
        config.model_dump(mode="json"),
        ["tables.budget=60%", "tables.embedding_dim=4", "train.epochs=1", "data.drop_last=true"],
    )
    with batches_of_ranks(4):
        train(config, runs=tmp_path / "one", quiet=True)
    workers.run(4, train_on_ranks, config, tmp_path / "many")
    one, many = (load_model(tmp_path / way / "planted").state_dict() for way in ("one", "many"))
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_column_is_worth_its_look_ups_so_that_cheap_blocks_of_rare_ids_come_last():
    table = TableSpec(name="t0", num_embeddings=10, embedding_dim=1, feature_names=("f0",))
    counts = {table.name: torch.tensor([100] * 8 + [1] * 2)}
    scores = {table.name: torch.tensor([[0.5], [1.0]], dtype=torch.float64)}
    chosen = choose_columns([table], scores, {table.name: (8,)}, 8 * 4 + 1, counts)
    assert chosen.kept[table.name].tolist() == [[True], [False]]
