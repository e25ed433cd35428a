"""Distributed checkpoints of TorchRec's collections are read into ours, resharded, and the other way."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    get_embedding_names_by_table,
)

from embcomp import CompressedEmbeddingBagCollection
from embcomp.backends import OptEmbed
from embcomp.collection import own_optimizer_state, torchrec_optimizer_state, torchrec_state_dict
from embcomp.testing.scorer import PooledHead, Scorer
from embcomp.testing.sharded import Setup, expect_equal_weights, mean_over_ranks, shard, train_step
from tests.training.test_checkpoint_dcp import state_of, step_of

pytestmark = pytest.mark.slow

BEFORE, AFTER = 2, 2
FUSED = (16, 8, 4)  # TorchRec's own fused tables are multiples of 4 wide
PADDED = (10, 6, 5)


class ByKey(PooledHead):
    """A head over the columns in the order declared; TorchRec's are sorted by rank once sharded."""

    def __init__(self, keys, width):
        super().__init__(width)
        self.keys = keys

    def forward(self, embeddings):
        found = embeddings.to_dict()
        hidden = self.hidden(10 * torch.cat([found[key] for key in self.keys], dim=1))
        return self.out(torch.tanh(hidden)).squeeze(1)


def model_of(setup, ours, seed):
    """The scorer of a setup, around our collection or TorchRec's."""
    torch.manual_seed(seed)
    bags = [table.bag() for table in setup.tables]
    if ours:
        tables = CompressedEmbeddingBagCollection(bags, setup.plan)
    else:
        tables = EmbeddingBagCollection(bags)
        tables.inner_collections = lambda: [tables]
    keys = [key for names in get_embedding_names_by_table(bags) for key in names]
    width = sum(table.dim * len(table.features) for table in setup.tables)
    return Scorer(tables, ByKey(keys, width))


def in_torchrecs_names(sharded, optimizer):
    return {
        "model": torchrec_state_dict(sharded),
        "optim": torchrec_optimizer_state(sharded, optimizer.state_dict()),
    }


def train_on(setup, sharded, optimizer):
    return [
        mean_over_ranks(train_step(sharded, optimizer, step_of(setup, BEFORE + step)))
        for step in range(AFTER)
    ]


def train_and_save(setup, folder, ours):
    """Train on one side, save in TorchRec's names, and train on."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    weights = model_of(setup, ours, 1).state_dict()
    sharded, optimizer = shard(setup, model_of(setup, ours, 2), weights=weights)
    for step in range(BEFORE):
        train_step(sharded, optimizer, step_of(setup, step))
    state = in_torchrecs_names(sharded, optimizer) if ours else state_of(sharded, optimizer)
    dcp.save(state, checkpoint_id=folder)
    return train_on(setup, sharded, optimizer)


def load_and_train_on(setup, folder, wanted, ours):
    """Load on the other side, in another split, and train on."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    sharded, optimizer = shard(setup, model_of(setup, ours, 3))
    dict(optimizer.optimizers)["dense"].init_state()
    state = in_torchrecs_names(sharded, optimizer) if ours else state_of(sharded, optimizer)
    dcp.load(state, checkpoint_id=folder)
    sharded.load_state_dict(state["model"])
    optim = own_optimizer_state(sharded, state["optim"]) if ours else state["optim"]
    optimizer.load_state_dict(optim)
    found = train_on(setup, sharded, optimizer)
    assert found == pytest.approx(wanted, abs=2e-6), f"{found}, uninterrupted {wanted}"


@pytest.mark.parametrize("ours", [True, False], ids=["to ours", "to torchrec's"])
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_training_goes_on_in_another_split_with_the_optimizers_state(
    workers, tmp_path, optimizer, ours
):
    def setup(sharding):
        return Setup(plan=None, sharding=sharding, optimizer=optimizer, dims=FUSED, batch_size=20)

    folder = str(tmp_path / "checkpoint")
    losses = workers.run(2, train_and_save, setup("table_wise"), folder, not ours)[0]
    workers.run(2, load_and_train_on, setup("table_wise"), folder, losses, ours)
    workers.run(1, load_and_train_on, setup("table_wise"), folder, losses, ours)
    if optimizer == "adagrad":
        workers.run(2, load_and_train_on, setup("column_wise"), folder, losses, ours)


def read_padded(setup, folder, weights):
    """Rows of widths that are padded here are read at their own, into any split."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    sharded, optimizer = shard(setup, model_of(setup, True, 3 + dist.get_rank()))
    state = {"tables": torchrec_state_dict(sharded)}
    rows = {
        name.removeprefix("tables."): each
        for name, each in state["tables"].items()
        if name.startswith("tables.embedding_bags.")
    }
    assert rows.keys() == weights.keys()
    dcp.load(rows, checkpoint_id=folder)
    sharded.load_state_dict(state["tables"])
    expect_equal_weights(rows, weights)
    own = sharded.state_dict()
    for table in setup.tables:
        rows = next(own[n] for n in own if n.endswith(f"rows.embedding_bags.{table.name}.weight"))
        for shard_ in rows.local_shards():
            start = shard_.metadata.shard_offsets[1]
            assert not shard_.tensor[:, max(0, table.dim - start) :].any()

    optim = optimizer.state_dict()
    named = torchrec_optimizer_state(sharded, optim)
    again = own_optimizer_state(sharded, named)
    assert again["state"].keys() == optim["state"].keys() != named["state"].keys()
    for key, entries in again["state"].items():
        for name, entry in entries.items():
            assert entry.shape == optim["state"][key][name].shape


@pytest.mark.parametrize("plan", [None, OptEmbed()], ids=["full", "optembed"])
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_unsharded_rows_are_read_into_padded_shards(workers, tmp_path, sharding, plan):
    setup = Setup(plan=plan, sharding=sharding, dims=PADDED)
    weights = model_of(setup, False, 5).tables.state_dict()
    dcp.save(dict(weights), checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    workers.run(2, read_padded, setup, str(tmp_path / "checkpoint"), dict(weights))
