"""The number that stands for a table's name, fixed for ever: docs/backends.md has test vectors."""

from __future__ import annotations

import hashlib


def name64(name: str) -> int:
    """What stands for a table's name: SHA-256 of its UTF-8 bytes, the first 8, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")
