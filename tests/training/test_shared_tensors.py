"""Tensors that one rank makes and all ranks read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embcomp.training.distributed.process import Process, process_group
from embcomp.training.stages.shared_tensors import SharedTensors

pytestmark = pytest.mark.slow


def share(folder: Path) -> tuple[dict[str, torch.Tensor], bool, int]:
    """What a rank reads, whether it made it, and how much lies in the folder meanwhile."""
    made = []

    def make():
        made.append(True)
        return {"rank": torch.tensor(dist.get_rank() + 7), "t": torch.arange(12).view(3, 4).t()}

    with process_group("cpu") as process:
        tensors = SharedTensors(folder, process)
        found = tensors.get("numbers", make)
        files = len(list(folder.glob(".shared-*")))
        tensors.release()
        dist.barrier()  # the first rank removes the files after the others may have gone on
        assert not list(folder.glob(".shared-*"))
        return {name: tensor.clone() for name, tensor in found.items()}, bool(made), files


def test_all_ranks_read_what_the_first_one_made_and_leave_nothing(workers, tmp_path):
    answers = workers.run(2, share, tmp_path / "stage")
    for found, _, files in answers:
        assert found["rank"] == 7
        assert torch.equal(found["t"], torch.arange(12).view(3, 4).t())
        assert files == 1
    assert [made for _, made, _ in answers] == [True, False]


def test_ranks_of_a_host_have_one_copy_in_memory(workers, tmp_path):
    assert all(workers.run(2, maps_a_file, tmp_path))


def maps_a_file(folder: Path) -> bool:
    """Whether a tensor that was read lies in the pages of its file."""
    with process_group("cpu") as process:
        tensors = SharedTensors(folder, process)
        found = tensors.get("rows", lambda: {"rows": torch.ones(1 << 16, 4)})["rows"]
        address = found.data_ptr()
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in maps if ".shared-rows" in line]
        tensors.release()
        return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_one_process_keeps_its_own_and_writes_nothing(tmp_path):
    process = Process(rank=0, world_size=1, device=torch.device("cpu"))
    own = torch.ones(3)
    tensors = SharedTensors(tmp_path / "stage", process)
    assert tensors.get("rows", lambda: {"rows": own})["rows"] is own
    assert not (tmp_path / "stage").exists()
