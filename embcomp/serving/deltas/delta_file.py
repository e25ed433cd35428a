"""The file of a delta: a zip archive of compressed blocks and one description, and no pickle.

    delta.json        which artefact it is of, which one it makes, and of what each file is made
    blocks/3/17       block 17 of the file's or tensor's stretch 3 (`row_differences`), by zstd
    entries/5.parquet values that were added to a vocabulary or have another id
    counts/5.parquet  counts that are others
    dropped/5.parquet ids of the old vocabulary whose values are gone: tombstones

Blocks that are as they were are not there.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from embcomp.errors import ArtefactError, one_line
from embcomp.io.inner_paths import InnerPath

FORMAT = "embcomp delta"
DESCRIPTION = "delta.json"
_LARGEST_DESCRIPTION = 256 << 20
_T = TypeVar("_T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OldPlace(_Strict):
    """Bytes of a file of the old artefact."""

    file: InnerPath
    start: int = Field(ge=0)
    bytes: int = Field(ge=0)


class StretchRecord(_Strict):
    """Consecutive bytes of a new file.

    Attributes:
        bytes: how many.
        row_bytes: of a row; the last row may be shorter.
        old: what they are compared with.
    """

    bytes: int = Field(ge=0)
    row_bytes: int = Field(gt=0)
    old: OldPlace | None = None

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.row_bytes > max(self.bytes, 64):
            raise ValueError(f"a row of {self.row_bytes:,} bytes is more than all of them")
        return self


class NewFile(_Strict):
    """A file of the new artefact.

    Attributes:
        path: its place in the folder.
        bytes: its size.
        sha256: of its content.
        stretches: what it is made of; numbers of blocks go on from file to file.
        vocabulary: the old file, where this one is made of a vocabulary's entries.
    """

    path: InnerPath
    bytes: int = Field(ge=0)
    sha256: str
    stretches: list[StretchRecord] = []
    vocabulary: InnerPath | None = None


class DeltaRecord(_Strict):
    """The content of `delta.json`.

    Attributes:
        embcomp_version: what wrote it.
        pyarrow_version: what wrote the vocabularies, where they are made of entries.
        old: the digest of the artefact that it is of.
        new: the digest of the one that it makes.
        files: every file of the new one.
    """

    format: Literal["embcomp delta"] = "embcomp delta"
    format_version: Literal[1] = 1
    embcomp_version: str
    pyarrow_version: str
    old: str
    new: str
    files: list[NewFile]


class DeltaWriter:
    """Writes a delta; a context manager that ends the file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def add_block(self, stretch: int, block: int, content: bytes) -> None:
        """Add a block's difference."""
        self._add(f"blocks/{stretch}/{block}", _CODEC.compress(content, asbytes=True))

    def add_table(self, kind: str, file: int, content: bytes) -> None:
        """Add a part of a vocabulary, as Parquet."""
        self._add(f"{kind}/{file}.parquet", content)

    def end(self, record: DeltaRecord) -> None:
        """Add the description."""
        text = record.model_dump_json(indent=1).encode("utf-8")
        self._zip.writestr(_info(DESCRIPTION, zipfile.ZIP_DEFLATED), text)

    def _add(self, name: str, content: bytes) -> None:
        self._zip.writestr(_info(name, zipfile.ZIP_STORED), content)


class DeltaReader:
    """Reads a delta; a context manager that closes it.

    Args:
        path: the file.

    Raises:
        ArtefactError: it is none, is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ArtefactError(
                f"{path} does not exist; `embcomp diff OLD NEW DELTA` makes a delta"
            )
        self._zip = self.reading(lambda: zipfile.ZipFile(path))
        self._names = set(self._zip.namelist())
        if DESCRIPTION not in self._names:
            self._zip.close()
            raise ArtefactError(
                f"{path} is not a delta: it has no {DESCRIPTION}; `embcomp diff OLD NEW DELTA` makes one"
            )
        text = self._content(DESCRIPTION, _LARGEST_DESCRIPTION)
        try:
            self.record = DeltaRecord.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ArtefactError(
                f"{path}: {DESCRIPTION} is damaged or of another version: {place}: {first['msg']}; "
                "copy the delta again, or use the embcomp that wrote it"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def block(self, stretch: int, block: int, largest: int) -> bytes | None:
        """A block's difference, of at most so many bytes; None where there is none."""
        name = f"blocks/{stretch}/{block}"
        if name not in self._names:
            return None
        packed = self._content(name, 2 * largest + 1024)
        return self.reading(lambda: _unpacked(packed, largest))

    def table(self, kind: str, file: int) -> bytes:
        """A part of a vocabulary, as Parquet."""
        return self._content(f"{kind}/{file}.parquet", None)

    def reading(self, read: Callable[[], _T]) -> _T:
        """What is read, any failure of it as one line."""
        try:
            return read()
        except _DAMAGED as error:
            raise ArtefactError(
                f"{self.path} is damaged ({one_line(error)}); copy the delta again"
            ) from None

    def _content(self, name: str, largest: int | None) -> bytes:
        def read() -> bytes:
            size = self._zip.getinfo(name).file_size
            if largest is not None and size > largest:
                raise ValueError(f"{name} says that it has {size:,} bytes")
            return self._zip.read(name)

        return self.reading(read)


_CODEC = pa.Codec("zstd", compression_level=3)
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    pa.ArrowException,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,  # of an entry that says that it is encrypted
)


def _unpacked(packed: bytes, largest: int) -> bytes:
    """What zstd packed; its frame says how much it is."""
    stream = pa.CompressedInputStream(pa.BufferReader(packed), "zstd")
    content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"a block has more than {largest:,} bytes")
    return bytes(content)


def _info(name: str, kind: int) -> zipfile.ZipInfo:
    """An entry without a time: the same artefacts have the same delta."""
    info = zipfile.ZipInfo(name)
    info.compress_type = kind
    return info
