"""What a finished run took and what its tables take in serving, measured in the process that trained it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.io.digests import sha256_of_file
from embcomp.search.evaluators.latency import tables_microseconds
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.loading import load_model

PACKAGES = ("embcomp", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "optuna", "numpy")


def measure_run(run: Path, scores: Path, *, idle_memory: int | None) -> dict[str, Any]:
    """Time look-ups of the best weights, and say on what and with what they were trained.

    Args:
        run: the folder of a run that has just ended in this process.
        scores: the file of its kept scores.
        idle_memory: resident bytes before it began, libraries included; None for a run that another
            process trained, whose memory is not known.

    Returns:
        `look_up_microseconds` (median, one batch of validation rows, in the form that is served),
        `peak_memory` and `idle_memory` in bytes (of this process; of the device as well on CUDA),
        `versions`, `hardware`, and `scores_sha256` of the kept scores.
    """
    config = RunFolder(run).config()
    info = DatasetInfo.load(config.data.path)
    measured: dict[str, Any] = {
        "peak_memory": None if idle_memory is None else peak_memory(),
        "idle_memory": idle_memory,
        "versions": versions(),
        "hardware": hardware(),
        "scores_sha256": sha256_of_file(scores) if scores.exists() else None,
    }
    tables = dict(load_model(run).eval().named_children()).get("tables")
    if tables is not None:
        measured["look_up_microseconds"] = tables_microseconds(tables, config, info)
    return measured


def peak_memory() -> int:
    """The most bytes that this process held: resident ones, and the device's on CUDA."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return kilobytes * 1024 + device


def versions() -> dict[str, str]:
    """Of Python, and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, its cores, the threads of a rank, and the devices."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        **({"devices": devices} if devices else {}),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
