"""What callers ask a method, in place of looking at its class."""

from __future__ import annotations

import math

import pytest
import torch

from embcomp.backends import LR2VQ, PQ, QR, Blocks, Full, Hash, LowDim, Sparse, Unified
from embcomp.backends.base import MethodState
from embcomp.collection.plan import Plan
from embcomp.errors import ConfigError
from embcomp.layers.pruned_route import pack
from embcomp.layers.row_sources import as_rows
from embcomp.planning.config_plan import plan_lines
from embcomp.tables.specs import TableSpec
from tests.helpers.backends_under_test import CASES

TABLES = [
    TableSpec(name=f"t{n}", num_embeddings=rows, embedding_dim=16, feature_names=(f"f{n}",))
    for n, rows in enumerate((60, 90, 75))
]
APART = {
    "adapt",
    "blocks",
    "cafe",
    "cce",
    "dhe",
    "double_hash",
    "dedup",
    "typed_blocks",
    "full",
    "hash",
    "alpt",
    "int16",
    "int8",
    "low_dim",
    "mapped",
    "mde",
    "mlet",
    "qr",
    "sparse",
    "tt",
}


@pytest.mark.parametrize("case", CASES)
def test_whether_tables_are_stored_together_is_one_answer(case):
    """Also for methods with settings of single tables, and those that cannot hold one alone."""
    method = CASES[case].config
    assert method.stores_together(TABLES) == (method.name not in APART)
    assert not method.stores_together(TABLES[1:2])


def test_tables_beside_a_shared_store_are_not_in_it():
    method = Unified(num_buckets=20, collisionless=70)  # which keeps the smallest table full
    assert method.stores_together(TABLES)
    assert not method.stores_together(TABLES[:2])


def test_a_plan_counts_tables_in_a_store_that_none_could_fill_alone():
    method = Unified(num_buckets=50, num_chunks=1, num_tables=3)
    (line,) = plan_lines(Plan(default=method).resolve(TABLES), "sgd")
    stores = len(method.physical_tables(TABLES))
    assert stores > 1
    assert line.tables == tuple(TABLES) and line.serve == stores * 50 * 16 * 4


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        (
            Sparse(nonzeros={"t0": 0, "t1": 40, "t2": 9}),
            [0, 40 * 5 + 91 * 4, 9 * 5 + 76 * 4],
        ),
        (
            Blocks(widths={"t0": (0,), "t1": (4,), "t2": (3,)}),
            [0, 90 * 4 * 4 + 4, 75 * 3 * 4 + 3],
        ),
    ],
)
def test_a_table_of_which_nothing_is_stored_has_a_line_of_no_bytes(method, sizes):
    lines = plan_lines(Plan(default=method).resolve(TABLES), "sgd")
    assert [line.serve for line in lines] == sizes
    assert lines[0].compression == math.inf
    assert sum(line.serve for line in lines) == method.footprint(TABLES).serve_bytes


def test_settings_of_other_tables_are_left_out():
    method = LowDim(width=3, widths={"t0": 5, "t1": 4}, kept={"t1": 7})
    assert method.for_tables(TABLES[:1]) == LowDim(width=3, widths={"t0": 5})
    assert method.for_tables(TABLES) is method
    blocks = Blocks(widths={"t0": (4, 2), "t1": (3,)}, cuts={"t0": (9,)})
    assert blocks.for_tables(TABLES[1:]) == Blocks(widths={"t1": (3,)}, cuts={})


def test_columns_and_pruning_are_told_table_by_table():
    method = LowDim(width=9, widths={"t0": 7}, kept={"t1": 50, "t2": 75})
    assert [method.columns(table) for table in TABLES] == [7, 9, 9]
    assert [method.is_pruned(table) for table in TABLES] == [False, True, False]
    assert [Full().columns(table) for table in TABLES] == [16, 16, 16]
    assert [QR(divisor=9).columns(table) for table in TABLES] == [None] * 3


def test_only_the_full_table_does_not_compress():
    assert {case.config.name for case in CASES.values() if not case.config.compresses} == {"full"}


def test_a_method_without_movable_rows_or_widths_refuses_by_name():
    method = Hash(num_buckets=10)
    with pytest.raises(ConfigError, match="hash: the rows of t0, t1, t2 follow from their ids"):
        method.rows_by_id(TABLES, MethodState(config=method))
    with pytest.raises(ConfigError, match="hash: t1 cannot be stored as rows of so many columns"):
        method.with_widths({"t1": 4})


def test_pruned_tables_say_which_row_an_id_has_and_what_holds_the_rest():
    method = LowDim(width=9, kept={"t1": 2})
    kept = torch.zeros(90, dtype=torch.bool)
    kept[[3, 64]] = True
    packed = dict(zip(("route.words", "route.counts"), pack(kept)))
    found = method.rows_by_id(TABLES, MethodState(config=method, tensors=packed))
    places = {name: as_rows(each).whole() for name, each in found.items()}
    assert places["t1"][kept].tolist() == [0, 1] and set(places["t1"][~kept].tolist()) == {2}
    assert torch.equal(places["t0"], torch.arange(60))
    assert method.without_pruning(TABLES) == LowDim(widths={"t0": 9, "t1": 9, "t2": 9})


@pytest.mark.parametrize(
    ("codebooks", "count"), [("all", 8), ("position", 4 * 8), ("table", 4 * 8)]
)
def test_codewords_within_reach_of_a_tables_ids(codebooks, count):
    for kind in (PQ, LR2VQ):
        method = kind(subvector_dim=4, num_codewords=8, codebooks=codebooks)
        assert [method.codeword_count(table, TABLES) for table in TABLES] == [count] * 3
    assert Hash(num_buckets=10).codeword_count(TABLES[0], TABLES) is None
