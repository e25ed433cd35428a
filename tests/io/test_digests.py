"""Digests of files while they are read."""

from __future__ import annotations

import hashlib

import pytest

from embcomp.io.digests import HashedReading


@pytest.mark.parametrize("read", [0, 1, 5 << 20, 9 << 20])
def test_a_file_has_one_digest_however_much_of_it_is_read(tmp_path, read):
    content = b"head\n" + bytes(range(256)) * (32 << 10)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as disk:
        file = HashedReading(disk)
        assert file.readline() == b"head\n"
        room, got = bytearray(2 << 20), b""
        while len(got) < read and (come := file.readinto(room)):
            got += room[:come]
            # What was read is the caller's, who may write over it while it is hashed.
            room[:] = bytes(len(room))
        assert content[5:].startswith(got)
        assert file.sha256() == hashlib.sha256(content).hexdigest()
