"""Rows of other devices, tried on the CPU: the same answers, in operations that features do not add to.

The host is told that it has no values at hand, as elsewhere, so that nothing of what only a CPU does is counted.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import load, save
from embcomp.layers import host_values
from embcomp.serving import modules
from embcomp.serving.rows_by_format import RowsByFormat
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import Declared, awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES, EACH_METHOD
from tests.helpers.dispatched import Dispatched
from tests.helpers.long import long_but

MOST = 20
"""Launches of a batch with bags of any length, whatever its features are."""
OVER = {
    "adapt": (43, 46),
    "adapt_zero": (29, 32),
    "alpt": (35, 35),
    "blocks": (25, 45),
    "cafe": (44, 47),
    "cce": (44, 44),
    "coded": (23, 23),
    "coded_all": (23, 23),
    "coded_groups": (26, 26),
    "coded_table": (26, 26),
    "deeplight": (37, 37),
    "dhe": (55, 61),
    "double_hash": (34, 37),
    "hash": (23, 26),
    "int16": (37, 37),
    "int8": (35, 35),
    "low_dim_kept": (53, 61),
    "low_rank_bias": (24, 30),
    "lr2vq": (24, 24),
    "lr2vq_folded": (25, 25),
    "lr2vq_line": (25, 25),
    "lr2vq_table": (27, 27),
    "mapped": (34, 37),
    "mapped_parts": (32, 45),
    "mde": (17, 26),
    "mgqe": (46, 46),
    "pep": (37, 37),
    "pep_table": (37, 37),
    "pq": (23, 23),
    "qr_add": (19, 22),
    "qr_mult": (27, 33),
    "robe": (33, 33),
    "sparse": (37, 37),
    "tensor_train": (33, 46),
    "unified": (22, 25),
    "unified_3_tables": (26, 29),
    "unified_beside_full": (35, 43),
    "unified_projected": (26, 29),
}
"""Methods that launch more, of float32 rows and of int8 ones: a hash alone is 15, a rank among kept ids 25, and
int8 rows are 3 to 5 for each width."""


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


@contextmanager
def elsewhere():
    """Within it, a CPU is taken for a device that the host would have to wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_values, "AT_HAND", frozenset())
        yield


@pytest.mark.parametrize("case", sorted(CASES))
def test_joined_rows_answer_as_separate_ones(case, tmp_path, joined):
    tables = awkward_tables((16, 6, 3))
    row_type = ROW_TYPES[sorted(CASES).index(case) % 4]
    save(pooled(CASES[case], tables), tmp_path / "a", row_type=row_type)
    serving, separate = joined(tmp_path / "a"), load(tmp_path / "a", rows="torch")
    for seed, shape in enumerate(("single", "ragged", "empty")):
        batch = random_batch(tables, seed=seed, shape=shape)
        with elsewhere():
            found = serving(batch)
        wanted = separate(batch)
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found.values(), wanted.values(), rtol=1e-6, atol=1e-7)


def test_weights_and_single_embeddings(tmp_path, joined):
    tables = awkward_tables((8, 8, 8))
    save(pooled(CASES["full"], tables, is_weighted=True), tmp_path / "weighted")
    batch = random_batch(tables, seed=5, weighted=True)
    serving = joined(tmp_path / "weighted")
    with elsewhere():
        found = serving(batch).values()
    torch.testing.assert_close(found, load(tmp_path / "weighted")(batch).values())
    save(unpooled(CASES["hash"], tables), tmp_path / "unpooled")
    batch = random_batch(tables, seed=6)
    wanted = load(tmp_path / "unpooled")(batch)
    serving = joined(tmp_path / "unpooled")
    with elsewhere():
        found = serving(batch)
    for key, jagged in found.items():
        assert torch.equal(jagged.values(), wanted[key].values())


@pytest.mark.parametrize("case", ["full", "mde", "tensor_train"])
def test_weights_may_be_halves(case, tmp_path, joined):
    tables = awkward_tables((8, 6, 3))
    save(pooled(CASES[case], tables, is_weighted=True), tmp_path / "a")
    batch = random_batch(tables, seed=5, weighted=True)
    weights = (batch.weights() * 4).round() / 4  # which both types hold
    wanted = load(tmp_path / "a", rows="torch")(with_weights(batch, weights)).values()
    serving = joined(tmp_path / "a")
    with elsewhere():
        found = serving(with_weights(batch, weights.half())).values()
    torch.testing.assert_close(found, wanted)


def with_weights(batch, weights):
    return KeyedJaggedTensor(
        keys=batch.keys(), values=batch.values(), lengths=batch.lengths(), weights=weights
    )


@pytest.mark.parametrize("case", ["mde", "mlet", "unified_projected", "dhe"])
def test_frozen_parameters_that_are_written_to_past_their_versions_are_followed(case):
    tables = awkward_tables((8, 8, 8))
    model, batch = pooled(CASES[case], tables).requires_grad_(False), random_batch(tables, seed=3)
    with elsewhere():
        model(batch)
        for parameter in model.parameters():
            parameter.data.mul_(2)  # as averages of weights are kept
        found = model(batch).values()
    torch.testing.assert_close(found, model(batch).values())


def launches(case, row_type, sizes, features, folder, load_joined):
    """Of a batch with one id a bag, and of one with any number, for tables of some features each."""
    tables = [
        Declared(name=f"t{n}", rows=rows, dim=16, features=tuple(f"f{n}_{k}" for k in features))
        for n, rows in enumerate(sizes)
    ]
    save(pooled(CASES[case], tables), folder, row_type=row_type)
    serving, counts = load_joined(folder), []
    for shape in ("single", "ragged"):
        with torch.no_grad(), elsewhere():
            serving(random_batch(tables, seed=0, shape=shape))  # what is made once
            batch = random_batch(tables, seed=1, shape=shape)
            batch.length_per_key()  # as of one that comes from the host
            with Dispatched() as seen:
                serving(batch)
        counts.append(seen.launches)
    return counts


@pytest.mark.parametrize(
    "case", ["blocks", "dhe", "double_hash", "int8", "mapped", "mde", "qr_add"]
)
def test_single_embeddings_are_the_separate_ones(case, tmp_path, joined):
    tables = awkward_tables((8, 8, 8))
    save(unpooled(CASES[case], tables), tmp_path / "a")
    serving, separate = joined(tmp_path / "a"), load(tmp_path / "a", rows="torch")
    for seed, shape in enumerate(("single", "ragged", "empty")):
        batch = random_batch(tables, seed=seed, shape=shape)
        with elsewhere():
            found = serving(batch)
        for key, jagged in separate(batch).items():
            torch.testing.assert_close(
                found[key].values(), jagged.values(), rtol=1e-6, atol=1e-7, msg=f"{shape} {key}"
            )


@pytest.mark.parametrize(
    ("case", "row_type"),
    long_but(
        [*((case, "fp32") for case in CASES), *((case, "int8") for case in EACH_METHOD)],
        itertools.product(CASES, ("fp32", "int8")),
    ),
)
def test_launches_are_few_and_features_add_none(case, row_type, tmp_path, joined):
    sizes, more = (60, 90, 75, 60), (90, 75)
    if "'t0'" in repr(CASES[case].config):  # which says something of each table
        sizes, more = sizes[:3], ()
    few = launches(case, row_type, sizes, range(2), tmp_path / "few", joined)
    many = launches(case, row_type, sizes + more, range(4), tmp_path / "many", joined)
    assert many == few
    most = OVER.get(case, (MOST, MOST))
    assert max(many) <= most[row_type == "int8"]


def test_the_exceptions_name_cases():
    assert set(OVER) <= set(CASES)


def test_rows_are_moved_and_never_cast(tmp_path, joined):
    tables = plain_tables(8)
    save(pooled(CASES["full"], tables), tmp_path / "a")
    serving = joined(tmp_path / "a").half()
    assert serving.rows.get_buffer("rows_0").dtype == torch.float32
    moved = load(tmp_path / "a", device="meta")
    assert isinstance(moved.rows, RowsByFormat) and moved.rows.get_buffer("rows_0").is_meta
