"""Pruning a search of DNIS: answers are kept, budgets are kept and used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from embcomp import (
    DNIS,
    Blocks,
    BudgetError,
    CompressedEmbeddingCollection,
    ConfigError,
    DNISSearch,
    Full,
)
from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.dnis.pruning import choose_columns, column_scores
from embcomp.backends.pruned_elements import least_element_bytes
from embcomp.collection.group_states import GroupState
from embcomp.tables.specs import TableSpec
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.dnis_cases import collection_of, holding, mixed_tables, searched, spec


@pytest.mark.parametrize("selection", ["free", "prefix"])
def test_blocks_answer_exactly_as_the_search_for_every_id(selection):
    tables = mixed_tables()
    collection = searched(tables, selection=selection)
    compacted = collection.compact()
    assert isinstance(compacted.states()[0].form.config, Blocks)
    there = embed_ids(compacted, tables)
    for key, rows in embed_ids(collection, tables).items():
        assert torch.equal(there[key], rows), key
    assert compacted.footprint.serve_bytes < collection.footprint.serve_bytes


def test_unpooled_blocks_answer_exactly_as_the_search_in_ragged_batches():
    tables = awkward_tables((8, 8, 8))
    form = searched(tables).states()[0].form
    outputs = []
    for each in (form, form.config.compact(collection_of(tables, Full()).plan.tables, form)):
        collection = CompressedEmbeddingCollection([t.unpooled() for t in tables], each.config)
        group = GroupState(tables=collection.plan.tables, form=each)
        collection.load_states([group])
        outputs.append(collection.eval()(random_batch(tables, seed=3)))
    for key, jagged in outputs[0].items():
        assert torch.equal(jagged.values(), outputs[1][key].values())


@pytest.mark.parametrize("structure", ["block", "element"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_pruned_tables_keep_what_they_keep_exactly_and_use_the_budget(structure, share):
    tables = mixed_tables()
    collection = searched(tables)
    form, specs = collection.states()[0].form, collection.plan.tables
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
    form, specs = collection.states()[0].form, collection.plan.tables
    initial = MethodState(
        config=Full(),
        tensors={f"rows.{t.name}": torch.rand(t.num_embeddings, t.embedding_dim) for t in specs},
    )
    past = StageInputs(before=form, initial=lambda: initial)
    budget = sum(table.full_bytes for table in specs) // 2
    fresh = collection_of(tables, Full())
    fresh.load_states([GroupState(tables=specs, form=initial)])
    for inherit, source in ((True, collection), (False, fresh)):
        method = DNIS(structure=structure, serve_bytes=budget, inherit=inherit)
        retrain = method.stages()[-1]
        assert retrain.reinit_network is not inherit
        began = embed_ids(holding(tables, method.start_stage(retrain, specs, past)), tables)
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
    counts = {"t0": 1 / torch.arange(1, 101)}
    chosen = choose_columns([table], scores, {"t0": (10,)}, 2 * 41 + 4 * 30 + 2, counts)
    assert chosen.cuts == {"t0": (10, 40)}
    assert chosen.kept["t0"].tolist() == [[True, True], [True, False], [False, False]]
    assert chosen.source == {"t0": [0, 1, 1]}


def test_a_column_is_worth_its_look_ups_so_that_cheap_blocks_of_rare_ids_come_last():
    table = TableSpec(name="t0", num_embeddings=10, embedding_dim=1, feature_names=("f0",))
    counts = {table.name: torch.tensor([100] * 8 + [1] * 2)}
    scores = {table.name: torch.tensor([[0.5], [1.0]], dtype=torch.float64)}
    chosen = choose_columns([table], scores, {table.name: (8,)}, 8 * 4 + 1, counts)
    assert chosen.kept[table.name].tolist() == [[True], [False]]


def test_scores_are_selection_times_root_mean_square():
    rows = torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 2.0]])
    selections = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    found = column_scores(spec(rows=3, dim=2), rows, selections, (2,), nested=False)
    wanted = torch.tensor([[12.5**0.5, 0.5], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    nested = column_scores(spec(rows=3, dim=2), rows, selections, (2,), nested=True)
    assert nested[1].tolist() == [0, 0]


@pytest.mark.parametrize("structure", ["block", "element"])
def test_searches_that_close_everything_leave_a_row_that_can_learn(structure):
    tables = plain_tables(4, rows=(60, 30))
    collection = collection_of(tables, DNISSearch())
    with torch.no_grad():
        for alpha in collection.combine.parameters():
            alpha.zero_()
    form = collection.states()[0].form
    method = DNIS(serve_bytes=600, structure=structure)
    pruned = holding(tables, method.pruned_form(collection.plan.tables, form))
    assert not any(bool(rows.any()) for rows in embed_ids(pruned, tables).values())
    assert 0 < pruned.footprint.serve_bytes <= 600


@pytest.mark.parametrize("structure", ["block", "element"])
def test_budgets_below_the_floor_are_refused_with_a_way_out(structure):
    tables = plain_tables(4, rows=(60, 30))
    collection = collection_of(tables, DNISSearch())
    form, specs = collection.states()[0].form, collection.plan.tables
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


def test_blocks_that_score_alike_share_columns_by_the_root_of_their_mean_look_ups():
    table = spec(rows=20, dim=8)
    counts = {"t0": torch.tensor([900] * 10 + [100] * 10)}
    scores = {"t0": torch.ones(2, 8, dtype=torch.float64)}
    chosen = choose_columns([table], scores, {"t0": (10,)}, 8 * 41, counts)
    assert chosen.kept["t0"].sum(1).tolist() == [6, 2]
