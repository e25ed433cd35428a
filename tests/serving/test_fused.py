"""One compiled call answers as a collection's modules do, or hands over to them."""

from __future__ import annotations

import copy
import ctypes
import pickle
import threading

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import load, save
from embcomp.errors import ArtefactError
from embcomp.io.compiled_library import KERNEL
from embcomp.serving.fused import library as compiled
from embcomp.serving.serving_rows import FusedRows, KernelRows
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

BY_MODULES = {
    "adapt",
    "adapt_zero",
    "alpt",
    "cafe",
    "cce",
    "deeplight",
    "dhe",
    "int16",
    "int8",
    "low_rank_bias",
    "mapped",
    "mgqe",
    "pep",
    "pep_table",
    "robe",
    "sparse",
    "tensor_train",
}
"""Cases whose methods do not say what they do."""
PROJECTED = {
    "coded_all",
    "coded_table",
    "low_rank",
    "low_rank_parts",
    "lr2vq",
    "lr2vq_folded",
    "lr2vq_line",
    "lr2vq_table",
    "mde",
    "unified_projected",
}
"""Cases whose matrices are multiplied by BLAS elsewhere."""
NARROW = (
    "full",
    "low_dim_kept",
    "qr_mult",
    "unified_projected",
    "blocks",
    "coded",
    "low_rank",
    "double_hash",
)
SHAPES = ("single", "ragged", "empty", "full_bags")
EXACT = {"rtol": 0, "atol": 0}

pytestmark = pytest.mark.skipif(
    compiled.why_missing() is not None, reason=f"no compiled look-up: {compiled.why_missing()}"
)


def answers(serving, batch):
    """What the compiled call alone says."""
    found = serving._fused.pooled(batch, is_weighted=batch.weights_or_none() is not None)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("case", "row_type"),
    [(case, "fp32") for case in sorted(set(CASES) - BY_MODULES)]
    + [(case, row_type) for case in NARROW for row_type in ROW_TYPES[1:]],
)
def test_every_form_answers_as_by_fbgemm(case, row_type, tmp_path):
    tables = awkward_tables((16, 6, 3))
    save(pooled(CASES[case], tables), tmp_path / "a", row_type=row_type)
    fused, kernel = load(tmp_path / "a"), load(tmp_path / "a", rows="fbgemm")
    exact = row_type == "fp32" and case not in PROJECTED
    close = EXACT if exact else {"rtol": 1e-5, "atol": 1e-6}
    for seed, shape in enumerate(SHAPES):
        batch = random_batch(tables, seed=seed, shape=shape)
        torch.testing.assert_close(answers(fused, batch), kernel(batch).values(), **close)


@pytest.mark.parametrize("case", NARROW)
@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_tiles_and_threads_change_no_answer(case, row_type, tmp_path, threads):
    """A batch of many tiles, its last one cut short, is what its samples are one by one."""
    tables = plain_tables(16)
    save(pooled(CASES[case], tables), tmp_path / "a", row_type=row_type)
    serving = load(tmp_path / "a")
    ids = torch.randint(0, 60, (3, 1_000), generator=torch.Generator().manual_seed(7))

    def batch(own):
        return KeyedJaggedTensor(
            keys=["f0", "f1", "f2"],
            values=own.reshape(-1),
            lengths=torch.ones(own.numel(), dtype=torch.int32),
        )

    threads(1)
    wanted = answers(serving, batch(ids))
    alone = [answers(serving, batch(ids[:, n : n + 1])) for n in range(0, 1_000, 37)]
    assert torch.equal(torch.cat(alone), wanted[::37])
    threads(2)
    assert torch.equal(answers(serving, batch(ids)), wanted)
    assert torch.equal(answers(serving, batch(ids[:, :65])), wanted[:65])
    ids[2, 999] = -1
    if not CASES[case].takes_any_id:
        assert serving._fused.pooled(batch(ids), is_weighted=False) is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", sorted(BY_MODULES))
def test_methods_that_say_nothing_are_served_by_their_modules(case, tmp_path):
    tables = awkward_tables((16, 6, 3))
    collection = pooled(CASES[case], tables)
    save(collection, tmp_path / "a")
    serving = load(tmp_path / "a")
    assert serving._fused is None and isinstance(serving.rows or serving.unpooled_rows, KernelRows)
    batch = random_batch(tables, seed=1)
    torch.testing.assert_close(serving(batch).values(), collection(batch).values())


@pytest.mark.parametrize("case", sorted(set(CASES) - BY_MODULES))
def test_weights_and_single_embeddings(case, tmp_path):
    tables = awkward_tables((8, 8, 8))
    weighted = pooled(CASES[case], tables, is_weighted=True)
    save(weighted, tmp_path / "weighted")
    batch = random_batch(tables, seed=5, weighted=True)
    found = answers(load(tmp_path / "weighted"), batch)
    torch.testing.assert_close(found, weighted(batch).values(), rtol=1e-5, atol=1e-6)
    single = unpooled(CASES[case], tables)
    save(single, tmp_path / "unpooled")
    serving = load(tmp_path / "unpooled")
    batch = random_batch(tables, seed=6)
    assert serving._fused.unpooled(batch) is not None
    for key, jagged in single(batch).items():
        torch.testing.assert_close(serving(batch)[key].values(), jagged.values())
        assert torch.equal(serving(batch)[key].lengths(), jagged.lengths())


@pytest.fixture
def saved(tmp_path):
    tables = plain_tables(8)
    collection = pooled(CASES["coded"], tables)
    save(collection, tmp_path / "a")
    return tables, collection, tmp_path / "a"


def test_keys_in_any_order_and_more_of_them_and_short_ids(saved):
    tables, collection, path = saved
    serving = load(path)
    batch = random_batch(tables, seed=2, shape="single")
    wanted = collection(batch).values()
    more = KeyedJaggedTensor.concat([batch, random_batch_of("other", batch.stride())])
    for other in (
        batch.permute([2, 0, 1]),
        more.permute([3, 1, 2, 0]),
        batch.to_dict(),
    ):
        assert torch.equal(serving(other).values(), wanted)
    short = KeyedJaggedTensor(
        keys=batch.keys(), values=batch.values().int(), lengths=batch.lengths().long()
    )
    assert torch.equal(answers(serving, short), wanted)


def random_batch_of(key, stride):
    return KeyedJaggedTensor(
        keys=[key],
        values=torch.arange(stride),
        lengths=torch.ones(stride, dtype=torch.int32),
    )


@pytest.mark.parametrize("bad", [-1, 60, 2**62, -(2**63)])
def test_ids_out_of_range_are_refused_with_their_feature(saved, bad):
    tables, _, path = saved
    batch = random_batch(tables, seed=2, shape="single")
    batch.values()[1] = bad
    with pytest.raises(ValueError, match=rf"feature 'f0': id {bad} is not in \[0, 60\)"):
        load(path)(batch)


def test_a_damaged_code_reads_no_other_memory(tmp_path):
    """Where nobody verifies: a code beyond the codewords is refused."""
    tables = plain_tables(8)
    save(pooled(CASES["qr_mult"], tables), tmp_path / "a")
    serving = load(tmp_path / "a")
    serving._fused._program.steps["num_rows"] = 1
    batch = random_batch(tables, seed=2, shape="single")
    assert serving._fused.pooled(batch, is_weighted=False) is None


def test_many_threads_at_once_have_the_same_answers(saved):
    tables, collection, path = saved
    serving = load(path)
    batches = [random_batch(tables, seed=seed, shape="ragged") for seed in range(8)]
    wanted = [collection(batch).values().detach() for batch in batches]
    wrong = []

    def serve(n):
        for _ in range(50):
            if not torch.equal(serving(batches[n]).values(), wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def rows_of(serving):
    return serving._fused._program.steps["rows"].tolist()


def test_copies_answer_from_rows_of_their_own(saved):
    tables, _, path = saved
    serving = load(path)
    batch = random_batch(tables, seed=3)
    wanted = serving(batch).values()
    for copied in (copy.deepcopy(serving), pickle.loads(pickle.dumps(serving))):
        assert isinstance(copied.rows, FusedRows)
        assert rows_of(copied) != rows_of(serving)
        assert torch.equal(answers(copied, batch), wanted)


@pytest.fixture
def no_library(monkeypatch):
    compiled.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    compiled.library.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (KERNEL, "off", "EMBCOMP_KERNEL turns it off"),
        ("CXX", "/nowhere/c++", "no C\\+\\+ compiler: /nowhere/c\\+\\+ is not on the path"),
        ("CXX", "/bin/false", "/bin/false failed"),
    ],
)
def test_without_a_compiler_artefacts_are_served_all_the_same(
    saved, no_library, tmp_path, variable, value, reason
):
    tables, collection, path = saved
    no_library.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    no_library.setenv(variable, value)
    serving = load(path)
    assert serving._fused is None and isinstance(serving.rows, KernelRows)
    batch = random_batch(tables, seed=4)
    torch.testing.assert_close(serving(batch).values(), collection(batch).values())
    with pytest.raises(ArtefactError, match=f"rows='fused' needs compiled code: {reason}"):
        load(path, rows="fused")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_library_is_built_once_and_kept(no_library, tmp_path):
    no_library.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(compiled.library(), ctypes.CDLL)
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    compiled.library.cache_clear()
    compiled.library()
    assert built.stat().st_mtime_ns == before
    assert [path.name for path in built.parent.iterdir()] == [built.name]
