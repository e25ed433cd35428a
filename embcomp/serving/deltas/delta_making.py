"""`embcomp diff`: what of an artefact is not in the one before, as a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from embcomp.errors import ArtefactError
from embcomp.io.atomic_files import atomic_path
from embcomp.io.tensor_files import StoredTensor
from embcomp.serving.artefact_config import CONFIG_FILE, ArtefactConfig, TablesRecord
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.artefact_integrity import check_artefact
from embcomp.serving.deltas.delta_file import (
    DeltaRecord,
    DeltaWriter,
    NewFile,
    OldPlace,
    StretchRecord,
)
from embcomp.serving.deltas.row_differences import difference
from embcomp.serving.deltas.stretches import OpenFiles, Stretch, stretches_of
from embcomp.serving.deltas.vocabulary_entries import (
    EntryDifference,
    entry_difference,
    packed,
    read_entries,
    with_difference,
    write_entries,
)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A delta that was written.

    Attributes:
        path: the file.
        bytes: its size.
        new_bytes: the size of the artefact that it makes.
        rows: all rows and those that changed, by kind: `rows` (of tables), `codes` (what methods
            keep beside rows, 16 bytes each), `network`, `files`.
        entries: of vocabularies, how many entries are `new`, `counted` anew and `dropped`.
    """

    path: Path
    bytes: int
    new_bytes: int
    rows: Mapping[str, tuple[int, int]]
    entries: Mapping[str, int]


@dataclass
class _Tally:
    rows: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    entries: Counter[str] = field(default_factory=Counter)
    stretches: int = 0


def make_delta(
    old: str | Path, new: str | Path, path: str | Path, *, whole_vocabularies: bool = False
) -> Delta:
    """Write what changed from one artefact to another of the same kind.

    Both are checked, and read block by block.

    Args:
        old: the folder of the artefact that is there.
        new: the folder of the one that is to be there.
        path: the file to write.
        whole_vocabularies: whether vocabularies go by their bytes, which needs no version of pyarrow
            to make them again, in place of their entries.

    Raises:
        ArtefactError: one of them is damaged, they are of two kinds, or the file exists.
    """
    old, new, path = Path(old), Path(new), Path(path)
    if path.exists() or path.is_symlink():
        raise ArtefactError(f"{path} exists and is left as it is; remove it or name another file")
    if not path.parent.is_dir():
        raise ArtefactError(f"{path.parent} is not a folder; make it, or name a file elsewhere")
    was, becomes = check_artefact(old), check_artefact(new)
    _check_alike(was, becomes, old, new)
    tally, files = _Tally(), [*sorted(becomes.files), CONFIG_FILE]
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        opened = stack.enter_context(OpenFiles())
        maker = _Maker(
            old=old,
            new=new,
            was=was,
            tensors=find_tensors(new),
            before=_stretches_before(old, was),
            whole_vocabularies=whole_vocabularies,
            opened=opened,
            tally=tally,
        )
        with DeltaWriter(temporary) as writer:
            records = [maker.add(writer, n, name) for n, name in enumerate(files)]
            writer.end(
                DeltaRecord(
                    embcomp_version=version("embcomp"),
                    pyarrow_version=pa.__version__,
                    old=was.digest,
                    new=becomes.digest,
                    files=records,
                )
            )
    return Delta(
        path=path,
        bytes=path.stat().st_size,
        new_bytes=sum(record.bytes for record in records),
        rows={kind: (tally.rows[kind], tally.changed[kind]) for kind in sorted(tally.rows)},
        entries=dict(tally.entries),
    )


@dataclass(frozen=True, kw_only=True)
class _Maker:
    old: Path
    new: Path
    was: ArtefactConfig
    tensors: Mapping[str, StoredTensor]
    before: Mapping[object, Stretch]
    whole_vocabularies: bool
    opened: OpenFiles
    tally: _Tally

    def add(self, writer: DeltaWriter, number: int, name: str) -> NewFile:
        """Add a file, as a vocabulary's entries where it is one."""
        found = self._entries(name)
        if found is None:
            return self._add_stretches(writer, name)
        for kind, table in found.parts().items():
            writer.add_table(kind, number, packed(table))
        for kind, told in (("entries", "new"), ("counts", "counted"), ("dropped", "dropped")):
            self.tally.entries[told] += found.parts()[kind].height
        file = self.new / name
        return NewFile(path=name, bytes=file.stat().st_size, sha256=_sha256(file), vocabulary=name)

    def _entries(self, name: str) -> EntryDifference | None:
        """How a vocabulary differs from the old one, where its bytes can be made again of that."""
        if self.whole_vocabularies or not name.endswith(".parquet") or name not in self.was.files:
            return None
        read, before = read_entries(self.new / name), read_entries(self.old / name)
        if read is None or before is None:
            return None
        entries, schema = read
        found = entry_difference(before[0], entries)
        if before[1] != schema or not with_difference(before[0], found).equals(entries):
            return None
        with TemporaryDirectory() as folder:
            again = Path(folder) / "again.parquet"
            write_entries(entries, schema, again)
            return found if _sha256(again) == _sha256(self.new / name) else None

    def _add_stretches(self, writer: DeltaWriter, name: str) -> NewFile:
        file, digest, records = self.new / name, hashlib.sha256(), []
        for new in stretches_of(file, self.tensors):
            old = self._before(new, name)
            rows, shift = self.opened.old_rows(old, new.row_bytes), 0
            kind, number = _kind(new), self.tally.stretches
            self.tally.stretches += 1
            self.tally.rows[kind] += new.count
            for block, (first, count) in enumerate(new.blocks()):
                content = self.opened.rows(new, first, first + count)
                digest.update(content.reshape(-1)[: new.nbytes - first * new.row_bytes].data)
                found = difference(content, first, rows, shift)
                shift = found.shift
                self.tally.changed[kind] += found.literals
                if found.content is not None:
                    writer.add_block(number, block, found.content)
            place = None
            if old is not None:
                within = old.file.relative_to(self.old).as_posix()
                place = OldPlace(file=within, start=old.start, bytes=old.nbytes)
            records.append(StretchRecord(bytes=new.nbytes, row_bytes=new.row_bytes, old=place))
        size = sum(record.bytes for record in records)
        return NewFile(path=name, bytes=size, sha256=digest.hexdigest(), stretches=records)

    def _before(self, new: Stretch, name: str) -> Stretch | None:
        """What a stretch is compared with: the tensor of its name, or what its file began with."""
        found = self.before.get((None, self.old / name) if new.tensor is None else new.tensor)
        return found if found is not None and found.row_bytes == new.row_bytes else None


def _stretches_before(old: Path, config: ArtefactConfig) -> dict[object, Stretch]:
    """The stretches of an artefact by their tensor, or by None and their file."""
    tensors, found = find_tensors(old), dict[object, Stretch]()
    for name in (*config.files, CONFIG_FILE):
        for stretch in stretches_of(old / name, tensors):
            found[(None, stretch.file) if stretch.tensor is None else stretch.tensor] = stretch
    return found


def _kind(stretch: Stretch) -> str:
    if stretch.tensor is None:
        return "files"
    parts = stretch.tensor.split(".")
    if parts[0] == "network":
        return "network"
    return "rows" if parts[1] == "rows" else "codes"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_alike(was: ArtefactConfig, becomes: ArtefactConfig, old: Path, new: Path) -> None:
    """Raise an ArtefactError where nothing of the old artefact could serve for the new one."""
    before, after = _facts(was), _facts(becomes)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            raise ArtefactError(
                f"{new} is of another kind than {old}: {name}: {after.get(name, 'not there')} in the "
                f"new one, {before.get(name, 'not there')} in the old one; a delta goes from an "
                "artefact to a later one of the same tables and methods. Ship the new one whole"
            )


def _facts(config: ArtefactConfig) -> dict[str, str]:
    """What two artefacts have in common for one to be made of the other."""
    found = {"the model": "none" if config.model is None else config.model.name}
    for role, record in (("tables", config.tables), ("first_order", config.first_order)):
        if record is not None:
            found[f"the kind of {role}"] = record.kind
            found |= _table_facts(role, record)
    return found


def _table_facts(role: str, record: TablesRecord) -> dict[str, str]:
    methods = {
        table: str(entry.method.get("name")) for entry in record.plan for table in entry.tables
    }
    found = {}
    for table in record.tables:
        found[f"the method of {role}' {table.name}"] = methods.get(table.name, "none")
        found[f"the width of {role}' {table.name}"] = str(table.embedding_dim)
    types = ", ".join(f"{name} {kind}" for name, kind in sorted(record.row_types.items()))
    return {**found, f"the row types of {role}": types}
