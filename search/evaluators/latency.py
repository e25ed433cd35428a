"""How long a candidate's tables take to look up one batch of validation rows."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.training.build import build_model
from embcomp.training.distributed.process import choose_device

_WARM_UP = 3
_REPEATS = 21


@torch.no_grad()
def look_up_microseconds(config: TrainConfig) -> float:
    """Median time of one forward pass of the embedding tables, on one device, unsharded.

    The weights are fresh, as they do not matter. Other work on the machine does: measure with one
    candidate at a time where small differences count.
    """
    info = DatasetInfo.load(config.data.path)
    device = choose_device(config.train.device)
    tables = build_model(config, info, torch.device("cpu")).tables
    assert tables is not None
    return tables_microseconds(tables.to(device).eval(), config, info)


@torch.no_grad()
def tables_microseconds(tables: nn.Module, config: TrainConfig, info: DatasetInfo) -> float:
    """Median time of one forward pass of embedding tables, where they are.

    Args:
        tables: the tables, in the mode of evaluation.
        config: the run, of whose batches one is looked up.
        info: its dataset.
    """
    device = choose_device(config.train.device)
    tables.to(device)
    rows = min(config.data.batch_size, info.split("valid").rows)
    loader = ParquetLoader(info, "valid", batch_size=rows, drop_last=False, prefetch=0)
    features = next(iter(loader)).to(device).sparse
    times = []
    for repeat in range(_WARM_UP + _REPEATS):
        begun = time.perf_counter()
        tables(features)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= _WARM_UP:
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6
