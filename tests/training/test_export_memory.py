"""What an export holds in memory beside what a small one holds, seen by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.training import train
from tests.helpers.training_cases import toy_config

pytestmark = pytest.mark.slow

MIB = 1 << 20

CHILD = """
import json, sys, threading
from pathlib import Path
from embcomp.serving.artefact_report import inspect_artefact
from embcomp.training.export.export import export_run

def own_memory():  # without pages of mapped files, which the system drops where it needs room
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * int(lines["RssAnon"].split()[0])

def added(function):
    before, peak, ended = own_memory(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, own_memory())
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    ended.set()
    watcher.join()
    return peak - before

folder = Path(sys.argv[1])
found = {}
for size in ("small", "large"):
    for dtype in ("fp32", "int8"):
        out = folder / f"{size}-{dtype}"
        export = added(lambda: export_run(folder / size, out, row_type=dtype, rows=256))
        found[f"{size} {dtype}"] = [export, added(lambda: inspect_artefact(out))]
print(json.dumps(found))
"""


def test_an_export_and_an_inspection_hold_no_table(tmp_path):
    """A table of 73 MiB, beside which the vocabulary of its 50,000 values is small."""
    data, values = tmp_path / "data", (50_000, 60, 8)
    write_toy_dataset(data, rows=(50_000, 256, 256), num_values=values, row_group_rows=50_000)
    for name, dim in (("small", 4), ("large", 384)):
        settings = [f"name={name}", f"tables.embedding_dim={dim}", "data.batch_size=25000"]
        config = toy_config(data, *settings, "model={name: fm}")
        train(config, runs=tmp_path, quiet=True)
    command = [sys.executable, "-c", CHILD, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = (tmp_path / "large-fp32/model.safetensors").stat().st_size
    assert size > 70 * MIB
    for name, peaks in found.items():
        assert max(peaks) < max(found["small fp32"]) + 0.4 * size, (name, found)
