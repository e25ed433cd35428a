"""Where a dataset grows that lies behind a URL: object stores move no folders and lock nothing.

Rows and vocabularies go to their final place at once, and `dataset.json` comes last: until then there
is no dataset. What the dataset will not have lies in `.<name>.partial` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel
from typing_extensions import override

from embcomp.data_pipelines.preparing.pieces import Content, read_piece, write_piece, write_text
from embcomp.data_pipelines.preparing.workspace import Report, Workspace, fingerprint_text
from embcomp.data_pipelines.schema import FILE_NAME
from embcomp.errors import DataError, one_line
from embcomp.io.remote_paths import RemotePath, as_path


class UrlWorkspace(Workspace):
    """A dataset behind a URL, in the making.

    Nothing keeps two runs to the same URL apart. Whether a piece of an earlier run is as it was
    written is not asked, only whether its files are there: stores keep objects whole or not at all.
    """

    def __init__(self, output: RemotePath, *, overwrite: bool, report: Report) -> None:
        self.shown = self.output = self.path = output
        self.overwrite = overwrite
        self.report = report
        self.root = output.parent / f".{output.name}.partial"
        self.scratch = self.root / "scratch"
        self.resumed = False
        self.published = False
        self._mark = self.scratch / "fingerprint.json"

    @override
    def check_output(self, fingerprint: Mapping[str, object]) -> None:
        if self.overwrite:
            raise DataError(
                f"output {self.shown} lies behind a URL, where no dataset can be replaced at once; "
                f"name another folder, or remove this one and leave out --overwrite"
            )
        with store_errors(self.shown):
            if self._left_by(fingerprint):
                return
            if (self.path / FILE_NAME).is_file():
                raise DataError(
                    f"output {self.shown} already holds a dataset; name another folder, or remove it"
                )
            if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
                raise DataError(
                    f"output {self.shown} is not empty; name a new folder, or remove what another "
                    f"run with other settings may have left there and in {self.root}"
                )

    @contextmanager
    @override
    def open(self, fingerprint: Mapping[str, object]) -> Iterator[None]:
        with store_errors(self.shown):
            left = self._left_by(fingerprint)
            self.published = left and (self.path / FILE_NAME).is_file()
            self.resumed = left and not self.published
            if not left:
                _remove(self.root)
                self.scratch.mkdir()
                write_text(self._mark, fingerprint_text(fingerprint))
            self.path.mkdir()
            yield
            _remove(self.root)

    @override
    def seal(self, name: str, content: BaseModel, files: Mapping[Path, str]) -> None:
        write_piece(
            self.scratch / name, content, {str(path): sha256 for path, sha256 in files.items()}
        )

    @override
    def earlier(self, name: str, kind: type[Content]) -> Content | None:
        if not self.resumed:
            return None
        return read_piece(
            self.scratch / name, kind, self.report, is_same=lambda url, _: as_path(url).is_file()
        )

    @override
    def publish(self) -> None:
        """Do nothing: the description, which was written last, makes the dataset."""

    @override
    def discard(self) -> None:
        """Remove everything that the run wrote."""
        with suppress(OSError):
            _remove(self.path)
            _remove(self.root)

    @override
    def keeps_after(self, error: Exception) -> bool:
        """A store that fails for a moment is no fault of the input."""
        return isinstance(error, OSError)

    @override
    def has_space(self, needed: int) -> bool:
        """Say no: what need not be kept is not sent there."""
        return False

    @override
    def check_space(self, needed: int) -> None:
        """Do nothing: a store has room, or says that it has none."""


@contextmanager
def store_errors(shown: Path) -> Iterator[None]:
    """Say in one line what a store refuses: rights, an absent bucket, a connection."""
    try:
        yield
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(
            f"{shown} cannot be written: {one_line(error)}; give the right to list, read, write and "
            f"delete there, or choose another place"
        ) from None
    except OSError as error:
        raise DataError(
            f"{shown} cannot be reached: {one_line(error)}; the same command goes on from what is "
            f"there"
        ) from None


def _remove(path: Path) -> None:
    assert isinstance(path, RemotePath)
    path.remove()
