"""Rows of other devices, tried on the CPU: the same answers, in operations that features do not add to."""

from __future__ import annotations

import pytest
import torch

from embcomp import load, save
from embcomp.serving import modules
from embcomp.serving.rows_by_format import RowsByFormat
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import Declared, awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES
from tests.helpers.dispatched import Dispatched

MOST = 22
"""Launches of a batch with bags of any length, whatever its features are."""
OVER = {
    "adapt": 57,
    "adapt_zero": 54,
    "alpt": 176,
    "blocks": 80,
    "cafe": 80,
    "cce": 70,
    "deeplight": 54,
    "dhe": 310,
    "dnis": 42,
    "dnis_search": 42,
    "dnis_search_prefix": 42,
    "double_hash": 52,
    "int16": 194,
    "int8": 176,
    "low_dim_kept": 88,
    "low_dim_mixed": 28,
    "low_rank_bias": 82,
    "low_rank_parts": 26,
    "mapped": 72,
    "mapped_parts": 78,
    "mde": 42,
    "mgqe": 44,
    "pep": 54,
    "pep_table": 54,
    "qr_add": 30,
    "qr_concat": 36,
    "qr_mult": 78,
    "robe": 62,
    "sparse": 54,
    "tensor_train": 108,
    "typed_blocks": 38,
    "unified_beside_full": 33,
}
"""Methods that launch more: they have rows of several widths, or routes of several steps."""
GROWING = {
    "alpt",
    "blocks",
    "dhe",
    "int16",
    "int8",
    "low_dim_kept",
    "low_dim_mixed",
    "low_rank_bias",
    "mapped",
    "mapped_parts",
    "mde",
    "qr_mult",
    "tensor_train",
    "unified_beside_full",
    "unified_projected",
}
"""Cases in which something is done feature by feature."""


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


def launches(case, row_type, features, folder, load_joined):
    """Of a batch with one id a bag, and of one with any number, for three tables of some features each."""
    tables = [
        Declared(name=f"t{n}", rows=rows, dim=16, features=tuple(f"f{n}_{k}" for k in features))
        for n, rows in enumerate((60, 90, 75))
    ]
    save(pooled(CASES[case], tables), folder, row_type=row_type)
    serving, counts = load_joined(folder), []
    for shape in ("single", "ragged"):
        batch = random_batch(tables, seed=1, shape=shape)
        with torch.no_grad(), Dispatched() as seen:
            serving(batch)
        counts.append(seen.launches)
    return counts


@pytest.mark.parametrize("row_type", ["fp32", "int8"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_launches_are_few_and_features_add_none(case, row_type, tmp_path, joined):
    few = launches(case, row_type, range(1), tmp_path / "few", joined)
    many = launches(case, row_type, range(3), tmp_path / "many", joined)
    assert max(many) <= OVER.get(case, MOST)
    if case not in GROWING:
        assert many == few
    if row_type == "fp32" and case not in OVER:
        assert max(many) <= 20


def test_the_lists_of_exceptions_name_cases():
    assert GROWING | set(OVER) <= set(CASES)


def test_rows_are_moved_and_never_cast(tmp_path, joined):
    tables = plain_tables(8)
    save(pooled(CASES["full"], tables), tmp_path / "a")
    serving = joined(tmp_path / "a").half()
    assert serving.rows.get_buffer("rows_0").dtype == torch.float32
    moved = load(tmp_path / "a", device="meta")
    assert isinstance(moved.rows, RowsByFormat) and moved.rows.get_buffer("rows_0").is_meta
