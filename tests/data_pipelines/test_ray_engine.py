"""`prepare` on a real Ray cluster: the same bytes, also where a node is killed, and errors in one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.ray_engine import RayEngine
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import DataError
from tests.helpers.raw_logs import folder_bytes, write_criteo
from tests.helpers.ray_cluster import cluster, processes_of, skip_without_ray

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

OPTIONS = {"importer": "criteo", "min_count": 2, "blocks_per_part": 2, "name": "clicks"}
OPTIONS |= {"max_memory": "2GiB"}
SCRIPT = textwrap.dedent(
    """
    import sys
    from embcomp.data_pipelines.importers import text
    from embcomp.data_pipelines.prepare import prepare
    from embcomp.data_pipelines.preparing.ray_engine import RayEngine
    text.BLOCK_BYTES = 4000
    raw, out, address = sys.argv[1:]
    with RayEngine(address) as engine:
        prepare(raw, out, importer="criteo", min_count=2, blocks_per_part=2, name="clicks",
                max_memory="2GiB", engine=engine)
    """
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A raw log, and the bytes of the dataset that a run in this process makes of it."""
    skip_without_ray()
    folder = tmp_path_factory.mktemp("source")
    write_criteo(folder / "train.txt", 1000, values=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 4000)
        prepare(folder / "train.txt", folder / "out", **OPTIONS)
    return folder / "train.txt", folder_bytes(folder / "out")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)


@pytest.fixture(scope="module")
def running():
    """A head that runs nothing, and two nodes; then all is gone."""
    with cluster(2) as found:
        yield found
        folder = found.folder
    assert processes_of(folder) == []


@pytest.fixture
def engine(running):
    with RayEngine(running.address) as found:
        yield found


def seals(out, kind):
    return list((out.parent / f".{out.name}.partial" / "scratch" / kind).glob("*.json"))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_urls_and_memory_of_one_process(engine, source, tmp_path):
    """Through fsspec the digest is the same; what other processes cannot see is refused."""
    raw, whole = source
    info = prepare(f"file://{raw}", f"file://{tmp_path}/out", engine=engine, **OPTIONS)
    assert info.digest == DatasetInfo.model_validate_json(whole["dataset.json"]).digest
    found = folder_bytes(tmp_path / "out")
    assert {n: found[n] for n in whole if n != "dataset.json"} == {
        n: b for n, b in whole.items() if n != "dataset.json"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(DataError, match="machine .* does not see memory://bucket"):
        prepare(raw, "memory://bucket/out", engine=engine, **OPTIONS)


def test_errors_come_in_one_line(engine, source, tmp_path):
    write_criteo(tmp_path / "bad.txt", 60)
    with (tmp_path / "bad.txt").open("ab") as file:
        file.write(b"no row\n" * 40)
    with pytest.raises(DataError, match="are malformed") as caught:
        prepare(tmp_path / "bad.txt", tmp_path / "out", engine=engine, **OPTIONS)
    assert "Traceback" not in str(caught.value) and "(on machine " in str(caught.value)
    with pytest.raises(DataError, match="no machine of the Ray cluster has the 64.0 GiB"):
        prepare(source[0], tmp_path / "out", engine=engine, **OPTIONS | {"max_memory": "64GiB"})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_a_killed_call_goes_on_with_ray_or_without(running, engine, source, tmp_path):
    raw, whole = source
    for name in ("ray", "local"):
        out = tmp_path / name
        command = [sys.executable, "-c", SCRIPT, str(raw), str(out), running.address]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda out=out: len(seals(out, "counts")) >= 5)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        news: list[str] = []
        options = OPTIONS | ({"engine": engine} if name == "ray" else {})
        prepare(raw, out, report=news.append, **options)
        assert news == ["going on with what an earlier, interrupted run left"]
        assert folder_bytes(out) == whole


def test_a_node_with_other_versions_is_refused_by_name(running, source, tmp_path):
    fake = tmp_path / "packages" / "polars-0.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: polars\nVersion: 0.9.9\n")
    paths = ":".join([str(fake.parent), *filter(None, sys.path)])
    running.add_nodes(1, {"PYTHONPATH": paths})
    try:
        with (
            RayEngine(running.address) as engine,
            pytest.raises(
                DataError,
                match=r"machine [\d.]+ of the Ray cluster has polars 0.9.9, this one \d",
            ),
        ):
            prepare(source[0], tmp_path / "out", engine=engine, **OPTIONS)
    finally:
        running.kill_node(len(running.nodes) - 1)
    assert not (tmp_path / "out").exists()


def test_a_node_killed_half_way_changes_nothing(running, engine, source, tmp_path):
    """The last test of the cluster: one node less is left."""
    import ray

    raw, whole = source
    out = tmp_path / "out"
    killer = threading.Thread(
        target=lambda: (wait_until(lambda: len(seals(out, "counts")) >= 8), running.kill_node(1))
    )
    killer.start()
    info = prepare(raw, out, engine=engine, **OPTIONS)
    killer.join()
    assert info.raw_rows == 1000
    assert folder_bytes(out) == whole
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    assert running.nodes[1].poll() is not None


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
