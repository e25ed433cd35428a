"""The files of an artefact: written as a whole or not at all, and read with named errors."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from embcomp.data_pipelines.integrity import check_digests, record_of
from embcomp.data_pipelines.schema import FILE_NAME as DATASET_FILE, DatasetInfo
from embcomp.errors import ArtefactError, one_line
from embcomp.io.tensor_files import StoredTensor, files_of_index, tensors_of_file
from embcomp.io.tensor_writing import NewTensor
from embcomp.io.unfinished import remove_unfinished, unfinished_folder
from embcomp.serving.artefact_config import INDEX_FILE, TENSORS_FILE, DatasetRecord
from embcomp.tables.budget import format_bytes

_T = TypeVar("_T")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes it when all went well.

    What processes that were killed have left beside it, this removes.

    Raises:
        ArtefactError: something is there already, or cannot be made or written there.
    """
    _refuse_existing(path)
    with _named_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        with unfinished_folder(path) as folder:
            yield folder
            folder.chmod(0o755)  # mkdtemp keeps others out
            for file in folder.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    _flush(file)
            _refuse_existing(path)
            folder.rename(path)


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """A full disk and the like as one line, whichever library met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        reason = said or one_line(error)
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise ArtefactError(
            f"{path} could not be written: {reason}; its disk has {format_bytes(free)} free. "
            "Nothing is left of it; make room, or name a folder on another disk"
        ) from error


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ArtefactError(f"{path} exists and is left as it is; remove it or name another folder")


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header_bytes(file: Path) -> dict[str, int]:
    """Bytes of a safetensors file's tensors by the first part of their names, from its header."""
    return bytes_by_role(tensors_of_file(file))


def bytes_by_role(tensors: Mapping[str, StoredTensor | NewTensor]) -> dict[str, int]:
    """Bytes of tensors by the first part of their names."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        role = name.partition(".")[0]
        sizes[role] = sizes.get(role, 0) + tensor.nbytes
    return sizes


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Where the tensors of an artefact are, by their names; none is read yet.

    Raises:
        ArtefactError: a file is missing or damaged.
    """
    if not (folder / INDEX_FILE).is_file():
        if not (folder / TENSORS_FILE).is_file():
            raise ArtefactError(f"{folder} has no {TENSORS_FILE}; copy the whole folder")
        return _of_file(folder / TENSORS_FILE)
    places = _reading(folder / INDEX_FILE, files_of_index)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise ArtefactError(
                f"{folder} has no {name}, which {INDEX_FILE} lists; copy the whole folder"
            )
        found |= _of_file(folder / name)
    odd = sorted(name for name in {*places, *found} if _file_of(found, name) != places.get(name))
    if odd:
        raise ArtefactError(
            f"{folder / INDEX_FILE} is damaged or was changed: it says of the tensor {odd[0]} that it "
            f"is in {places.get(odd[0], 'no file')}; export the run again"
        )
    return found


def _file_of(found: Mapping[str, StoredTensor], name: str) -> str | None:
    return found[name].file.name if name in found else None


def _of_file(file: Path) -> dict[str, StoredTensor]:
    return _reading(file, tensors_of_file)


def _reading(file: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(file)
    except (SafetensorError, ValueError, LookupError, TypeError, OSError, RecursionError) as error:
        raise ArtefactError(
            f"{file} is damaged ({one_line(error)}); export the run again"
        ) from None


def fingerprint(info: DatasetInfo) -> str:
    """The SHA-256 of a dataset's `dataset.json`."""
    return hashlib.sha256((info.folder / DATASET_FILE).read_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RewrittenDataset:
    """What an artefact says of its dataset when ids were numbered anew.

    Attributes:
        info: the description with the new counts.
        vocabularies: by feature, what writes the new columns id, value, count to a file; other features
            keep theirs.
    """

    info: DatasetInfo
    vocabularies: Mapping[str, Callable[[Path], None]]


def copy_dataset(
    info: DatasetInfo, rewritten: RewrittenDataset | None, folder: Path
) -> DatasetRecord:
    """The dataset without its rows: description and vocabularies, which encode raw values."""
    copied = (info if rewritten is None else rewritten.info).model_copy(deep=True)
    vocabularies = {} if rewritten is None else rewritten.vocabularies
    for split in copied.splits.values():
        split.files = []
    for feature in copied.categorical:
        if feature.vocabulary:
            if not feature.vocabulary.endswith(".parquet"):
                raise ArtefactError(
                    f"feature {feature.name!r} has the vocabulary {feature.vocabulary!r}; expected "
                    f"a .parquet file, as other names are those of an artefact's own files"
                )
            target = folder / feature.vocabulary
            if target.exists():
                raise ArtefactError(
                    f"{info.folder / DATASET_FILE}: the vocabulary of feature {feature.name!r} is "
                    f"{feature.vocabulary}, a name that the artefact has given to another file; "
                    "rename it there"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            if feature.name in vocabularies:
                vocabularies[feature.name](target)
                copied.checksums[feature.vocabulary] = record_of(target)
            else:
                shutil.copyfile(info.folder / feature.vocabulary, target)
    copied.save(folder)
    check_digests(copied)
    return DatasetRecord(
        name=info.name, fingerprint=fingerprint(info), renumbered=sorted(vocabularies)
    )
