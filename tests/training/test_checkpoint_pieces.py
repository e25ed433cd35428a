"""Checkpoints in pieces: the same tensors, and no table in memory twice on its way."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.profiler import ProfilerActivity, profile

from embcomp.training import load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from embcomp.training.distributed.process import process_group
from embcomp.training.files import checkpoint_files
from embcomp.training.files.checkpoint_files import (
    CheckpointPlanner,
    CheckpointReader,
    PiecewisePlanner,
)
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from tests.helpers.training_cases import toy_config, train_on_ranks, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]

PIECE = 1 << 15


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_PIECE_BYTES", PIECE)


def peak_of(call) -> int:
    """The most that torch's allocator held at once beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_long_tensors_are_written_and_read_in_pieces(tmp_path, small_pieces):
    # A view of more memory, as a table is of its kernel's: torch copies such a one to write it.
    whole = torch.arange(2_000_000.0).reshape(100_000, 20)
    tensors = {
        "rows": whole[10:90_000],
        "state": whole.view(-1)[5:1_000_007],
        "short": torch.arange(10.0),
        "number": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }
    size = tensors["rows"].nbytes
    with process_group("cpu"):
        state = {"model": tensors}
        planner = PiecewisePlanner()
        used = peak_of(lambda: save(state, checkpoint_id=str(tmp_path), planner=planner))
        assert used < size // 10
        stored = FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata
        assert len(stored["model.rows"].chunks) > 100
        assert len(stored["model.short"].chunks) == 1
        found = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
        read = {"model": found}
        reader = CheckpointReader(tmp_path)
        used = peak_of(lambda: load(read, storage_reader=reader, planner=CheckpointPlanner()))
        assert used < size // 10
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    rows = CheckpointTensors(tmp_path).rows("rows")
    for start, stop in ((0, 1), (77, 78), (100, 50_000), (80_000, 89_990), (4_000, 4_000)):
        assert torch.equal(rows.read(start, stop), tensors["rows"][start:stop])


def test_pieces_are_few_however_long_a_shard_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_PIECE_BYTES", 1)
    rows = torch.rand(5_000, 2)
    with process_group("cpu"):
        save({"model": {"rows": rows}}, checkpoint_id=str(tmp_path), planner=PiecewisePlanner())
    stored = FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata["model.rows"]
    assert 1_000 < len(stored.chunks) <= 2 * 1_024
    assert torch.equal(CheckpointTensors(tmp_path).tensor("rows"), rows)


@pytest.mark.long
def test_a_run_goes_on_from_pieces_on_other_ranks(workers, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data")
    more = ("train.checkpoint_every=2", "train.eval_every=2", "train.sharding=row_wise")
    config = toy_config(data, "train.max_steps=4", *more)
    train(config, runs=tmp_path / "whole", quiet=True)
    monkeypatch.setattr(checkpoint_files, "_PIECE_BYTES", 256)
    runs = tmp_path / "pieces"
    train(config, runs=runs, quiet=True)
    checkpoints = runs / "toy" / "checkpoints"
    for name, tensor in load_model(tmp_path / "whole" / "toy").state_dict().items():
        assert torch.equal(load_model(runs / "toy").state_dict()[name], tensor)
    (runs / "toy" / "report.json").unlink()
    last = checkpoint_folder(checkpoints, saved_steps(checkpoints)[-1])
    last.rename(tmp_path / "away")
    workers.run(2, train_on_ranks, config, runs)
    for name, tensor in load_model(tmp_path / "whole" / "toy").state_dict().items():
        torch.testing.assert_close(load_model(runs / "toy").state_dict()[name], tensor)
