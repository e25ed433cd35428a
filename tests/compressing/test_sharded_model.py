"""`compress_` of a model that DistributedModelParallel has sharded: the same codes, in place, on any ranks."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.optim import RowWiseAdagrad

from embcomp import (
    LR2VQ,
    PQ,
    CompressedEmbeddingBagCollection,
    ConfigError,
    DataError,
    LowDim,
    compress_,
)
from embcomp.errors import EmbcompError
from embcomp.layers.shardable_buffers import shardable
from embcomp.planning.planner import RowSharder
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow
ROWS, DIM = {"a": 700, "b": 301}, 8


def configs(kind):
    return [
        kind(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
        for name, rows in ROWS.items()
    ]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(tables=configs(EmbeddingBagConfig))
        self.own = CompressedEmbeddingBagCollection(configs(EmbeddingBagConfig))
        self.one = EmbeddingCollection(tables=configs(EmbeddingConfig))
        self.words = nn.Embedding(200, DIM)
        self.over = nn.Linear(DIM, 1)

    def forward(self, features):
        bags = self.bags(features).values() + self.own(features).values()
        ones = torch.stack([each.values().sum(0) for each in self.one(features).values()]).sum(0)
        return self.over(bags[:, :DIM] + bags[:, DIM:] + ones + self.words(torch.arange(4)))


def features():
    return KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.tensor([0, 699, 5, 77, 300, 9]),
        lengths=torch.tensor([1, 2, 0, 1, 1, 1, 0, 0]),
    )


def trained():
    torch.manual_seed(0)
    return Model()


def sharded_model(sharding):
    model = trained()
    for module in model.modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            _apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.5})
    state = OrderedDict((name, each.clone()) for name, each in model.state_dict().items())
    sides = ParameterConstraints(sharding_types=[sharding], min_partition=4)
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints=dict.fromkeys(ROWS, sides),
    ).collective_plan(model, sharders := [RowSharder(), EmbeddingCollectionSharder()])
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=sharders
    )
    sharded.load_state_dict(state)
    return sharded


COUNTS = {"a": torch.arange(700, 0, -1)}


def reference(method):
    """What one process makes of the model in one piece: report, state and answer, on every rank."""
    found = [None]
    if dist.get_rank() == 0:
        whole = compress_(trained(), method, counts=COUNTS)
        answer = whole.model(features()).detach()
        found = [(str(whole), dict(whole.model.state_dict()), answer)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def check_same_as_unsharded(sharding, method, folder):
    sharded = sharded_model(sharding)
    before = sharded(features()).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embcomp.layers.block_work.BLOCK_BYTES", 1 << 12)  # of 256 rows
        found = compress_(sharded, method, counts=COUNTS, folder=folder)
        said, wanted, answer = reference(method)
    assert found.model is sharded
    assert not list(folder.iterdir())
    assert str(found) == said
    state = sharded.state_dict()
    assert set(wanted) == set(state)
    codes = [name for name in wanted if "codes" in name]
    for name in codes:
        assert torch.equal(wanted[name], state[name]), name
    assert torch.allclose(sharded(features()).detach(), answer, atol=1e-5)
    assert not torch.allclose(before, answer, atol=1e-3)
    held = [type(each).__name__ for each in sharded.modules() if isinstance(each, ShardedModule)]
    assert held == ["ShardedEmbeddingBagCollection"] * 4
    check_trains_on(sharded, {name: state[name].clone() for name in codes})


def check_trains_on(sharded, codes):
    """Codewords by the in-backward optimizer that the tables had, the rest by an ordinary one."""
    optimizer = torch.optim.Adam([p for n, p in sharded.named_parameters() if "over" in n], lr=0.01)
    losses = []
    for _ in range(5):
        loss = (sharded(features()) - dist.get_rank()).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    both = torch.tensor([losses[0], losses[-1]])
    dist.all_reduce(both)
    assert both[1] < 0.9 * both[0]
    rates = {group["lr"] for group in sharded.fused_optimizer.param_groups}
    assert rates == {0.5}
    state = sharded.state_dict()
    for name, before in codes.items():
        assert torch.equal(state[name], before)
    weights = [torch.empty_like(state["over.weight"]) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, state["over.weight"])
    assert all(torch.equal(each, weights[0]) for each in weights)


def check_codes_dealt_out(method, folder):
    """The same answers where each rank holds a chunk of the codes."""
    whole, sharded = sharded_model("row_wise"), sharded_model("row_wise")
    wanted = compress_(whole, method, counts=COUNTS, folder=folder)
    found = compress_(sharded, method, counts=COUNTS, folder=folder, shard_codes_above=1)
    assert str(found) == str(wanted)
    assert torch.equal(sharded(features()), whole(features()))
    own, all_of_it = (
        [b.nbytes for p in shardable(model) for n, b in p.named_buffers() if n != "filled"]
        for model in (sharded, whole)
    )
    ranks = dist.get_world_size()
    assert own and sum(own) <= sum(all_of_it) / ranks + 64 * len(own)
    state = sharded.state_dict()
    dealt = {n: each for n, each in state.items() if "route" in n and hasattr(each, "local_shards")}
    for name, each in dealt.items():
        for shard in each.local_shards():
            first = shard.metadata.shard_offsets[0]
            own_rows = whole.state_dict()[name][first : first + len(shard.tensor)]
            assert torch.equal(shard.tensor, own_rows), name
    assert dealt  # where tables are short, not all ranks hold some of them
    check_trains_on(sharded, {})


def check_refusals(folder):
    sharded = sharded_model("row_wise")
    before = sharded(features()).detach()
    rows = [each for name, each in sharded.state_dict().items() if "bags.embedding_bags.b" in name]
    for plan, more, kind, said in (
        (PQ(budget=50), {}, EmbcompError, "smallest pq reaches"),
        (PQ(budget="20%"), {"include": "nowhere"}, ConfigError, "include chooses none of bags "),
        (PQ(budget="20%"), {"counts": {"a": torch.ones(9)}}, ConfigError, "'a' has 700 ids"),
        (PQ(budget="20%"), {"folder": Path("/nowhere")}, EmbcompError, "/nowhere: No such file"),
        (PQ(budget="20%"), {"shard_codes_above": "5%"}, ConfigError, "shard_codes_above: expected"),
    ):
        with pytest.raises(kind, match=said):
            compress_(sharded, plan, **{"folder": folder, **more})
    for shard in rows[0].local_shards():
        if shard.metadata.shard_offsets[0] == 0:
            shard.tensor[17, 3] = torch.nan  # of one rank alone
    with pytest.raises(DataError, match="table 'b' of bags: row 17 holds NaN"):
        compress_(sharded, PQ(budget="20%"), folder=folder)
    with pytest.raises(ConfigError, match="give `compress_` the DistributedModelParallel"):
        compress_(sharded.module, PQ(budget="20%"))
    assert torch.equal(sharded(features()).detach(), before)  # row 17 is not asked for
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("ranks", "sharding", "method"),
    [
        (2, "row_wise", PQ(subvector_dim=4, num_codewords=16)),
        (2, "column_wise", LowDim(budget="50%")),
        (4, "row_wise", PQ(subvector_dim=8, num_codewords=16)),
    ],
    ids=["rows-pq", "columns-low_dim", "four-pq"],
)
def test_ranks_together_make_what_one_process_does_and_train_it_on(
    workers, ranks, sharding, method, tmp_path
):
    workers.run(ranks, check_same_as_unsharded, sharding, method, tmp_path)


@pytest.mark.parametrize(
    ("ranks", "method"),
    long_but(
        [(2, PQ(subvector_dim=4, num_codewords=16))],
        [
            (2, PQ(subvector_dim=4, num_codewords=16)),
            (4, LowDim(kept={"a": 300, "b": 100})),
            (4, LR2VQ(subvector_dim=4, num_codewords=16)),
        ],
    ),
)
def test_codes_are_dealt_out_where_they_are_large(workers, ranks, method, tmp_path):
    workers.run(ranks, check_codes_dealt_out, method, tmp_path)


def test_what_cannot_be_is_refused_on_all_ranks_and_changes_nothing(workers, tmp_path):
    workers.run(2, check_refusals, tmp_path)
