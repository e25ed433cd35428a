"""The nearest codeword is that of a full search in float64, whatever is searched for beside it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embcomp.backends.codebooks import nearest as module
from embcomp.backends.codebooks.nearest import nearest


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def means(request, monkeypatch):
    """What finds codes: compiled code, where there is a compiler, and torch."""
    if request.param == "torch":
        monkeypatch.setattr(module, "library", lambda: None)
    elif module.library() is None:
        pytest.skip("there is no C++ compiler")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_search(vectors, codebooks, which):
    gaps = vectors.double().unsqueeze(2) - codebooks[which].double()
    return gaps.square().sum(3).argmin(2)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8, 17])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 33, 256])
def test_codes_are_those_of_a_full_search(dim, count):
    vectors, codebooks = drawn(300, 5, dim), drawn(3, count, dim, seed=1)
    which = torch.tensor([0, 2, 1, 0, 2])
    assert torch.equal(nearest(vectors, codebooks, which), full_search(vectors, codebooks, which))


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e25])
def test_neither_size_nor_distance_from_zero_matter(dim, size):
    vectors, codebooks = size * drawn(200, 2, dim), size * drawn(2, 40, dim, seed=1)
    which = torch.arange(2)
    assert torch.equal(nearest(vectors, codebooks, which), full_search(vectors, codebooks, which))
    far = 1000 * size
    moved = full_search(vectors + far, codebooks + far, which)
    assert torch.equal(nearest(vectors + far, codebooks + far, which), moved)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_of_equals_the_first_is_chosen(dim):
    """Whole numbers, of which many are as near to several codewords, some of which are alike."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randint(-3, 4, (400, 2, dim), generator=random).float()
    codebooks = torch.randint(-3, 4, (2, 50, dim), generator=random).float()
    which = torch.arange(2)
    gaps = (vectors.unsqueeze(2) - codebooks).square().sum(3)
    ties = (gaps == gaps.amin(2, keepdim=True)).sum(2) > 1
    assert int(ties.sum()) > 100
    first = torch.where(gaps == gaps.amin(2, keepdim=True), torch.arange(50), 50).amin(2)
    assert torch.equal(nearest(vectors, codebooks, which), first)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_code_depends_on_its_vector_alone(dim, monkeypatch):
    vectors, codebooks = drawn(700, 3, dim), drawn(3, 65, dim, seed=1)
    which = torch.arange(3)
    whole = nearest(vectors, codebooks, which)
    alone = torch.cat([nearest(one, codebooks, which) for one in vectors[:40].split(1)])
    assert torch.equal(alone, whole[:40])
    parts = vectors.split([1, 600, 0, 99])
    assert torch.equal(torch.cat([nearest(part, codebooks, which) for part in parts]), whole)
    assert torch.equal(nearest(vectors[:, 1:2], codebooks, which[1:2]), whole[:, 1:2])
    monkeypatch.setattr(module, "_AT_ONCE", 1 << 12)
    monkeypatch.setattr(module, "_MAXIMA_AT_ONCE", 1 << 11)
    assert torch.equal(nearest(vectors, codebooks, which), whole)


def test_the_number_of_threads_does_not_matter():
    vectors, codebooks, which = drawn(5000, 2, 4), drawn(2, 64, 4, seed=1), torch.arange(2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(nearest(vectors, codebooks, which))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_vectors_that_are_not_finite_have_some_code_and_spoil_no_other():
    vectors, codebooks, which = drawn(50, 2, 4), drawn(2, 33, 4, seed=1), torch.arange(2)
    wanted = full_search(vectors, codebooks, which)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        spoilt = vectors.clone()
        spoilt[7, 0, 2] = value
        found = nearest(spoilt, codebooks, which)
        assert 0 <= int(found.min()) <= int(found.max()) < 33
        found[7, 0] = wanted[7, 0]
        assert torch.equal(found, wanted)


class LargestTensor(TorchDispatchMode):
    """The most elements of a tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_new = all(each.alias_info is None for each in func._schema.returns)
        if isinstance(found, torch.Tensor) and is_new:
            self.elements = max(self.elements, found.numel())
        return found


def test_what_a_search_holds_does_not_grow_with_the_vectors():
    codebooks, which = drawn(4, 16, 4, seed=1), torch.arange(4)
    for rows in (40_000, 400_000):
        vectors = drawn(rows, 4, 4)
        with LargestTensor() as seen:
            nearest(vectors, codebooks, which)
        assert seen.elements <= max(rows * 4, module._MAXIMA_AT_ONCE)  # the codes, or a block


def test_codes_of_rows_that_lie_apart_are_those_of_copies():
    wide, codebooks, which = (
        drawn(300, 3, 6),
        drawn(2, 20, 6, seed=1)[..., :4],
        torch.tensor([1, 0, 1]),
    )
    parts = wide[::2, :, 1:5]
    assert torch.equal(nearest(parts, codebooks, which), full_search(parts, codebooks, which))


def test_compiled_code_and_torch_find_the_same_where_rounding_could_decide(monkeypatch):
    """Codewords in pairs that lie a few roundings apart."""
    words = drawn(2, 60, 4, seed=1)
    words = torch.cat([words, words * (1 + 2e-7), words + 1e-7], dim=1)
    vectors, which = drawn(3000, 2, 4), torch.arange(2)
    found = nearest(vectors, words, which)
    assert torch.equal(found, full_search(vectors, words, which))
    monkeypatch.setattr(module, "library", lambda: None)
    assert torch.equal(nearest(vectors, words, which), found)


@pytest.mark.parametrize("dim", [2, 3, 4, 9])
@pytest.mark.parametrize("far", [1e1, 1e3, 1e6])
def test_codes_beside_codewords_that_lie_far_out(dim, far):
    """Near words in pairs a few roundings apart, and vectors near and far, on a word and off it."""
    words = drawn(2, 60, dim, seed=1)
    words = torch.cat(
        [words, words * (1 + 2e-7), words + 1e-7, far * drawn(2, 3, dim, seed=2)], dim=1
    )
    vectors = torch.cat([drawn(2000, 2, dim), words[:, :183].transpose(0, 1)])
    for size in (1e-3, 1.0, far):
        some, which = torch.cat([vectors[:1000] * size, vectors[1000:]]), torch.arange(2)
        assert torch.equal(nearest(some, words, which), full_search(some, words, which))


def test_a_codeword_far_out_brings_no_other_into_doubt():
    words = drawn(1, 256, 4, seed=1)
    words[0, 7] = 1e3
    vectors = drawn(4000, 1, 4)
    codes = torch.empty(4000, 1, dtype=torch.int64)
    unsettled = module._search_by_torch(vectors, words, codes)
    assert len(unsettled) < 40


@pytest.mark.parametrize("dim", [2, 6])
@pytest.mark.parametrize("of_words", [1.0, 1e16, 1e19, 1e30])
def test_numbers_whose_squares_float32_cannot_hold(dim, of_words):
    words = of_words * drawn(2, 80, dim, seed=1)
    words[0, :40] *= 1e-6
    which = torch.arange(2)
    for size in (1.0, 1e18, 1e30):
        vectors = size * drawn(300, 2, dim)
        gaps = (vectors.double().unsqueeze(2) - words[which].double()).square().sum(3)
        found = gaps.gather(2, nearest(vectors, words, which).unsqueeze(2))[..., 0]
        assert bool((found <= gaps.amin(2) * (1 + 1e-12)).all())


@pytest.mark.parametrize("dim", [2, 4, 9])
def test_both_ways_agree_where_float64_cannot_tell(dim, monkeypatch):
    words, which = 1e-3 * drawn(1, 64, dim, seed=1), torch.zeros(1, dtype=torch.int64)
    vectors = 1e9 * drawn(500, 1, dim)
    found = nearest(vectors, words, which)
    monkeypatch.setattr(module, "library", lambda: None)
    assert torch.equal(nearest(vectors, words, which), found)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_words_that_are_no_numbers_are_no_error(dim, count):
    words = torch.full((1, count, dim), torch.nan)
    words[0, : count // 2] = drawn(count // 2, dim, seed=1)
    codes = nearest(drawn(20, 1, dim), words, torch.zeros(1, dtype=torch.int64))
    assert bool(((codes >= 0) & (codes < count)).all())
