"""The temporary sibling folder that a dataset grows in, and its one move into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel

from embcomp.data_pipelines.preparing.pieces import Content, read_piece, write_piece, write_text
from embcomp.data_pipelines.schema import FILE_NAME
from embcomp.errors import DataError
from embcomp.io.folder_lock import folder_lock

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Report = Callable[[str], None]
"""Called with lines of news."""


class Workspace:
    """`.<name>.partial` beside the output, where a dataset grows until its one move into place.

    Finished pieces stay there when the process dies, so that the same call goes on from them; a
    call with another fingerprint starts afresh. In it lie `dataset`; `scratch`, what the dataset
    will not have; and for a moment `replaced`, what the output was before. An output that is a
    symbolic link stays one: the dataset is made where it points.

    Attributes:
        shown: the output as the caller names it.
        report: called with lines of news.
        resumed: whether pieces of an earlier run are there to go on from.
        published: whether an earlier run moved its dataset into place, and died only then.
    """

    def __init__(
        self, output: Path, *, overwrite: bool, report: Report = lambda line: None
    ) -> None:
        self.shown = output
        self.output = _target(output)
        self.overwrite = overwrite
        self.report = report
        self.root = self.output.parent / f".{self.output.name}.partial"
        self.path = self.root / "dataset"
        self.scratch = self.root / "scratch"
        self.resumed = False
        self.published = False
        self._replaced = self.root / "replaced"
        self._mark = self.scratch / "fingerprint.json"

    def check_output(self, fingerprint: Mapping[str, object]) -> None:
        """Refuse an output that holds something, unless it is a dataset to be overwritten.

        One that an earlier run with this fingerprint has just put there is no obstacle.
        """
        if not self.output.exists() or self._is_published(fingerprint):
            return
        if not self.output.is_dir():
            raise DataError(f"output {self.shown} is a file; name a new folder")
        if os.path.ismount(self.output):
            raise DataError(
                f"output {self.shown} is a mount point, which cannot be replaced as a whole; name "
                f"a folder in it"
            )
        if not any(self.output.iterdir()):
            return
        if not (self.output / FILE_NAME).is_file():
            raise DataError(
                f"output {self.shown} is not empty and holds no dataset; name a new folder"
            )
        if not self.overwrite:
            raise DataError(
                f"output {self.shown} already holds a dataset; name another folder, or "
                f"replace it with --overwrite"
            )

    def _is_published(self, fingerprint: Mapping[str, object]) -> bool:
        return (
            self._left_by(fingerprint)
            and not self.path.exists()
            and (self.output / FILE_NAME).is_file()
        )

    def _left_by(self, fingerprint: Mapping[str, object]) -> bool:
        text = fingerprint_text(fingerprint)
        return self._mark.is_file() and self._mark.read_text(encoding="utf-8") == text

    @contextmanager
    def open(self, fingerprint: Mapping[str, object]) -> Iterator[None]:
        """Lock the folder; empty it unless an earlier run with this fingerprint left it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise DataError(
                f"output {self.shown} cannot be made in {self.root.parent}: {error.strerror}"
            ) from None
        busy = DataError(f"another process is preparing {self.shown}; wait for it")
        with folder_lock(self.root, busy=busy):
            self.published = self._is_published(fingerprint)
            self.resumed = not self.published and self._left_by(fingerprint)
            if not self.published:
                self._make_room(fingerprint)
            yield
            self._clear_up()

    def once(
        self,
        name: str,
        kind: type[Content],
        make: Callable[[], Content],
        *,
        files: Callable[[Content], Mapping[Path, str]] = lambda found: {},
        skip: Callable[[], object] = lambda: None,
    ) -> Content:
        """Make a piece, unless an earlier run sealed it.

        Args:
            name: the seal's path in the scratch folder.
            kind: the piece's type.
            make: makes the piece and the files that it names.
            files: gives the SHA-256 of these files.
            skip: called when there is nothing to make.
        """
        found = self.earlier(name, kind)
        if found is not None:
            skip()
            return found
        made = make()
        self.seal(name, made, files(made))
        return made

    def seal(self, name: str, content: BaseModel, files: Mapping[Path, str]) -> None:
        """Keep a finished piece for a run that goes on.

        Args:
            name: the seal's path in the scratch folder.
            content: the piece.
            files: the SHA-256 of the files that it names.
        """
        mark = self.scratch / name
        sealed = {os.path.relpath(path, mark.parent): sha256 for path, sha256 in files.items()}
        write_piece(mark, content, sealed)

    def earlier(self, name: str, kind: type[Content]) -> Content | None:
        """Read a piece that an earlier run sealed; None where there is none, or a damaged one."""
        return read_piece(self.scratch / name, kind, self.report)

    @property
    def mark(self) -> Path:
        """A small file that is there from the start."""
        return self._mark

    def keeps_after(self, error: Exception) -> bool:
        """Whether finished pieces stay for the next call behind an error."""
        return False

    def _make_room(self, fingerprint: Mapping[str, object]) -> None:
        try:
            if not self.resumed:
                if self._restore():
                    self.check_output(fingerprint)
                _empty(self.root)
                self.scratch.mkdir()
                write_text(self._mark, fingerprint_text(fingerprint))
            self.path.mkdir(exist_ok=True)
            # What was being written when the earlier run died.
            for path in [*self.path.rglob("*.tmp"), *self.scratch.rglob("*.tmp")]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError:
            self.discard()
            raise

    def _restore(self) -> bool:
        """Put back what a run that died in `publish` had moved out of the way; was there any?"""
        lost = self._replaced.exists() and not self.output.exists()
        if lost:
            self._replaced.rename(self.output)
        return lost

    def publish(self) -> None:
        """Move the finished dataset into place; what was there before goes only after that."""
        if self.output.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            self.output.rename(self._replaced)
        self.path.rename(self.output)

    def _clear_up(self) -> None:
        """Remove all but the dataset in its place; last of all what tells that it is there."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        for path in self.scratch.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self._mark:
                path.unlink()
        shutil.rmtree(self.root, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything; the output, if there is one, stays as it is.

        A dataset that was moved out of the way and cannot go back, as something else has taken its
        place, is kept where it is, and the new one beside it.
        """
        with suppress(OSError):
            self._restore()
        if self._replaced.exists():
            self.report(
                f"{self.shown} could not be replaced, as something else came to its place; the dataset "
                f"that was there is kept in {self._replaced}, the new one in {self.path}"
            )
            return
        shutil.rmtree(self.root, ignore_errors=True)

    def has_space(self, needed: int) -> bool:
        """Whether the disk has room for so many bytes."""
        return needed <= shutil.disk_usage(self.root).free

    def check_space(self, needed: int) -> None:
        """Raise a DataError when the disk has less room than the estimate."""
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise DataError(
                f"preparing {self.shown} may take up to {mib(needed)} of disk, and "
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


def mib(size: int) -> str:
    """Format a number of bytes for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _target(output: Path) -> Path:
    """Where a dataset has to be made so that it is found under `output`."""
    try:
        return output.resolve()
    except (OSError, RuntimeError):  # Python before 3.13 raises a RuntimeError
        raise DataError(f"output {output} is a symbolic link that leads to itself") from None


def fingerprint_text(fingerprint: Mapping[str, object]) -> str:
    """What is kept of the settings of a run, to be compared with those of the next."""
    return json.dumps(fingerprint, indent=1, sort_keys=True, default=str)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
