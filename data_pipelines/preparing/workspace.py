"""The temporary sibling folder that a dataset grows in, and its one move into place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embcomp.data_pipelines.schema import FILE_NAME
from embcomp.errors import DataError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes from a number or a text such as "4GiB", "512MiB" or "2GB"."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", size.lower())
    if match is None:
        raise DataError(f"{size!r} is not a size; write for example 4GiB or 512MiB")
    return int(float(match.group(1)) * (_UNITS | _BINARY_UNITS)[match.group(2) or ""])


class Workspace:
    """`.<name>.partial` beside the output.

    Finished pieces stay there when the process dies, so that the same call goes on from them; a
    call with another fingerprint starts afresh. `scratch` holds what the dataset will not.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self.overwrite = overwrite
        self.path = output.parent / f".{output.name}.partial"
        self.scratch = self.path / "scratch"
        self.resumed = False

    def check_output(self) -> None:
        """Refuse an output that holds something, unless it is a dataset to be overwritten."""
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise DataError(f"output {self.output} is a file; name a new folder")
        if not any(self.output.iterdir()):
            return
        if not (self.output / FILE_NAME).is_file():
            raise DataError(
                f"output {self.output} is not empty and holds no dataset; name a new folder"
            )
        if not self.overwrite:
            raise DataError(
                f"output {self.output} already holds a dataset; name another folder, or "
                f"replace it with --overwrite"
            )

    @contextmanager
    def open(self, fingerprint: Mapping[str, object]) -> Iterator[None]:
        """Lock the folder; empty it unless an earlier run with this fingerprint left it."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"another process is preparing {self.output}; wait for it"
                ) from None
            mark = self.scratch / "fingerprint.json"
            text = json.dumps(fingerprint, indent=1, sort_keys=True, default=str)
            self.resumed = mark.is_file() and mark.read_text(encoding="utf-8") == text
            if not self.resumed:
                try:
                    _empty(self.path)
                    self.scratch.mkdir()
                    write_text(mark, text)
                except OSError:
                    self.discard()
                    raise
            yield
        finally:
            os.close(handle)

    def publish(self) -> None:
        """Move the finished dataset into place; what was there before goes only after that."""
        shutil.rmtree(self.scratch)
        old = self.output.parent / f".{self.output.name}.replaced"
        if old.exists():
            shutil.rmtree(old)
        if self.output.exists():
            self.output.rename(old)
        self.path.rename(self.output)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything; the output, if there is one, stays as it is."""
        shutil.rmtree(self.path, ignore_errors=True)

    def check_space(self, needed: int) -> None:
        """Raise a DataError when the disk has less room than the estimate."""
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise DataError(
                f"preparing {self.output} may take up to {mib(needed)} of disk, and "
                f"{self.output.parent} has {mib(free)} free; free some or choose another folder"
            )


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn a full disk, which several libraries report in their own way, into a DataError."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or "No space left on device" in str(error):
            raise DataError(
                f"the disk of {output.parent} is full; the partial output was removed. Free some "
                f"space or choose another folder"
            ) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def mib(size: int) -> str:
    """Format a number of bytes for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
