"""Memory on large pages is memory like any other: exact, apart from each other, and given back."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import weakref

import pytest
import torch

from embcomp import load, save
from embcomp.io import large_pages
from embcomp.io.large_pages import LARGE_PAGE, LargePages, ask_for_large_pages
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES


def test_tensors_have_places_and_storages_of_their_own():
    memory = LargePages()
    kinds = (torch.float32, torch.uint8, torch.float16, torch.int64)
    made = [memory.empty((n + 1, 7), kind) for n, kind in enumerate(kinds)]
    for n, tensor in enumerate(made):
        assert not tensor.any() and tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        tensor.fill_(n + 1)
    for n, tensor in enumerate(made):
        assert tensor.shape == (n + 1, 7) and bool((tensor == n + 1).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert len(pickle.dumps(tensor)) < 4_000
        assert torch.equal(copy.deepcopy(tensor), tensor)


def test_a_tensor_larger_than_a_piece_of_memory_is_whole():
    memory = LargePages()
    small = memory.empty((3,), torch.float32).fill_(1)
    large = memory.empty((9 * LARGE_PAGE,), torch.float32)  # 72 MiB, of which two pages are touched
    large[0], large[-1] = 2, 3
    assert small.tolist() == [1, 1, 1] and large[[0, 1, -1]].tolist() == [2, 0, 3]


def test_memory_is_given_back_with_its_last_tensor(monkeypatch):
    class Piece(mmap.mmap):
        """One that can be watched."""

    pieces = []

    def private(length):
        made = Piece(-1, length)
        pieces.append(weakref.ref(made))
        return made

    monkeypatch.setattr(large_pages, "_private", private)
    memory = LargePages()
    first, second = (memory.empty((5,), torch.float32) for _ in range(2))
    del memory, first
    gc.collect()
    assert pieces[0]() is not None
    del second
    gc.collect()
    assert pieces[0]() is None


@pytest.mark.parametrize("size", [0, 10, LARGE_PAGE, 3 * LARGE_PAGE + 5])
def test_asking_changes_no_value(size):
    tensor = torch.arange(size) % 251
    wanted = tensor.clone()
    ask_for_large_pages(tensor)
    assert torch.equal(tensor, wanted)


def test_an_artefact_answers_alike_where_there_are_none(tmp_path, monkeypatch):
    tables = plain_tables(16, (90_000, 60, 75))  # more than what is kept on them
    collection = pooled(CASES["full"], tables)
    save(collection, tmp_path / "a")
    batch = random_batch(tables, seed=1)
    wanted = load(tmp_path / "a")(batch).values()
    assert torch.equal(wanted, collection(batch).values())
    monkeypatch.setattr(large_pages, "_ADVICE", None)
    large_pages._madvise.cache_clear()
    assert torch.equal(load(tmp_path / "a")(batch).values(), wanted)
    large_pages._madvise.cache_clear()
