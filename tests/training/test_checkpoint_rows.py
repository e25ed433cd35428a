"""Rows of a checkpoint by range: the same as torch reads, whatever sharding wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from embcomp.errors import CheckpointError
from embcomp.training.checkpoint import checkpoint_folder, load_whole, saved_steps
from embcomp.training.distributed.process import process_group
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from tests.helpers.training_cases import toy_config, train_on_ranks, write_dataset

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor")


def test_ranges_and_single_rows_are_those_that_were_saved(tmp_path):
    tensors = {
        "rows": torch.arange(4000.0).reshape(1000, 4),
        "narrow": torch.arange(4000.0).reshape(1000, 4)[:, :3],
        "half": torch.arange(40.0).reshape(10, 4).half(),
        "codes": torch.arange(200, dtype=torch.uint8),
        "number": torch.tensor(7),
        "cube": torch.arange(24.0).reshape(2, 3, 4),
    }
    with process_group("cpu"):
        save({"model": tensors, "optim": {"rows": torch.zeros(3)}}, checkpoint_id=str(tmp_path))
    there = CheckpointTensors(tmp_path)
    assert there.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(there.tensor(name), tensor), name
    for name in ("rows", "narrow", "codes"):
        source, tensor = there.rows(name), tensors[name]
        assert torch.equal(source.read(7, 90), tensor[7:90])
        assert torch.equal(source.range(50, 150).read(5, 5), tensor[:0])
        ids = torch.tensor([0, 1, 3, 100, 150, 199])
        assert torch.equal(source.take(ids), tensor[ids])
        assert torch.equal(source.range(50, 150).take(ids[:3]), tensor[50 + ids[:3]])
    with pytest.raises(CheckpointError, match="other is not in it"):
        there.rows("other")


def test_a_shard_of_another_layout_is_refused(tmp_path):
    with process_group("cpu"):
        save({"model": {"t": torch.rand(4, 3).t()}}, checkpoint_id=str(tmp_path))
    with pytest.raises(CheckpointError, match="another layout"):
        CheckpointTensors(tmp_path).rows("t").read(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_every_sharding_gives_the_rows_that_torch_reads(workers, tmp_path, sharding):
    options = (
        "train.row_optimizer.name=adagrad",
        f"train.sharding={sharding}",
        "train.max_steps=2",
    )
    config = toy_config(write_dataset(tmp_path / "data"), *options)
    workers.run(2, train_on_ranks, config, tmp_path / "runs")
    checkpoints = tmp_path / "runs" / "toy" / "checkpoints"
    folder: Path = checkpoint_folder(checkpoints, saved_steps(checkpoints)[-1])
    there = CheckpointTensors(folder)
    whole = {name: torch.empty(shape) for name, shape in there.shapes.items()}
    load_whole(folder, whole)
    for name, tensor in whole.items():
        assert torch.equal(there.tensor(name), tensor)
        if tensor.dim() == 2:
            middle = slice(len(tensor) // 3, len(tensor) // 3 * 2 + 1)
            assert torch.equal(there.rows(name).read(middle.start, middle.stop), tensor[middle])
