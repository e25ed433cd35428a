"""Blocks of ids with row types of their own: chosen well, stored exactly, better than one type for all."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from embcomp import BudgetError, ConfigError, Full, Plan, TypedBlocks, compress_, load, save
from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.row_type_choice import TypedBlock, choose_types
from embcomp.backends.typed_blocks import _rounded
from embcomp.layers.row_sources import MemoryRows
from embcomp.tables.row_formats import ROW_TYPES, row_bytes
from embcomp.tables.specs import TableSpec
from embcomp.testing.cases import BackendCase, embed_ids, pooled
from embcomp.testing.check_data import plain_tables, random_batch

TABLES = plain_tables(16, rows=(2000, 1000))
SPECS = [
    TableSpec(name=f"t{n}", num_embeddings=rows, embedding_dim=16, feature_names=(f"f{n}",))
    for n, rows in enumerate((2000, 1000))
]
COUNTS = {spec.name: 10_000 // torch.arange(1, spec.num_embeddings + 1) for spec in SPECS}


def trained(seed=0):
    """Full tables, whose rows are as much longer as they are more frequent, as trained ones are."""
    collection = pooled(BackendCase(config=Full()), TABLES, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in TABLES:
            weight = collection.rows.embedding_bags[table.name].weight
            ranks = torch.arange(1, len(weight) + 1)[:, None]
            weight.copy_(torch.randn(weight.shape, generator=random) * ranks**-0.5)
    return collection


def compressed(budget, full):
    model = torch.nn.Sequential(full)
    compress_(model, TypedBlocks(budget=budget), counts=COUNTS)
    return model[0]


def weighted_error(found, wanted):
    there, before = embed_ids(found, TABLES), embed_ids(wanted, TABLES)
    return sum(
        float(
            (there[f"f{n}"] - before[f"f{n}"]).double().square().sum(1) @ COUNTS[f"t{n}"].double()
        )
        for n in range(len(TABLES))
    )


def test_types_are_the_best_of_all_within_their_bytes_and_only_grow():
    random = torch.Generator().manual_seed(1)
    blocks = [
        TypedBlock(
            table="t",
            index=n,
            rows=int(torch.randint(5, 500, (1,), generator=random)),
            width=16,
            errors=dict(
                zip(
                    ROW_TYPES, (0.0, *(torch.rand(3, generator=random).sort().values * 10).tolist())
                )
            ),
        )
        for n in range(4)
    ]
    size = lambda kinds: sum(b.bytes_as(kind) for b, kind in zip(blocks, kinds))
    error = lambda kinds: sum(b.errors[kind] for b, kind in zip(blocks, kinds))
    every = list(itertools.product(ROW_TYPES, repeat=4))
    floor, whole = min(map(size, every)), max(map(size, every))
    before = 0
    for budget in range(floor, whole + 1, (whole - floor) // 40):
        chosen = choose_types(blocks, budget)
        assert chosen is not None and before <= size(chosen) <= budget
        before = size(chosen)
        best = min(error(kinds) for kinds in every if size(kinds) <= before)
        assert error(chosen) == pytest.approx(best)
    assert choose_types(blocks, floor - 1) is None
    assert choose_types(blocks, whole) == ["fp32"] * 4


@pytest.mark.parametrize("row_type", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("dim", [2, 7, 16])
def test_rounded_rows_are_rounded_to_themselves(row_type, dim):
    random = torch.Generator().manual_seed(dim)
    lengths = 10 ** torch.linspace(-3, 2, 4000)[:, None]
    rows = torch.randn(4000, dim, generator=random) * lengths + 0.3
    once = _rounded(MemoryRows(rows), row_type).whole()
    torch.testing.assert_close(
        _rounded(MemoryRows(once), row_type).whole(), once, rtol=1e-6, atol=1e-6
    )
    assert not torch.equal(once, rows)


@pytest.mark.parametrize(("uniform", "bytes_a_row"), [("int8", 20), ("int4", 16)])
def test_types_by_frequency_beat_one_type_at_equal_bytes(uniform, bytes_a_row):
    """Of int8 rows; and where a budget lies between two types, of which one for all can use the shorter alone."""
    full = trained()
    assert row_bytes(16, uniform) <= bytes_a_row < row_bytes(16, uniform) + 8
    budget = 3000 * bytes_a_row + 200  # and what says which columns blocks keep
    found = compressed(budget, trained())
    assert found.footprint.serve_bytes <= budget
    method = found.plan.methods["t0"]
    assert len({kind for kinds in method.types.values() for kind in kinds}) > 1
    for kinds in method.types.values():  # frequent ids at least as exact as rare ones
        order = [ROW_TYPES.index(kind) for kind in kinds]
        assert order == sorted(order)
    one_type = TypedBlocks(types={t.name: (uniform,) for t in TABLES})
    other = torch.nn.Sequential(trained())
    compress_(other, one_type, counts=COUNTS)
    typed, plain = weighted_error(found, full), weighted_error(other[0], full)
    assert typed < plain / 3, (typed, plain)


def test_an_artefact_has_what_the_model_says_in_the_bytes_predicted(tmp_path):
    found = compressed("30%", trained())
    written = save(found, tmp_path / "a", row_type="int4")  # types that are chosen stay
    served = load(tmp_path / "a")
    batch = random_batch(TABLES, seed=1, batch_size=300)
    wanted = found(batch).values()
    torch.testing.assert_close(served(batch).values(), wanted, rtol=1e-5, atol=2e-6)
    method = found.plan.methods["t0"]
    types = written.config.tables.row_types
    for table, kinds in method.types.items():
        assert [types[f"{table}__block_{n}"] for n in range(len(kinds))] == list(kinds)
    tensors = found.serving_tensors().values()
    assert sum(t.numel() * t.element_size() for t in tensors) == found.footprint.serve_bytes
    assert found.footprint.serve_bytes <= 3000 * 64 * 0.3


def test_a_plan_knows_types_before_there_are_rows():
    plans = [Plan(default=TypedBlocks(budget=b)).resolve(SPECS) for b in ("20%", "40%", "90%")]
    sizes = [plan.footprint.serve_bytes for plan in plans]
    assert sizes == sorted(sizes) and sizes[2] <= 0.9 * 3000 * 64
    with pytest.raises(BudgetError, match="the smallest typed_blocks reaches"):
        Plan(default=TypedBlocks(budget="10%")).resolve(SPECS)


def test_errors_are_measured_by_block_and_weighted_by_counts():
    method = TypedBlocks(cuts={"t1": (300,)})
    rows = torch.randn(1000, 16)
    rows[300:] *= 100
    before = MethodState.of(Full(), {"rows.t1": rows})
    past = StageInputs(before=before, initial=lambda: before, counts={"t1": COUNTS["t1"]})
    errors = method._errors([SPECS[1]], past)
    assert errors["t1", 0]["fp32"] == 0 < errors["t1", 0]["fp16"] < errors["t1", 0]["int8"]
    assert errors["t1", 1]["int4"] > 1000 * errors["t1", 1]["fp16"] > 0
    twice = replace(past, counts={"t1": COUNTS["t1"] * 2})
    doubled = method._errors([SPECS[1]], twice)
    assert doubled["t1", 0]["int8"] == pytest.approx(2 * errors["t1", 0]["int8"])


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"table 't0' has 2 block\(s\), so types must be as many"):
        TypedBlocks(types={"t0": ("int8",)}, cuts={"t0": (5,)})
    with pytest.raises(ConfigError, match="got 'int3'"):
        TypedBlocks(types={"t0": ("int3",)})
    with pytest.raises(ConfigError, match="quantiles must rise"):
        TypedBlocks(quantiles=(0.9, 0.5))
    unranked = {name: own.flip(0) for name, own in COUNTS.items()}
    with pytest.raises(ConfigError, match="typed_blocks: ids of table 't0' are not ranked"):
        compress_(torch.nn.Sequential(trained()), TypedBlocks(budget="30%"), counts=unranked)
