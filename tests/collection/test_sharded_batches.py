"""Deduplicated batches, and batches of no rows on some ranks, answer sharded as they do in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.testing.sharded import Setup, shard
from tests.helpers.backends_under_test import CASES

pytestmark = pytest.mark.slow


def deduplicated(features):
    """Rows in reverse, by indices into the bags as they are."""
    rows = torch.arange(features.stride()).flip(0).repeat(len(features.keys()), 1)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        inverse_indices=(list(features.keys()), rows),
    )


def shared_bags(features, rank):
    """More rows than bags, of which ranks and features have different numbers; the rows are equally many."""
    keys, bags = features.keys(), [[2 + rank + n % 2] for n in range(len(features.keys()))]
    own = features.to_dict()
    lengths = [own[key].lengths()[:count] for key, (count,) in zip(keys, bags)]
    values = [own[key].values()[: int(part.sum())] for key, part in zip(keys, lengths)]
    rows = torch.stack([torch.arange(features.stride() * 2) % count for (count,) in bags])
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        stride_per_key_per_rank=bags,
        inverse_indices=(list(keys), rows),
    )


def without_rows(features):
    nothing = features.values()[:0]
    return KeyedJaggedTensor(keys=features.keys(), values=nothing, lengths=features.lengths()[:0])


def check(setups):
    for setup in setups:
        alone = setup.model(seed=1)
        sharded, _ = shard(setup, setup.model(seed=2), weights=alone.state_dict())
        tables = next(m for n, m in sharded.named_modules() if n.rpartition(".")[2] == "tables")
        features = setup.batch(0, dist.get_rank()).sparse
        batches = [deduplicated(features), shared_bags(features, dist.get_rank())]
        if setup.sharding == "table_wise":
            batches.append(without_rows(features) if dist.get_rank() else features)
        for batch in batches:
            found, wanted = tables.eval()(batch).values(), alone.eval().tables(batch).values()
            torch.testing.assert_close(found, wanted, msg=str(setup))
        for batch in batches:  # rows are written in the backward pass
            tables.train()(batch).values().sum().backward()


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_two_ranks_answer_as_one_process(workers, sharding):
    cases = ("full", "unified", "low_dim_kept", "optembed")
    setups = [Setup(plan=CASES[case].config, sharding=sharding) for case in cases]
    workers.run(2, check, setups)
