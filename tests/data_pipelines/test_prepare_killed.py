"""`prepare` ends the same, and leaves nothing behind, however often and whenever it is killed."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time

import pytest

from tests.helpers.long import KILLS
from tests.helpers.raw_logs import folder_bytes, write_criteo

pytestmark = pytest.mark.slow


SCRIPT = textwrap.dedent(
    """
    import sys
    from embcomp.data_pipelines.importers import text
    from embcomp.data_pipelines.prepare import prepare
    text.BLOCK_BYTES = 20_000
    raw, out, overwrite = sys.argv[1:]
    print("ready", flush=True)
    prepare(raw, out, importer="criteo", min_count=2, blocks_per_part=3, name="clicks",
            overwrite=overwrite == "yes")
    print("done", flush=True)
    """
)


def start(raw, out, overwrite="no"):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(raw), str(out), overwrite],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_random_moments_change_nothing(tmp_path):
    raw, home = tmp_path / "train.txt", tmp_path / "home"
    write_criteo(raw, 4000, values=400)
    process = start(raw, tmp_path / "whole")
    begin = time.monotonic()
    assert process.communicate()[0] == "done\n"
    duration = time.monotonic() - begin
    whole = folder_bytes(tmp_path / "whole")
    draw = random.Random(0)
    killed = finished = 0
    while killed < KILLS or not finished:
        # A finished dataset is prepared once more over itself, and killed while it is replaced.
        process = start(raw, home / "out", "yes" if finished else "no")
        wait = draw.uniform(0, duration) if killed < KILLS else None
        try:
            output, _ = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            killed += 1
        if "done" in output:
            finished += 1
            assert folder_bytes(home / "out") == whole
            assert [path.name for path in home.iterdir()] == ["out"]
        else:
            assert output == "", output
            assert not (home / "out").exists() or folder_bytes(home / "out") == whole
    assert finished
