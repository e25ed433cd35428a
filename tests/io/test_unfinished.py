"""Exports that are killed, or that meet a full disk, leave nothing that a later one does not remove."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, DataError
from embcomp.io.inner_paths import inner_path
from embcomp.io.unfinished import remove_unfinished, unfinished_folder
from embcomp.serving.artefact_folder import new_folder
from embcomp.training import train
from tests.helpers.long import long_but
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

WRITER = """
import sys, time
from pathlib import Path
from embcomp.io.unfinished import unfinished_folder
with unfinished_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("of it")
    print(folder, flush=True)
    time.sleep(120)
"""


def writer(path):
    """A process that is in the middle of a folder, and that folder."""
    command = [sys.executable, "-c", WRITER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    dead, left = writer(tmp_path / "artefact")
    live, own = writer(tmp_path / "other")
    try:
        dead.kill()
        dead.wait()
        assert left.exists()
        for name in (".artefact.settings", ".mine.unfinished", ".a.12345678.unfinished.old"):
            (tmp_path / name).mkdir()
        with new_folder(tmp_path / "artefact") as folder:
            assert not left.exists() and (own / "half").exists()
            (folder / "whole").write_text("")
        names = {entry.name for entry in tmp_path.iterdir()}
        kept = {".artefact.settings", ".mine.unfinished", ".a.12345678.unfinished.old"}
        assert names == {"artefact", own.name} | kept
    finally:
        live.kill()
        live.wait()
    remove_unfinished(tmp_path)
    assert not own.exists()


def test_a_finished_folder_is_not_locked_and_not_removed(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    remove_unfinished(tmp_path)
    assert (tmp_path / "a/x").read_text() == "x"
    with pytest.raises(KeyError), unfinished_folder(tmp_path / "b"):
        raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    train(toy_config(write_dataset(folder / "data")), runs=folder, quiet=True)
    return folder / "toy"


LIMITED = """
import resource, signal, sys
from embcomp.cli import main
import embcomp.training.export.export, embcomp.serving.exported_program
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["embcomp", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("format", long_but(["safetensors"], ["safetensors", "pt2"]))
def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(run, tmp_path, format):
    """No file may grow beyond a limit, which libraries meet as they meet a full disk."""

    def export(limit, name):
        command = [sys.executable, "-c", LIMITED, str(limit), "export", str(run)]
        command += [str(tmp_path / name), "--format", format]
        return subprocess.run(command, timeout=300, capture_output=True, text=True, check=False)

    assert export(1 << 40, "whole").returncode == 0
    target = {"safetensors": "model.safetensors", "pt2": "program.pt2"}[format]
    done = export((tmp_path / "whole" / target).stat().st_size - 1, "a")
    assert done.returncode == 1, done.stderr
    assert "a could not be written: " in done.stderr.replace("\n", " ")
    assert "File too large" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and "frame #" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "..", ".", "a/\0b"])
def test_paths_that_leave_their_folder_are_refused(path):
    with pytest.raises(ValueError, match="stays inside the folder"):
        inner_path(path)
    assert inner_path("vocabulary/a..b.parquet") == "vocabulary/a..b.parquet"


@pytest.mark.parametrize("path", ["../x", "/tmp/x", "vocabulary/../../x"])
@pytest.mark.parametrize("place", ["vocabulary", "files"])
def test_a_description_that_names_something_outside_is_refused(tmp_path, place, path):
    data = write_dataset(tmp_path / "data")
    (tmp_path / "x").write_text("outside")
    content = json.loads((data / "dataset.json").read_text())
    if place == "vocabulary":
        content["categorical"][0]["vocabulary"] = path
    else:
        content["splits"]["train"]["files"][0] = path
    (data / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="relative path that stays inside the folder"):
        DatasetInfo.load(data)


def test_a_vocabulary_that_would_replace_another_file_is_refused(run, tmp_path):
    from embcomp.serving.artefact_folder import copy_dataset

    info = DatasetInfo.load(run.parent / "data")
    info.categorical[0].vocabulary = "model.safetensors"
    (tmp_path / "model.safetensors").write_text("tensors")
    with pytest.raises(ArtefactError, match="'C1' .*model.safetensors'; expected a .parquet file"):
        copy_dataset(info, None, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "tensors"
