"""Tensor trains: rows are products of what an id's digits choose, and few cores say much."""

from __future__ import annotations

import pytest
import torch

from embcomp import TT, Hash
from embcomp.backends.tt import column_factors, row_factors
from embcomp.testing.cases import BackendCase, embed_ids, pooled
from embcomp.testing.check_data import plain_tables
from embcomp.testing.planted import Planted
from tests.helpers.learned_cases import Clicks, auc, fit


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 60, 1000, 1001, 33_762_577, 2**53 + 1])
def test_three_numbers_of_about_one_size_number_all_ids(count):
    factors = row_factors(count)
    product = factors[0] * factors[1] * factors[2]
    assert count <= product <= count + 4 * (max(factors) ** 2 + max(factors))
    assert max(factors) <= count ** (1 / 3) + 2


def test_factors_of_a_width_make_it_and_the_middle_is_the_least():
    assert [column_factors(dim) for dim in (1, 7, 10, 16, 64)] == [
        (1, 1, 1),
        (1, 1, 7),
        (2, 1, 5),
        (2, 2, 4),
        (4, 4, 4),
    ]


def test_an_embedding_is_the_product_of_its_digits_cores():
    tables, rank = plain_tables(12, rows=(90, 60)), 3
    collection = pooled(BackendCase(config=TT(rank=rank)), tables)
    state = collection.state_dict()
    p1, p2, p3 = row_factors(90)
    q1, q2, q3 = column_factors(12)
    assert (p1, p2, p3) == (5, 5, 4) and (q1, q2, q3) == (2, 2, 3)
    one, two, three = (
        state[f"unpooled_rows.embedding_bags.t0__core_{n}.weight"][:, :width]
        for n, width in enumerate((q1 * rank, rank * q2 * rank, rank * q3))
    )
    found = embed_ids(collection, tables)["f0"]
    for id_ in (0, 1, 5, 38, 89):
        first, second, third = id_ % p1, id_ // p1 % p2, id_ // (p1 * p2)
        left = one[first].view(q1, rank) @ two[second].view(rank, q2 * rank)
        wanted = left.reshape(q1 * q2, rank) @ three[third].view(rank, q3)
        torch.testing.assert_close(found[id_], wanted.reshape(-1))


def digits(seed=0, rows=15_000, count=512):
    """Two features of ids whose digits mean something, and not they themselves."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count, (rows, 2), generator=random)
    places = torch.tensor([1, 8, 64])
    effects = torch.randn(2, 3, 8, generator=random)
    score = sum(
        effects[n, place][ids[:, n] // places[place] % 8] for n in range(2) for place in range(3)
    )
    labels = (torch.rand(rows, generator=random) < torch.sigmoid(score)).float()
    useful = torch.ones(count, dtype=torch.bool)
    return Planted(ids=ids, labels=labels, useful=(useful, useful))


def test_it_beats_hashing_in_equal_bytes_where_digits_mean_something():
    planted, scores = digits(), {}
    for method in (TT(rank=4), Hash(num_buckets=51, collisionless=0)):
        torch.manual_seed(0)
        model = Clicks(planted, method, 8)
        fit(model, planted, epochs=3)
        scores[method.name] = auc(model, planted)
        assert model.tables.footprint.serve_bytes <= 2 * 51 * 8 * 4
    assert scores["tt"] > scores["hash"] + 0.03
