"""Runs whose tables do not fit into what a rank may have, and do fit into what four may have."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.source_tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(700)]


@pytest.mark.parametrize("method", ["pq", "dnis", "optembed"])
def test_four_ranks_train_hand_over_export_and_evaluate_what_one_cannot_hold(method, tmp_path):
    found = tmp_path / "found.jsonl"
    command = [sys.executable, "benchmarks/rank_limit.py", "--methods", method, "--against", ""]
    size = ["--mib", "400", "--json", str(found)]
    done = subprocess.run(
        [*command, *size], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    case = json.loads(found.read_text())
    assert case["train"]["died_of"] == case["export"]["died_of"] == ""
    assert case["train"]["auc"] == pytest.approx(case["export"]["auc"], abs=1e-3)
    assert max(case["train"]["peaks"].values()) <= case["limit_bytes"]
    assert case["limit_bytes"] < case["overhead_bytes"] + case["table_bytes"]
    assert case["one_rank"]["died_of"]
