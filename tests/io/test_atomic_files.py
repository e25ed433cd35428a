"""Small files that are there whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from embcomp.io.atomic_files import write_atomically


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
