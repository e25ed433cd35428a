"""Mixed dimensions: widths that fall with a table's length, and what they are worth."""

from __future__ import annotations

import pytest
import torch

from embcomp import MDE, BudgetError, LowDim
from embcomp.tables.specs import TableSpec
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, auc, fit


def spec(rows, dim=16):
    return TableSpec(name=f"t{rows}", num_embeddings=rows, embedding_dim=dim, feature_names=("f",))


def test_widths_fall_with_a_power_of_the_number_of_rows():
    method = MDE(alpha=0.5, reference=100)
    rows = (40, 100, 400, 1_600, 10_000, 10**8)
    assert [method.width(spec(each)) for each in rows] == [16, 16, 8, 4, 2, 1]
    assert MDE(alpha=0.0).width(spec(10**8)) == 16
    assert [MDE(alpha=0.4, power_of_two=True).width(spec(n)) for n in (300, 3_000)] == [8, 4]


def test_a_table_that_its_matrix_would_not_pay_for_stays_full():
    method = MDE(alpha=1.0, reference=10)
    assert method.width(spec(12)) == 16 and method.keeps_full(
        spec(12)
    )  # 13 columns, 208 more weights
    assert not method.keeps_full(spec(40))


def test_the_matrices_are_within_the_budget_and_so_is_the_floor():
    tables = [spec(rows) for rows in (50, 1_000, 100_000)]
    full = sum(table.full_bytes for table in tables)
    for share in (10, 30, 70):
        method = MDE().fit_budget(tables, f"{share}%")
        size = method.footprint(tables).serve_bytes
        weights = sum(t.num_embeddings * method.width(t) for t in tables)
        matrices = sum(method.width(t) * 16 for t in tables if not method.keeps_full(t))
        assert size == 4 * (weights + matrices) <= full * share // 100
    with pytest.raises(BudgetError, match="mde: 3 table"):
        MDE().fit_budget(tables, "6%")


def test_it_beats_one_width_in_no_more_bytes_where_short_tables_need_the_columns():
    """The first two features interact through ten columns, the long ones need one each."""
    planted = plant(num_values=(60, 60, 600, 600), rank=10, seed=1)
    scores, sizes = {}, {}
    for method in (LowDim(width=3), MDE(alpha=1.3, reference=60)):
        torch.manual_seed(0)
        model = Clicks(planted, method, 16)
        fit(model, planted, epochs=2)
        scores[method.name] = auc(model, planted)
        sizes[method.name] = model.tables.footprint.serve_bytes
    assert sizes["mde"] < 0.8 * sizes["low_dim"]
    assert scores["mde"] > scores["low_dim"] + 0.005
