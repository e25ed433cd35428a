"""Files behind URLs (`s3://`, `gs://`, `hdfs://`...), under the methods that local paths have.

Code that reads and writes files takes a `Path`; a `RemotePath` is one whose methods go through fsspec.
Credentials and endpoints are what fsspec finds: its configuration files, `FSSPEC_*` variables, and what
the library behind a protocol reads by itself. What an object store cannot do (locks, moving a folder at
once) is not there: whoever needs it asks `isinstance(path, RemotePath)`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import IO, TYPE_CHECKING, Any

from embcomp.errors import DataError, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_NOBODY = "_"
"""Stands for the empty authority of `file:///folder`, since paths drop repeated slashes."""
_ON_DISK = ("file", "local")


def as_path(path: str | Path) -> Path:
    """Return a local path, or a `RemotePath` where the text is a URL.

    Raises:
        DataError: a URL of a kind that this machine cannot open.
    """
    if isinstance(path, Path):
        return path
    match = _URL.fullmatch(path)
    if match is None:
        return Path(path)
    protocol, place = match[1].lower(), match[2]
    if place.startswith("/"):
        place = f"{_NOBODY}{place}"
    if not place.strip("/") or "::" in place:
        raise DataError(
            f"{path} names no file or folder; expected a URL such as s3://bucket/folder"
        )
    remote = RemotePath(f"{protocol}:/{place}")
    remote.filesystem()  # a protocol that nobody knows is an error of the first second
    return remote


class RemotePath(PosixPath):
    """A file or folder behind a URL.

    It is made by `as_path`, and answers what is overridden here. `str` gives the URL.
    """

    @property
    def _split(self) -> tuple[str, str]:
        """The protocol, and the place as the file system knows it."""
        protocol, place = super().__str__().split(":/", 1)
        return protocol, place.removeprefix(_NOBODY) if place.startswith(f"{_NOBODY}/") else place

    def __str__(self) -> str:
        protocol, place = self._split
        return f"{protocol}://{place}"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no file of this machine")

    def filesystem(self) -> AbstractFileSystem:
        """Return what opens files of the protocol.

        Raises:
            DataError: there is no such protocol, or its library is not installed.
        """
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(str(self))[0]
        except ImportError as error:
            raise DataError(f"{self} cannot be opened here: {one_line(error)}") from None
        except ValueError as error:
            raise DataError(
                f"{self} cannot be opened: {one_line(error)}; expected a path, or a URL that fsspec "
                f"knows, such as s3://bucket/folder"
            ) from None

    def _ask(self, method: str, *arguments: object, **options: object) -> Any:
        """Call a method of the file system with this URL.

        Raises:
            OSError: whatever went wrong; libraries of some protocols raise what is none.
        """
        with _as_os_errors():
            return getattr(self.filesystem(), method)(str(self), *arguments, **options)

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **_: Any
    ) -> IO[Any]:
        """Open the file: to be read at any place, or written as a whole."""
        raw = self._ask("open", mode.replace("t", "").replace("b", "") + "b")
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding or "utf-8")

    def read_bytes(self) -> bytes:
        """Return the file's bytes."""
        found: bytes = self._ask("cat_file")
        return found

    def read_text(self, encoding: str | None = None, *_: Any) -> str:
        """Return the file's text."""
        return self.read_bytes().decode(encoding or "utf-8")

    def _info(self) -> dict[str, Any] | None:
        """What the store says of the place now, whatever was listed before; None where nothing is."""
        filesystem = self.filesystem()
        filesystem.invalidate_cache(str(self.parent))
        filesystem.invalidate_cache(str(self))
        try:
            found: dict[str, Any] = self._ask("info")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def exists(self, **_: Any) -> bool:
        """Whether there is a file, or a folder that holds some."""
        return self._info() is not None

    def is_file(self, **_: Any) -> bool:
        """Whether it is a file."""
        found = self._info()
        return found is not None and found["type"] == "file"

    def is_dir(self, **_: Any) -> bool:
        """Whether it is a folder."""
        found = self._info()
        return found is not None and found["type"] == "directory"

    def stat(self, **_: Any) -> os.stat_result:
        """Return a result that knows the size only."""
        found = self._info()
        if found is None:
            raise FileNotFoundError(f"{self} does not exist")
        kind = stat.S_IFDIR if found["type"] == "directory" else stat.S_IFREG
        return os.stat_result((kind, 0, 0, 0, 0, 0, int(found["size"] or 0), 0, 0, 0))

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield what lies in the folder, by name."""
        self.filesystem().invalidate_cache(str(self))
        names = {str(at).rstrip("/").rpartition("/")[2] for at in self._ask("ls", detail=False)}
        yield from (self / name for name in sorted(names) if name not in ("", self.name))

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Make the folder, where the store has any, and those above it."""
        self._ask("makedirs", exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        with suppress(*((FileNotFoundError,) if missing_ok else ())):
            self._ask("rm_file")

    def remove(self) -> None:
        """Remove the file or the folder with all that is in it, if there is any."""
        with suppress(FileNotFoundError):
            self._ask("rm", recursive=True)

    def resolve(self, strict: bool = False) -> RemotePath:
        """Return itself: a URL has no links."""
        return self

    def absolute(self) -> RemotePath:
        """Return itself."""
        return self

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A file of this machine to write, which becomes this one when the block ends well."""
        with tempfile.TemporaryDirectory(prefix="embcomp-") as folder:
            local = Path(folder) / "file"
            yield local
            self._put(local)

    def _put(self, local: Path) -> None:
        target = str(self)
        if self._split[0] in _ON_DISK:
            target = str(self.with_name(f".{self.name}.{uuid.uuid4().hex}.tmp"))
        with _as_os_errors():
            # Whole or not at all, as object stores do it; a disk needs one step more.
            self.filesystem().put_file(str(local), target)
            if target != str(self):
                self.filesystem().mv(target, str(self))


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {one_line(error)}") from error


def version_of(path: Path) -> list[object]:
    """What tells a file from an edited one without reading it: JSON values.

    Args:
        path: of a file that is there.
    """
    if isinstance(path, RemotePath):
        return [path.stat().st_size, str(path._ask("ukey"))]
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def arrow_input(path: Path) -> Path | IO[bytes]:
    """What Arrow opens a file by: its path, or the open file where that lies behind a URL."""
    return path.open("rb") if isinstance(path, RemotePath) else path
