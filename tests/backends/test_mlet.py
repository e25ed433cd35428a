"""Multi-layer embeddings: the product is served, and learns as the paper says it does."""

from __future__ import annotations

import torch

from embcomp import MLET, load, save
from embcomp.testing.cases import BackendCase, pooled
from embcomp.testing.check_data import batch_of, plain_tables, random_batch

TABLES = plain_tables(16, rows=(40, 50))
METHOD = MLET(width=4, factor=3)


def collection_of():
    return pooled(BackendCase(config=METHOD), TABLES)


def factors(collection, table):
    state = collection.state_dict()
    matrix = state[f"combine.combines.mlet.projections.table@{table}.weight"]
    return state[f"rows.embedding_bags.{table}.weight"], matrix


def test_what_is_served_are_low_dim_rows_that_answer_alike(tmp_path):
    collection = collection_of()
    served = collection.compact()
    assert {method.name for method in served.plan.methods.values()} == {"low_dim"}
    assert served.footprint.serve_bytes == collection.footprint.serve_bytes == 90 * 4 * 4
    assert collection.footprint.train_weight_bytes == 4 * (90 * 12 + 2 * 12 * 4)
    wide, matrix = factors(collection, "t1")
    assert wide.shape == (50, 12) and matrix.shape == (12, 4)
    torch.testing.assert_close(served.state_dict()["rows.embedding_bags.t1.weight"], wide @ matrix)
    save(collection, tmp_path / "a")
    batch = random_batch(TABLES, seed=1)
    torch.testing.assert_close(load(tmp_path / "a")(batch).values(), collection(batch).values())


def test_a_step_moves_rows_that_are_not_in_the_batch_along_their_likeness():
    """`dE = -rate (G W2' W2 + W1 W1' G)`, to first order, for a gradient G of E = W1 W2."""
    collection = collection_of().train()
    wide, matrix = (tensor.clone().double() for tensor in factors(collection, "t0"))
    before = wide @ matrix
    rate = 1e-3
    optimizer = torch.optim.SGD(collection.parameters(), lr=rate)
    pull = torch.linspace(-1, 1, 16)
    (collection(batch_of({"f0": [[3], [7]], "f1": [[], []]}))["f0"] @ pull).sum().backward()
    optimizer.step()
    wide, matrix = (tensor.double() for tensor in factors(collection, "t0"))
    after = wide @ matrix
    gradient = torch.zeros(40, 4, dtype=torch.float64)
    gradient[[3, 7]] = pull[:4].double()
    first = collection_of()
    rows, small = (tensor.double() for tensor in factors(first, "t0"))
    wanted = -rate * (gradient @ small.t() @ small + rows @ rows.t() @ gradient)
    torch.testing.assert_close(after - before, wanted, rtol=2e-2, atol=2e-6)
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 7]] = False
    assert (after - before)[others].abs().max() > 1e-6
