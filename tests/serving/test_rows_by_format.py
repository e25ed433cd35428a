"""Rows of other devices, tried on the CPU: the same answers, in operations that features do not add to."""

from __future__ import annotations

import pytest
import torch

from embcomp import load, save
from embcomp.serving import modules
from embcomp.serving.rows_by_format import RowsByFormat
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES
from tests.helpers.dispatched import Dispatched

STEADY = ("full", "hash", "low_rank", "unified", "low_dim")
"""Methods whose routes and combinations take all features at once."""


@pytest.fixture
def joined(monkeypatch):
    """Loads as for a device that is not the CPU."""

    def load_joined(path):
        monkeypatch.setattr(modules, "TorchRows", RowsByFormat)
        serving = load(path, rows="torch")
        monkeypatch.undo()
        held = [part for part in (serving.rows, serving.unpooled_rows) if part is not None]
        assert held and all(isinstance(part, RowsByFormat) for part in held)
        return serving

    return load_joined


@pytest.mark.parametrize("case", sorted(CASES))
def test_joined_rows_answer_as_separate_ones(case, tmp_path, joined):
    tables = awkward_tables((16, 6, 3))
    row_type = ROW_TYPES[sorted(CASES).index(case) % 4]
    save(pooled(CASES[case], tables), tmp_path / "a", row_type=row_type)
    serving, separate = joined(tmp_path / "a"), load(tmp_path / "a", rows="torch")
    for seed, shape in enumerate(("single", "ragged", "empty")):
        batch = random_batch(tables, seed=seed, shape=shape)
        found, wanted = serving(batch), separate(batch)
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found.values(), wanted.values(), rtol=1e-6, atol=1e-7)


def test_weights_and_single_embeddings(tmp_path, joined):
    tables = awkward_tables((8, 8, 8))
    save(pooled(CASES["full"], tables, is_weighted=True), tmp_path / "weighted")
    batch = random_batch(tables, seed=5, weighted=True)
    found = joined(tmp_path / "weighted")(batch).values()
    torch.testing.assert_close(found, load(tmp_path / "weighted")(batch).values())
    save(unpooled(CASES["hash"], tables), tmp_path / "unpooled")
    batch = random_batch(tables, seed=6)
    wanted = load(tmp_path / "unpooled")(batch)
    for key, jagged in joined(tmp_path / "unpooled")(batch).items():
        assert torch.equal(jagged.values(), wanted[key].values())


@pytest.mark.parametrize("row_type", ["fp32", "int8"])
@pytest.mark.parametrize("case", STEADY)
def test_features_add_no_operations(case, row_type, tmp_path, joined):
    counts = []
    for features in (2, 9):
        tables = plain_tables(16, rows=[60] * features)
        save(pooled(CASES[case], tables), tmp_path / str(features), row_type=row_type)
        serving, batch = joined(tmp_path / str(features)), random_batch(tables, seed=1)
        with torch.no_grad(), Dispatched() as seen:
            serving(batch)
        counts.append(seen.total)
    few, many = counts
    assert many == few


def test_rows_are_moved_and_never_cast(tmp_path, joined):
    tables = plain_tables(8)
    save(pooled(CASES["full"], tables), tmp_path / "a")
    serving = joined(tmp_path / "a").half()
    assert serving.rows.get_buffer("rows_0").dtype == torch.float32
    moved = load(tmp_path / "a", device="meta")
    assert isinstance(moved.rows, RowsByFormat) and moved.rows.get_buffer("rows_0").is_meta
