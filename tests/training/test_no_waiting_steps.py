"""Whole training steps, with sharded tables, optimizers and the loss record, look at no value of theirs."""

from __future__ import annotations

import pytest

from embcomp.layers import host_values
from embcomp.training.distributed.process import process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.reporting.console import RunConsole
from tests.helpers.dispatched import Dispatched
from tests.helpers.training_cases import first_stage, toy_config, write_dataset

pytestmark = pytest.mark.slow

ON_THE_HOST = (
    "torch/optim/",
    "fbgemm_gpu/",
    "torch/autograd/graph.py",
    "training/reporting/loss_record.py",
)
"""What lies on the host in any case: the step counters of Adam and FBGEMM, the factor by which
DistributedDataParallel multiplies gradients. Losses are read at once on a CPU alone."""

METHODS = {
    "full": "full",
    "qr": "{name: qr, divisor: 5}",
    "optembed": "optembed",
    "lr2vq": "{name: lr2vq, subvector_dim: 4, num_codewords: 4, from_dense: false}",
    "dnis": "{name: dnis_search, serve_bytes: 100}",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_a_run_looks_at_no_value(method, tmp_path, monkeypatch):
    monkeypatch.setattr(host_values, "AT_HAND", frozenset())
    config = toy_config(
        write_dataset(tmp_path),
        f"tables.method={METHODS[method]}",
        "train.row_optimizer.weight_decay=0.1",
        "train.clip_norm=1.0",
        "train.warmup_steps=4",
    )
    with quiet_libraries(), process_group("cpu") as process:
        training = first_stage(config, process)
        training.console = RunConsole(enabled=False, name="")
        training.batches.set_epoch(0)
        batches = iter(training.batches)
        training._train_step(batches)  # makes what is made once
        with Dispatched() as seen:
            training._train_step(batches)
    assert [read for read in seen.reads if not any(place in read for place in ON_THE_HOST)] == []
