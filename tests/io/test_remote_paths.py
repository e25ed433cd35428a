"""Paths behind URLs answer as local ones do."""

from __future__ import annotations

import errno
import os
import pickle

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embcomp.errors import DataError
from embcomp.io.atomic_files import atomic_path, write_atomically
from embcomp.io.remote_paths import RemotePath, as_path, version_of


@pytest.fixture(autouse=True)
def _empty_memory():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "url", ["memory://bucket/a b/day=7/x.parquet", "file:///tmp/a/x.parquet", "file:///x.parquet"]
)
def test_a_url_stays_what_it_is(url):
    path = as_path(url)
    assert str(path) == url
    assert str(pickle.loads(pickle.dumps(path))) == url
    assert str(path.parent / path.name) == url
    assert path == as_path(url) and hash(path) == hash(as_path(url))
    assert path.suffix == ".parquet"
    assert f"{path.with_suffix('.json')}" == url.replace(".parquet", ".json")


def test_what_is_no_url_is_a_local_path(tmp_path):
    assert as_path(str(tmp_path)) == tmp_path
    assert not isinstance(as_path("s3:/bucket"), RemotePath)
    assert as_path(tmp_path) is not None and not isinstance(as_path(tmp_path), RemotePath)


@pytest.mark.parametrize("root", ["memory://bucket/data", "file://"])
def test_files_are_written_found_and_removed(root, tmp_path):
    root = root if root.startswith("memory") else f"file://{tmp_path}"
    folder = as_path(root) / "new" / "folder"
    assert not folder.exists() and not folder.is_dir()
    folder.mkdir()
    write_atomically(folder / "b.txt", "été")
    with atomic_path(folder / "a.bin", durable=False) as local:
        local.write_bytes(b"0123456789")
        assert not (folder / "a.bin").is_file()
    assert [path.name for path in folder.iterdir()] == ["a.bin", "b.txt"]
    assert folder.is_dir() and not folder.is_file()
    assert (folder / "b.txt").read_text(encoding="utf-8") == "été"
    assert (folder / "a.bin").stat().st_size == 10
    with (folder / "a.bin").open("rb") as file:
        file.seek(4)
        assert file.read(3) == b"456"
    before = version_of(folder / "a.bin")
    assert before == version_of(folder / "a.bin")
    write_atomically(folder / "a.bin", "01234567890")
    assert version_of(folder / "a.bin") != before
    (folder / "a.bin").unlink()
    (folder / "a.bin").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "a.bin").unlink()
    assert isinstance(folder, RemotePath)
    folder.remove()
    assert not folder.exists()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    path = as_path(f"file://{tmp_path}/a.bin")
    with pytest.raises(RuntimeError), atomic_path(path) as local:
        local.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_url_is_never_taken_for_a_local_file():
    with pytest.raises(TypeError, match="no file of this machine"):
        os.stat(as_path("memory://bucket/x"))  # noqa: PTH116


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened: Protocol not known: nosuch"),
        ("memory://", "names no file or folder"),
        ("memory://x::memory://y", "names no file or folder"),
    ],
)
def test_urls_that_nobody_can_open_are_named(url, message):
    with pytest.raises(DataError, match=message):
        as_path(url)


def test_what_libraries_of_a_protocol_raise_is_an_os_error():
    class EndpointError(Exception):
        pass

    class Broken(MemoryFileSystem):
        protocol = "broken"

        def cat_file(self, path, **options):
            raise EndpointError("could not connect\nto anything")

    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(OSError, match="EndpointError: could not connect to anything") as caught:
        as_path("broken://bucket/x").read_bytes()
    assert caught.value.errno == errno.EIO
