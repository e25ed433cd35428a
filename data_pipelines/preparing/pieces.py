"""What a pass of `prepare` finished: a small sealed file that names the big ones beside it.

A run that goes on takes a piece only when it is as it was written, and its files too. Otherwise the
piece is made again; nothing in it is replaced by a default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from embcomp.io.atomic_files import write_atomically
from embcomp.io.digests import sha256_of_file, sha256_of_json

Content = TypeVar("Content", bound=BaseModel)


def write_piece(mark: Path, content: BaseModel, files: Mapping[str, str] | None = None) -> None:
    """Seal a finished piece.

    Args:
        mark: the file to write.
        content: what a later run needs to know.
        files: SHA-256 by path, relative to the mark's folder.
    """
    # As JSON text and back: infinities of NumericStats are written as words.
    sealed = {"content": json.loads(content.model_dump_json()), "files": dict(files or {})}
    write_text(mark, json.dumps({**sealed, "sha256": sha256_of_json(sealed)}))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a process that dies leaves it whole or absent.

    It is not forced to disk, as there are many: what a power cut leaves breaks the seal.
    """
    write_atomically(path, text, durable=False)


def read_piece(
    mark: Path,
    kind: type[Content],
    report: Callable[[str], None],
    is_same: Callable[[str, str], bool] | None = None,
) -> Content | None:
    """Read what an earlier run sealed.

    Args:
        mark: the seal.
        kind: the piece's type.
        report: called with a line about a damaged piece.
        is_same: whether the file of a name has a SHA-256; by default that of a path relative to the
            mark's folder is computed.

    Returns:
        The content; None when there is no such piece, or a damaged one, which is then reported.
    """
    if not mark.is_file():
        return None
    found = _sealed(mark, kind, is_same or partial(_has_digest, mark.parent))
    if found is None:
        report(f"{mark.name} of the interrupted run, or a file of it, is damaged; made again")
        mark.unlink()
    return found


def _has_digest(folder: Path, name: str, sha256: str) -> bool:
    return sha256_of_file(folder / name) == sha256


def _sealed(mark: Path, kind: type[Content], is_same: Callable[[str, str], bool]) -> Content | None:
    try:
        stored: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
        seal = stored.pop("sha256")
        if seal != sha256_of_json(stored) or set(stored["content"]) != set(kind.model_fields):
            return None
        for name, sha256 in stored["files"].items():
            if not is_same(name, sha256):
                return None
        return kind.model_validate_json(json.dumps(stored["content"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None
