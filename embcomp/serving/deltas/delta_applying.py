"""`embcomp patch`: the next artefact, made of the one that is there and a delta."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from polars.exceptions import PolarsError

from embcomp.errors import ArtefactError, one_line
from embcomp.serving.artefact_config import CONFIG_FILE, ArtefactConfig
from embcomp.serving.artefact_folder import new_folder
from embcomp.serving.artefact_integrity import check_artefact
from embcomp.serving.deltas.delta_file import DeltaReader, NewFile, StretchRecord
from embcomp.serving.deltas.row_differences import Rows, largest_content, restored
from embcomp.serving.deltas.stretches import OpenFiles, Stretch
from embcomp.serving.deltas.vocabulary_entries import (
    read_entries,
    unpacked,
    with_difference,
    write_entries,
)


def apply_delta(old: str | Path, delta: str | Path, out: str | Path) -> ArtefactConfig:
    """Make the artefact that a delta leads to; it is the one that the delta was made of, to the byte.

    Args:
        old: the folder of the artefact that the delta is of.
        delta: the file.
        out: the folder to make.

    Returns:
        The new artefact's description.

    Raises:
        ArtefactError: the delta is of another artefact, it or the old artefact is damaged, or `out`
            exists; nothing is left.
    """
    old, out = Path(old), Path(out)
    was = ArtefactConfig.read(old)
    with DeltaReader(Path(delta)) as reader, OpenFiles() as opened, new_folder(out) as folder:
        record = reader.record
        if was.digest != record.old:
            told = "is what it makes" if was.digest == record.new else "is another one"
            raise ArtefactError(
                f"{reader.path} was made of the artefact with the digest {record.old[:12]}; {old} "
                f"({was.digest[:12]}) {told}. Take the artefact before it, or the delta of this one"
            )
        patch = _Patch(old=old, folder=folder, reader=reader, opened=opened)
        number = 0
        for n, file in enumerate(record.files):
            number = patch.make(n, file, number)
        if not (folder / CONFIG_FILE).is_file() or ArtefactConfig.read(folder).digest != record.new:
            patch.refuse(CONFIG_FILE)
    return ArtefactConfig.read(out)


@dataclass(frozen=True, kw_only=True)
class _Patch:
    old: Path
    folder: Path
    reader: DeltaReader
    opened: OpenFiles

    def make(self, n: int, file: NewFile, number: int) -> int:
        """Make a file and compare its digest; returns the number of the next stretch."""
        target, digest = self.folder / file.path, hashlib.sha256()
        if target.exists():
            self.refuse(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.vocabulary is not None:
            self._vocabulary(n, file.vocabulary, target)
            with target.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        else:
            with target.open("wb") as stream:
                for stretch in file.stretches:
                    for content in self._contents(stretch, number):
                        digest.update(content)
                        stream.write(content)
                    number += 1
        if digest.hexdigest() != file.sha256:
            self.refuse(file.path)
        return number

    def refuse(self, name: str) -> None:
        """Say why the new artefact would be another one."""
        check_artefact(self.old)  # names what is damaged there
        made_by = self.reader.record.pyarrow_version
        way_out = "copy the delta again"
        if name.endswith(".parquet") and made_by != pa.__version__:
            way_out = (
                f"the delta was made with pyarrow {made_by}, which writes vocabularies otherwise than "
                f"{pa.__version__}: install it, or make the delta with --whole-vocabularies"
            )
        raise ArtefactError(
            f"{self.reader.path} does not make the {name} that it was made of; {way_out}"
        )

    def _contents(self, record: StretchRecord, number: int) -> Iterator[memoryview]:
        """A stretch's bytes, block by block."""
        new = Stretch(file=self.folder, start=0, nbytes=record.bytes, row_bytes=record.row_bytes)
        rows, shift = self.opened.old_rows(self._before(record), record.row_bytes), 0
        for block, (first, count) in enumerate(new.blocks()):
            shape = (count, record.row_bytes)
            content = self.reader.block(number, block, largest_content(shape))

            def make(
                content: bytes | None = content,
                shape: tuple[int, int] = shape,
                first: int = first,
                shift: int = shift,
            ) -> tuple[Rows, int]:
                return restored(content, shape, first, rows, shift)

            found, shift = self.reader.reading(make)
            yield found.reshape(-1)[: record.bytes - first * record.row_bytes].data

    def _before(self, record: StretchRecord) -> Stretch | None:
        if record.old is None:
            return None
        place = record.old
        return Stretch(
            file=self.old / place.file,
            start=place.start,
            nbytes=place.bytes,
            row_bytes=record.row_bytes,
        )

    def _vocabulary(self, n: int, name: str, target: Path) -> None:
        before = read_entries(self.old / name)
        if before is None:
            check_artefact(self.old)
            raise ArtefactError(
                f"{self.old / name} is not the vocabulary that it was; copy it again"
            )

        def make() -> None:
            difference = unpacked(lambda kind: self.reader.table(kind, n))
            write_entries(with_difference(before[0], difference), before[1], target)

        try:
            self.reader.reading(make)
        except PolarsError as error:
            raise ArtefactError(
                f"{self.reader.path} is damaged ({one_line(error)}); copy the delta again"
            ) from None
