"""Exports that are killed leave nothing, and the one that ends is the one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.source_tree import ROOT

pytestmark = pytest.mark.slow


def test_killed_exports_leave_nothing_and_change_nothing(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/export_kills.py", "--kills", "3"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
