"""Checksums of a run's own files: its config and dataset, what stages began with and left, the report.

`checksums.json` lies beside the files that it lists. A file's checksum is written down before the
file appears, so that a run that is killed in between has nothing to be doubted. A file that is not
listed is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embcomp.errors import CheckpointError, one_line
from embcomp.io.atomic_files import write_atomically
from embcomp.io.tensor_checksums import file_checksums

CHECKSUMS_FILE = "checksums.json"


def write_checked(path: Path, text: str) -> None:
    """Write a whole file or nothing, its checksum before it; only one process writes in a folder."""
    _announce(path, _sha256(text.encode("utf-8")))
    write_atomically(path, text)


def rewrite_checked(path: Path, text: str) -> None:
    """Write a file anew. In between it is not listed, so that a kill leaves nothing doubted."""
    _list({name: each for name, each in _listed(path.parent).items() if name != path.name}, path)
    write_atomically(path, text)
    _announce(path, _sha256(text.encode("utf-8")))


def read_checked(path: Path) -> str:
    """A file's text.

    Raises:
        CheckpointError: it is not what was written.
    """
    content = path.read_bytes()
    wanted = _listed(path.parent).get(path.name)
    if wanted is not None and wanted != _sha256(content):
        raise _damaged(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(path) from None


def announce_file(path: Path, written: Path) -> None:
    """Write down a large file's checksum before it gets its name.

    Args:
        path: the name that it will have.
        written: where it lies until then.
    """
    _announce(path, file_checksums([written])[written])


def check_file(path: Path) -> None:
    """Check a large file against `announce_file`.

    Raises:
        CheckpointError: it is missing, or not what was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; remove its folder, and the run makes it again")
    wanted = _listed(path.parent).get(path.name)
    if wanted is not None and wanted != file_checksums([path])[path]:
        raise _damaged(path)


def _announce(path: Path, checksum: str) -> None:
    _list({**_listed(path.parent), path.name: checksum}, path)


def _list(files: Mapping[str, str], path: Path) -> None:
    text = json.dumps({"files": files, "digest": _digest(files)}, indent=1) + "\n"
    write_atomically(path.with_name(CHECKSUMS_FILE), text)


def _listed(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_FILE
    try:
        content = json.loads(path.read_bytes())
        files = dict(content["files"])
        if content["digest"] != _digest(files):
            raise ValueError("its digest differs")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({one_line(error)}); copy it again, or remove it to go on unchecked"
        ) from None
    return files


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or was changed since it was written: its checksum is not the one in "
        f"{CHECKSUMS_FILE} beside it. Copy it again; if you changed it on purpose, remove "
        f"{CHECKSUMS_FILE}"
    )


def _digest(files: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(files, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sealed_json(content: Mapping[str, Any]) -> str:
    """A file that is written again and again, with a digest of itself."""
    text = json.dumps(content)
    return json.dumps({"digest": _sha256(text.encode()), "content": text}) + "\n"


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `sealed_json` wrote.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        sealed = json.loads(path.read_bytes())
        text = sealed["content"]
        if sealed["digest"] != _sha256(text.encode()):
            raise ValueError("its digest differs")
        return dict(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({one_line(error)}); remove it, and the search begins again"
        ) from None
