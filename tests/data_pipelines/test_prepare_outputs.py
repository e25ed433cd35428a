"""Where a prepared dataset lands, and what is left when the process dies at the worst moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import encode_pass, passes, workspace as workspace_module
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import DataError
from tests.data_pipelines.test_prepare_resume import CALLED_IN, KilledError, die_after
from tests.helpers.raw_logs import folder_bytes, write_criteo

pytestmark = pytest.mark.slow

OPTIONS = {"importer": "criteo", "min_count": 2, "blocks_per_part": 2, "name": "clicks"}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)
    (tmp_path / "raw").mkdir()
    write_criteo(tmp_path / "raw" / "train.txt", 120, values=90)
    return tmp_path / "raw" / "train.txt"


@pytest.fixture
def whole(raw, tmp_path):
    prepare(raw, tmp_path / "whole" / "out", **OPTIONS)
    return folder_bytes(tmp_path / "whole" / "out")


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_a_dataset_lands_where_a_link_points_and_the_link_stays(raw, whole, tmp_path, exists):
    home = tmp_path / "home"
    home.mkdir()
    if exists:
        (tmp_path / "disk" / "real").mkdir(parents=True)
    (home / "link").symlink_to(tmp_path / "disk" / "real")
    for overwrite in (False, True):
        info = prepare(raw, home / "link", overwrite=overwrite, **OPTIONS)
        assert (home / "link").is_symlink()
        assert folder_bytes(tmp_path / "disk" / "real") == whole
        assert info.folder == home / "link"
        assert entries(home) == ["link"]
        assert entries(tmp_path / "disk") == ["real"]
    with pytest.raises(DataError, match="link already holds a dataset"):
        prepare(raw, home / "link", **OPTIONS)


def test_a_relative_link_and_a_link_in_a_path_are_followed(raw, whole, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    (tmp_path / "disk" / "link").symlink_to("other/real")
    monkeypatch.chdir(tmp_path)
    prepare(raw, Path("data/link"), **OPTIONS)
    assert folder_bytes(tmp_path / "disk" / "other" / "real") == whole


def test_outputs_that_cannot_be_are_refused_before_any_work(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(passes.PreparePasses, "run", lambda self: pytest.fail("work began"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"loop"):
        prepare(raw, tmp_path / "loop", **OPTIONS)
    with pytest.raises(DataError, match=r"cannot be made in .*train\.txt: Not a directory"):
        prepare(raw, raw / "out", **OPTIONS)
    monkeypatch.setattr(workspace_module.os.path, "ismount", lambda path: True)
    (tmp_path / "volume").mkdir()
    with pytest.raises(DataError, match="mount point"):
        prepare(raw, tmp_path / "volume", **OPTIONS)


def die_at_rename(monkeypatch, number, *, after):
    """The process dies before or after the n-th move of a folder."""
    rename, seen = Path.rename, []

    def dying(self, target):
        if self.is_dir():
            seen.append(1)
            if len(seen) == number and not after:
                raise KilledError
        result = rename(self, target)
        if result.is_dir() and len(seen) == number:
            raise KilledError
        return result

    monkeypatch.setattr(Path, "rename", dying)


@pytest.mark.long
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("number, after", [(1, False), (1, True), (2, False), (2, True)])
def test_a_death_at_the_last_moves_is_made_good(
    raw, whole, tmp_path, monkeypatch, number, after, again
):
    out = tmp_path / "home" / "out"
    prepare(raw, out, **(OPTIONS | {"min_count": 1}))
    older = folder_bytes(out)
    with monkeypatch.context() as patch:
        die_at_rename(patch, number, after=after)
        with pytest.raises(KilledError):
            prepare(raw, out, overwrite=True, **OPTIONS)
    if again:
        with monkeypatch.context() as patch:
            # All passes were done: none is made again.
            for name, module in CALLED_IN.items():
                die_after(patch, module, name, 0)
            # Once the new dataset is in place, the same call needs no leave to overwrite.
            prepare(raw, out, overwrite=(number, after) != (2, True), **OPTIONS)
        assert folder_bytes(out) == whole
        assert entries(tmp_path / "home") == ["out"]
    else:
        # Another call finds one of the two, whole, and not a mixture or nothing.
        with pytest.raises(DataError, match="already holds a dataset"):
            prepare(raw, out, **(OPTIONS | {"min_count": 3}))
        assert folder_bytes(out) == (whole if (number, after) == (2, True) else older)


def strip(mark):
    stored = json.loads(mark.read_text())
    stored["content"] = {}
    mark.write_text(json.dumps(stored))


def drop_key(mark):
    stored = json.loads(mark.read_text())
    stored["content"].pop(min(stored["content"]))
    mark.write_text(json.dumps(stored))


def change_number(mark):
    text = mark.read_text()
    place = next(i for i, c in enumerate(text) if c.isdigit() and c != "9")
    mark.write_text(text[:place] + "9" + text[place + 1 :])


def empty(mark):
    mark.write_text("")


def damage_files(mark):
    for name in json.loads(mark.read_text())["files"]:
        path = mark.parent / name
        path.write_bytes(path.read_bytes()[:-20] + b"\0" * 20)


@pytest.mark.parametrize("damage", [strip, drop_key, change_number, empty, damage_files])
def test_a_damaged_piece_of_an_interrupted_run_is_made_again(
    raw, whole, tmp_path, monkeypatch, damage
):
    out = tmp_path / "home" / "out"
    with monkeypatch.context() as patch:
        die_after(patch, encode_pass, "encode_part", 3)
        with pytest.raises(KilledError):
            prepare(raw, out, **OPTIONS)
    scratch = tmp_path / "home" / ".out.partial" / "scratch"
    marks = [path for path in scratch.rglob("*.json") if path.name != "fingerprint.json"]
    assert len(marks) > 30
    for mark in marks:
        damage(mark)
    with_files = [m for m in marks if m.parent.name != "index"]
    news: list[str] = []
    prepare(raw, out, report=news.append, **OPTIONS)
    expected = with_files if damage is damage_files else marks
    assert sum("is damaged; made again" in line for line in news) == len(expected)
    assert folder_bytes(out) == whole


def test_files_that_a_dying_run_was_writing_are_not_published(raw, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(DatasetInfo, "save", lambda self, folder: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            prepare(raw, out, **OPTIONS)
    (tmp_path / ".out.partial" / "dataset" / f".dataset.json.{os.getpid()}.tmp").write_text("{")
    prepare(raw, out, **OPTIONS)
    assert folder_bytes(out) == whole


def test_a_death_while_clearing_up_is_made_good_by_the_same_command(
    raw, whole, tmp_path, monkeypatch
):
    out = tmp_path / "home" / "out"
    prepare(raw, out, **(OPTIONS | {"min_count": 1}))
    with monkeypatch.context() as patch:
        own = SimpleNamespace(**vars(workspace_module.shutil))  # others clear up by it as well
        patch.setattr(workspace_module, "shutil", own)
        die_after(patch, own, "rmtree", 2)
        with pytest.raises(KilledError):
            prepare(raw, out, overwrite=True, **OPTIONS)
    prepare(raw, out, **OPTIONS)
    assert folder_bytes(out) == whole
    assert entries(tmp_path / "home") == ["out"]


def test_what_comes_to_the_outputs_place_meanwhile_costs_neither_dataset(tmp_path, monkeypatch):
    raw = tmp_path / "raw.txt"
    write_criteo(raw, rows=60)
    prepare(raw, tmp_path / "out", importer="criteo")
    before = folder_bytes(tmp_path / "out")
    news: list[str] = []
    move = Path.rename

    def rename(self, target):
        if Path(target) == tmp_path / "out" and self.name != "replaced":
            Path(target).mkdir()
            (Path(target) / "other").write_text("another program's")
        return move(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError):
        prepare(raw, tmp_path / "out", importer="criteo", overwrite=True, report=news.append)
    assert folder_bytes(tmp_path / ".out.partial" / "replaced") == before
    assert (tmp_path / "out" / "other").exists()
    assert "the dataset that was there is kept in" in news[-1]
