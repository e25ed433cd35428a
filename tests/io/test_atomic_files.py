"""Files that are there whole or not at all, and locks that keep others out."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from embcomp.io.atomic_files import atomic_path, remove_leftovers, write_atomically
from embcomp.io.folder_lock import folder_lock

WRITER = """
import sys, time
from pathlib import Path
from embcomp.io.atomic_files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of it")
    print(temporary, flush=True)
    time.sleep(120)
"""
HOLDER = """
import sys
from pathlib import Path
from embcomp.io.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1]), busy=None):
    print("held", flush=True)
    sys.stdin.read()
"""


def started(script, path):
    """A process that is in the middle of its work, and the line that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_many_writers_at_once_leave_one_whole_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    texts = [str(n) * 200_000 for n in range(8)]

    def write_often(text):
        for _ in range(20):
            write_atomically(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write_often, texts))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half of it \ud800")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.bin"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_with_the_next_and_what_a_live_one_writes_stays(tmp_path):
    path = tmp_path / "rows.bin"
    dead, left = started(WRITER, path)
    live, own = started(WRITER, path)
    try:
        dead.kill()
        dead.wait()
        other = tmp_path / ".rows.bin.tmp"
        other.touch()
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"whole")
        found = {str(file) for file in tmp_path.iterdir()}
        assert found == {str(path), own, str(other)} and left not in found
        assert path.read_bytes() == b"whole"
    finally:
        live.kill()
        live.communicate()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_keeps_others_out_until_its_holder_has_gone(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "supernet.lock"
    holder, said = started(HOLDER, path)
    try:
        assert said == "held"
        taken = FileExistsError("taken")
        with pytest.raises(FileExistsError, match="taken"), folder_lock(path, busy=taken):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder_lock(path, busy=FileExistsError("taken")):
        pass


def test_who_waits_for_a_lock_gets_it_when_its_holder_ends(tmp_path):
    holder, _ = started(HOLDER, tmp_path)
    waiter = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with pytest.raises(BlockingIOError), folder_lock(tmp_path, busy=BlockingIOError()):
            pass
        holder.communicate("")
        assert waiter.communicate("", timeout=60)[0] == "held\n"
    finally:
        waiter.kill()


def test_what_killed_writers_left_in_a_folder_goes_and_a_living_one_stays(tmp_path):
    (tmp_path / "deep").mkdir()
    left = tmp_path / "deep" / f".a.json.{'0' * 32}.tmp"
    left.write_text("half")
    other = tmp_path / "deep" / ".mine.tmp"
    other.write_text("a user's")
    with atomic_path(tmp_path / "deep" / "b.json") as living:
        living.write_text("whole")
        remove_leftovers(tmp_path)
        assert living.exists() and not left.exists() and other.exists()
    assert (tmp_path / "deep" / "b.json").read_text() == "whole"
