"""A run takes no more memory than `embcomp plan` says."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.schema import CategoricalFeature, DatasetInfo, NumericFeature
from embcomp.planning.config_plan import plan_config, sizes_of
from embcomp.planning.placement import PlacementRequest, place_stages, smallest_memory
from embcomp.tables.budget import RESERVE, reserved_bytes
from embcomp.training.build import build_model, shard_model
from embcomp.training.distributed.process import process_group
from embcomp.training.optim.optimizers import Optimizers
from embcomp.training.optim.precision import Precision
from embcomp.training.steps import PlainSteps, Updates

pytestmark = pytest.mark.slow
ROWS, BATCH = 40_000, 16
METHODS = [
    {"name": "full"},
    {"name": "qr", "divisor": 4},
    {"name": "hash", "ratio": 0.5},
    {"name": "low_dim", "width": 8},
    {"name": "optembed"},
    {"name": "matryoshka"},
    {"name": "low_rank", "latent_dim": 8, "bias": True},
]


def config_of(method):
    return parse_config(
        {
            "name": "toy",
            "data": {"path": "none", "batch_size": BATCH},
            "tables": {"embedding_dim": 16, "method": method},
            "model": "fm",
            "train": {"row_optimizer": {"name": "rowwise_adagrad"}},
        }
    )


def toy_info():
    return DatasetInfo(
        name="toy",
        numeric=[NumericFeature(name="I0")],
        categorical=[CategoricalFeature(name=f"C{i}", num_embeddings=ROWS) for i in range(3)],
        splits={},
    )


def toy_batch():
    ids = torch.randint(0, ROWS, (3 * BATCH,))
    lengths = torch.ones(3 * BATCH, dtype=torch.int32)
    sparse = KeyedJaggedTensor(keys=["C0", "C1", "C2"], values=ids, lengths=lengths)
    labels = torch.randint(0, 2, (BATCH,)).float()
    return Batch(dense=torch.rand(BATCH, 1), sparse=sparse, labels=labels)


def trained_peak(config, info):
    """The most that torch's allocator held at once while a model was trained, the model included."""
    gc.collect()  # what earlier cases left would be freed, and counted, here
    with process_group("cpu") as process:
        with recorded() as building:
            model = shard_model(build_model(config, info, torch.device("meta")), config, process)
            model.train()
            updates = Updates(Optimizers(model, config.train), None)
            steps = PlainSteps(model, updates, process, Precision(False, process.device))
        with recorded() as training:
            for _ in range(3):
                steps.run(iter([toy_batch()]))
    return allocated(building)[0] + allocated(training)[1]


def recorded():
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def allocated(profiler):
    """Bytes that are left, and the most at once."""
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_stays_within_what_was_planned(method):
    config, info = config_of(method), toy_info()
    plan = plan_config(config, sizes_of(info))
    query = PlacementRequest(
        world_size=1,
        device_memory=1 << 26,
        device="cpu",
        optimizer=plan.optimizer,
        batch_size=BATCH,
        reserved=reserved_bytes(RESERVE, 1 << 26),
        reserve=RESERVE,
        pooling_factors=plan.pooling_factors(),
    )
    tables = plan.on_meta()
    assert place_stages(tables, query)  # which attaches the optimizer
    least = smallest_memory(tables, query, 1 << 24)
    assert least is not None
    peak = trained_peak(config, info)
    assert least // 2 < peak <= least
