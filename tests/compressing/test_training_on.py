"""What `compress_` leaves trains on under DistributedModelParallel, whose checkpoints are sources."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import (
    EmbeddingShardingPlanner,
    ParameterConstraints,
    Topology,
)
from torchrec.optim import RowWiseAdagrad

from embcomp import LR2VQ, PQ, LowRank, compress_, load
from embcomp.collection.table_row_types import RowTypes
from embcomp.compressing.approximation import method_of
from embcomp.compressing.source_compression import SourceJob, compress_source, open_job

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_rank():
    if dist.is_initialized():
        yield
        return
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model():
    torch.manual_seed(0)
    config = EmbeddingBagConfig(name="t", num_embeddings=400, embedding_dim=8, feature_names=["t"])
    return nn.Sequential(EmbeddingBagCollection(tables=[config]))


def features():
    return KeyedJaggedTensor(
        keys=["t"], values=torch.arange(400), lengths=torch.ones(400, dtype=torch.int32)
    )


@pytest.mark.parametrize(
    "method",
    [
        PQ(subvector_dim=4, num_codewords=16),
        LR2VQ(subvector_dim=4, num_codewords=16),
        LowRank(latent_dim=4),
    ],
    ids=lambda method: method.name,
)
def test_rows_train_on_with_fused_optimizers_while_codes_rest(method):
    compressed = compress_(model(), method).model
    before = compressed[0](features()).values().detach()
    codes = {n: b.clone() for n, b in compressed.named_buffers() if n.endswith("codes")}
    for rows in compressed[0].inner_collections():
        _apply_optimizer_in_backward(RowWiseAdagrad, rows.parameters(), {"lr": 0.05})
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    fused = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        constraints={table.name: fused for table in compressed[0].physical_tables},
    ).collective_plan(compressed, get_default_sharders(), dist.group.WORLD)
    sharded = DistributedModelParallel(compressed, device=torch.device("cpu"), plan=plan)
    sharded.load_state_dict(state)  # TorchRec draws the rows of fused tables anew
    assert torch.allclose(sharded(features()).values().detach(), before, atol=1e-6)
    target, losses = torch.ones(400, 8), []
    for _ in range(20):
        loss = (sharded(features()).values() - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
    assert losses[-1] < 0.8 * losses[0]
    after = {n: b for n, b in sharded.module.named_buffers() if n.endswith("codes")}
    assert [torch.equal(a, b) for a, b in zip(codes.values(), after.values())].count(False) == 0
    assert len(after) == len(codes)


def test_a_sharded_checkpoint_of_torchrec_is_a_source(tmp_path):
    torch.manual_seed(0)
    names = ("user", "item")
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=200 + n, embedding_dim=8, feature_names=[name])
        for n, name in enumerate(names)
    ]
    network = nn.Sequential(EmbeddingBagCollection(tables=configs))
    sides = [ParameterConstraints(sharding_types=[kind]) for kind in ("table_wise", "column_wise")]
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"), constraints=dict(zip(names, sides))
    ).collective_plan(network, get_default_sharders(), dist.group.WORLD)
    sharded = DistributedModelParallel(network, device=torch.device("cpu"), plan=plan)
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=tmp_path / "checkpoint")
    job = SourceJob(
        source=tmp_path / "checkpoint",
        method=method_of("full")(),
        budget="100%",
        types=RowTypes(),
    )
    compress_source(open_job(job), tmp_path / "out")
    serving = load(tmp_path / "out")
    for n, name in enumerate(names):
        ids = torch.arange(200 + n)
        batch = KeyedJaggedTensor(
            keys=list(names),
            values=ids,
            lengths=torch.tensor([each == name for each in names])
            .int()
            .repeat_interleave(len(ids)),
            stride=len(ids),
        )
        assert torch.equal(serving.lookup(name, ids), sharded(batch)[name].detach())
