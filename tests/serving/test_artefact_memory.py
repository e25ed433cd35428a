"""What loading an artefact holds in memory, seen by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from embcomp import save
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import plain_tables
from tests.helpers.backends_under_test import CASES
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

MIB = 1 << 20

CHILD = """
import json, sys
from embcomp import load

def resident(peak):
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])

def added(small, large, options):
    load(small, **options)  # libraries and their pools
    before = resident(False)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    loaded = load(large, **options)
    return resident(True) - before

print(json.dumps([added(*sys.argv[1:3], options) for options in json.loads(sys.argv[3])]))
"""


@pytest.mark.parametrize("case", long_but(["coded"], ["full", "coded"]))
def test_loading_peaks_near_the_size_of_the_artefact_and_mapping_near_nothing(tmp_path, case):
    """An artefact that is nearly all rows, or nearly all codes, which are no rows."""
    rows = {"full": (1 << 20, 1 << 19, 9), "coded": (6 << 20, 2 << 20, 9)}[case]
    for name, sizes in (("small", (60, 90, 75)), ("large", rows)):
        save(pooled(CASES[case], plain_tables(16, sizes)), tmp_path / name)
    size = (tmp_path / "large/model.safetensors").stat().st_size
    options = [
        {"rows": kind, "verify": verify, "mmap": mmap}
        for kind in ("fbgemm", "torch")
        for verify in (True, False)
        for mmap in (False, True)
    ]
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for option, peak in zip(options, json.loads(done.stdout)):
        allowed = 16 * MIB if option["mmap"] and case == "full" else 1.1 * size + 4 * MIB
        assert peak < allowed, (option, peak, size)
