"""`prepare` on a real Ray cluster: the same bytes, also where a node is killed, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.prepare import prepare
from tests.helpers.raw_logs import folder_bytes, write_criteo
from tests.helpers.ray_cluster import cluster, processes_of, skip_without_ray

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

OPTIONS = {"importer": "criteo", "min_count": 2, "blocks_per_part": 2, "name": "clicks"}
OPTIONS |= {"max_memory": "2GiB"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A raw log, and the bytes of the dataset that a run in this process makes of it."""
    folder = tmp_path_factory.mktemp("source")
    write_criteo(folder / "train.txt", 2000, values=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 4000)
        prepare(folder / "train.txt", folder / "out", **OPTIONS)
    return folder / "train.txt", folder_bytes(folder / "out")


@pytest.fixture(scope="module")
def nodes():
    """A head and two nodes; then all is gone."""
    with cluster(2) as running:
        yield running
        folder = running.folder
    assert processes_of(folder) == []


def test_an_engine_that_is_not_there_is_said_in_seconds(tmp_path):
    skip_without_ray()
    write_criteo(tmp_path / "train.txt", 20)
    command = [
        sys.executable,
        "-m",
        "embcomp.cli",
        "prepare",
        "criteo",
        str(tmp_path / "train.txt"),
    ]
    command += [str(tmp_path / "out"), "--engine", "ray", "--address", "127.0.0.1:9"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - begin < 30
    assert done.returncode != 0
    assert "no Ray cluster answers at 127.0.0.1:9" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
