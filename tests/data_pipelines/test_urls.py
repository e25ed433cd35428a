"""Raw files and datasets behind URLs: the same bytes as on disk, and one line for what a store refuses."""

from __future__ import annotations

import gzip
import io

import fsspec
import polars as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.importers.parquet import ParquetTable
from embcomp.data_pipelines.loader import ParquetLoader
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import count_pass, encode_pass
from embcomp.data_pipelines.preparing.encoding import plan_rounds
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import DataError
from tests.helpers.raw_logs import folder_bytes, write_criteo

OPTIONS = {"importer": "criteo", "min_count": 2, "blocks_per_part": 2, "name": "clicks"}


class KilledError(BaseException):
    """Stands for a signal: no handler for errors sees it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Raw logs on disk, and the bytes of the dataset that a run on disk makes of them."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "raw").mkdir()
    write_criteo(folder / "raw" / "a.txt", 150, values=200)
    write_criteo(folder / "raw" / "b.txt", 100, seed=1, values=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 4000)
        prepare(folder / "raw", folder / "out", **OPTIONS)
    return folder / "raw", folder_bytes(folder / "out")


@pytest.fixture
def stored(source, monkeypatch):
    """The same raw logs in memory, behind a URL."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    for path in source[0].iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/raw/{path.name}", path.read_bytes())
    yield "memory://bucket/raw"
    MemoryFileSystem.store.clear()


def under(folder: str) -> dict[str, bytes]:
    """The files below a folder in memory, by their paths from there."""
    found = {path: file.getvalue() for path, file in MemoryFileSystem.store.items()}
    return {p.removeprefix(folder): b for p, b in found.items() if p.startswith(folder)}


def same_but_for_paths(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """All bytes but those that say where raw files lay; the digest leaves these out."""
    assert set(found) == set(whole)
    differ = {name for name in whole if found[name] != whole[name]}
    assert differ == {"dataset.json"}
    ours, theirs = (DatasetInfo.model_validate_json(f["dataset.json"]) for f in (found, whole))
    assert ours.digest == theirs.digest


def test_urls_give_the_bytes_that_paths_give(stored, source):
    info = prepare(stored, "memory://bucket/data/day1", progress=True, **OPTIONS)
    same_but_for_paths(under("/bucket/data/day1/"), source[1])
    assert not [path for path in MemoryFileSystem.store if ".partial" in path]
    assert str(info.folder) == "memory://bucket/data/day1"
    assert validate_dataset("memory://bucket/data/day1") is not None
    rows = sum(
        len(batch.labels)
        for batch in ParquetLoader("memory://bucket/data/day1", "train", batch_size=64)
    )
    assert rows == info.split("train").rows
    tomorrow = prepare(
        stored, "memory://bucket/data/day2", extend="memory://bucket/data/day1", **OPTIONS
    )
    assert tomorrow.categorical[0].change.new == 0


@pytest.mark.parametrize("name", ["count_part", "store_ids", "encode_part"])
def test_a_killed_run_goes_on_from_what_is_in_the_store(stored, source, monkeypatch, name):
    # So little room that the ids are found in several rounds.
    monkeypatch.setattr(encode_pass, "plan_rounds", lambda sizes, room: plan_rounds(sizes, 9000))
    module = count_pass if name == "count_part" else encode_pass
    original, calls = getattr(module, name), []

    def dying(*arguments, **options):
        if len(calls) == 2 and dying.dies:
            raise KilledError
        calls.append(1)
        return original(*arguments, **options)

    dying.dies = True
    monkeypatch.setattr(module, name, dying)
    with pytest.raises(KilledError):
        prepare(stored, "memory://bucket/out", **OPTIONS)
    if name == "encode_part":
        with pytest.raises(DataError, match="is not empty"):
            prepare(stored, "memory://bucket/out", **OPTIONS | {"min_count": 3})
    dying.dies, first = False, len(calls)
    news: list[str] = []
    prepare(stored, "memory://bucket/out", report=news.append, **OPTIONS)
    assert news == ["going on with what an earlier, interrupted run left"]
    assert first == 2
    same_but_for_paths(under("/bucket/out/"), source[1])


def test_parquet_and_compressed_input_are_read_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(ParquetTable, "block_rows", 10, raising=False)
    MemoryFileSystem.store.clear()
    frame = pl.DataFrame({"y": [0, 1] * 40, "user": [f"u{i % 7}" for i in range(80)]})
    memory = fsspec.filesystem("memory")
    (tmp_path / "s.yaml").write_text("{name: t, label: y, categorical: [user]}")
    for suffix, data in (
        ("csv.gz", gzip.compress(frame.write_csv().encode())),
        ("parquet", _parquet_bytes(frame)),
    ):
        (tmp_path / f"t.{suffix}").write_bytes(data)
        memory.pipe_file(f"/raw/t.{suffix}", data)
        options = {"importer": "table", "schema": tmp_path / "s.yaml", "name": "t"}
        here = prepare(tmp_path / f"t.{suffix}", tmp_path / suffix, **options)
        there = prepare(f"memory://raw/t.{suffix}", f"memory://out/{suffix}", **options)
        assert here.digest == there.digest


def _parquet_bytes(frame):
    buffer = io.BytesIO()
    frame.write_parquet(buffer, row_group_size=30)
    return buffer.getvalue()


class Guarded(MemoryFileSystem):
    """A store that lets nobody write, or fails on the way."""

    protocol = "guarded"
    refuses: type[Exception] | None = None

    def put_file(self, *arguments, **options):
        if self.refuses is not None:
            raise self.refuses("Access Denied")
        super().put_file(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError, "guarded://bucket/out cannot be written: Access Denied; give the right"),
        (
            ConnectionError,
            "guarded://bucket/out cannot be reached: Access Denied; the same command",
        ),
        (KeyError, "guarded://bucket/out cannot be reached: .*KeyError.*Access Denied"),
    ],
)
def test_a_store_that_refuses_is_named_in_one_line(stored, monkeypatch, error, message):
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    monkeypatch.setattr(Guarded, "refuses", error)
    with pytest.raises(DataError, match=message) as caught:
        prepare(stored, "guarded://bucket/out", **OPTIONS)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Guarded, "refuses", None)
    prepare(stored, "guarded://bucket/out", **OPTIONS)


def test_places_that_cannot_be_are_refused(stored):
    prepare(stored, "memory://bucket/out", **OPTIONS)
    with pytest.raises(DataError, match="already holds a dataset"):
        prepare(stored, "memory://bucket/out", **OPTIONS)
    with pytest.raises(DataError, match="behind a URL, where no dataset can be replaced"):
        prepare(stored, "memory://bucket/out", overwrite=True, **OPTIONS)
    with pytest.raises(DataError, match="memory://bucket/nothing does not exist"):
        prepare("memory://bucket/nothing", "memory://bucket/out2", **OPTIONS)
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        prepare(stored, "nosuch://bucket/out", **OPTIONS)
    fsspec.filesystem("memory").pipe_file("/bucket/full/x", b"x")
    with pytest.raises(DataError, match="bucket/full is not empty"):
        prepare(stored, "memory://bucket/full", **OPTIONS)
    assert not [path for path in MemoryFileSystem.store if ".partial" in path or "out2" in path]


def test_a_failing_run_leaves_nothing(stored):
    before = dict(MemoryFileSystem.store)
    fsspec.filesystem("memory").pipe_file("/bucket/raw/c.txt", b"not a row\n" * 200)
    with pytest.raises(DataError, match="malformed"):
        prepare(stored, "memory://bucket/out", **OPTIONS)
    assert set(MemoryFileSystem.store) == {*before, "/bucket/raw/c.txt"}
