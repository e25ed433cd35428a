"""A table of 200 MB: killed as `kill -9` does, gone on with, and never in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import embcomp

pytestmark = pytest.mark.slow
ROWS, DIM = 800_000, 64
GROWTH = 64 << 20  # bytes; the table takes 205 MB, its artefact 54


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    words = ["compress", str(source), str(out), "--budget", "30%", "--method", "full"]
    return subprocess.Popen(
        [sys.executable, "-m", "embcomp.cli", *words, "--dtype", "int8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def anonymous(process: subprocess.Popen[str]) -> int:
    """Bytes of a process that no file holds; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.long
def test_a_process_that_was_killed_goes_on_in_little_memory(tmp_path):
    source, out = tmp_path / "big.npy", tmp_path / "out"
    rows = np.lib.format.open_memmap(source, "w+", np.float32, (ROWS, DIM))
    rows[::1000] = np.arange(DIM, dtype=np.float32)
    rows.flush()
    kept = tmp_path / ".out.compressing"
    first = start(source, out)
    while len(list(kept.glob("*/*.safetensors"))) < 10:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = {path: path.stat().st_mtime_ns for path in kept.glob("*/*.safetensors")}
    second, before, peak = start(source, out), None, 0
    while second.poll() is None:
        now = anonymous(second)
        peak = max(peak, now)
        if before is None and len(list(kept.glob("*/*.safetensors"))) > len(done):
            before = now
            assert all(path.stat().st_mtime_ns == at for path, at in done.items())
        time.sleep(0.02)
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert "gone on from what an interrupted command had done" in errors
    assert before is not None
    assert peak - before < GROWTH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.npy", "out"]
    found = embcomp.load(out, rows="torch").lookup("big", torch.tensor([0, 1, 799_000]))
    assert torch.allclose(found[[0, 2]], torch.arange(DIM).float(), atol=0.2)
    assert not found[1].any()
