"""The files of a checkpoint: checked before they are used, and read without running what is in them.

`checksums.json` holds the size and checksum of every other file and a digest of itself. Each rank
computes those of the files that it wrote. torch.distributed.checkpoint keeps its index as a pickle:
it is read here by an unpickler that knows the classes of that index and nothing else, and what is
no tensor is loaded as torch's `weights_only` does it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as index_classes
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from embcomp.errors import CheckpointError, one_line
from embcomp.io.tensor_checksums import file_checksums
from embcomp.training.distributed.process import Process

FORMAT_VERSION = 2
CHECKSUMS_FILE = "checksums.json"
INDEX_FILE = ".metadata"
_INDEX_MODULES = (index_classes.__name__, "torch.distributed.checkpoint.filesystem")
_PIECE_BYTES = 4 << 20
_MOST_PIECES = 1024  # of a shard, as an index of many more would take long to make
_ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))


def random_file(rank: int) -> str:
    """The name of a rank's random state."""
    return f"random-{rank}.pt"


def write_own_checksums(folder: Path, rank: int) -> None:
    """Write down the checksums of what a rank wrote, for `write_checksums`."""
    own = [*folder.glob(f"__{rank}_*.distcp"), folder / random_file(rank)]
    (folder / f".own-{rank}.json").write_text(json.dumps(_records(own)))


def write_checksums(folder: Path, own: Iterable[str]) -> None:
    """Put the checksums of all ranks together; one rank calls it, last of all.

    Args:
        folder: the checkpoint's.
        own: names of files that no rank has counted as its own.
    """
    files = _records(folder / name for name in own)
    for part in folder.glob(".own-*.json"):
        files |= json.loads(part.read_text())
        part.unlink()
    content = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    text = json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"
    (folder / CHECKSUMS_FILE).write_text(text)


def check_files(folder: Path, way_out: str, process: Process = _ALONE) -> None:
    """Check every file of a checkpoint; ranks share the work, and all raise what one has found.

    Args:
        folder: the checkpoint's.
        way_out: what to do about a damaged one.
        process: whose ranks all call this.

    Raises:
        CheckpointError: a file is missing or not the one that was written.
    """
    files = read_checksums(folder, way_out)
    names = sorted(files)[process.rank :: process.world_size]
    problem = _first_problem(folder, {name: files[name] for name in names}, way_out)
    problems: list[str | None] = [problem]
    if process.world_size > 1:
        problems = [None] * process.world_size
        dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)


def check_file_of(folder: Path, name: str, way_out: str) -> None:
    """Check one file of a checkpoint.

    Args:
        folder: the checkpoint's.
        name: the file's, one of `read_checksums`.
        way_out: what to do about a damaged one.

    Raises:
        CheckpointError: it is missing or not the one that was written.
    """
    problem = _first_problem(folder, {name: read_checksums(folder, way_out)[name]}, way_out)
    if problem is not None:
        raise CheckpointError(problem)


def checked_bytes(folder: Path, name: str, way_out: str) -> bytes:
    """A small file's bytes, which are those that were written."""
    files = read_checksums(folder, way_out)
    if name not in files:
        raise CheckpointError(f"{folder} could not be read: it has no {name}. {way_out}")
    problem = _first_problem(folder, {name: files[name]}, way_out)
    if problem is not None:
        raise CheckpointError(problem)
    return (folder / name).read_bytes()


def read_checksums(folder: Path, way_out: str) -> dict[str, Any]:
    """For each file of a checkpoint its size and checksum.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or another version's.
    """
    path = folder / CHECKSUMS_FILE
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
        stated = content.pop("digest")
        version = content["format_version"]
        files = dict(content["files"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint of this version: it has no {CHECKSUMS_FILE}. "
            "If an older embcomp wrote it, finish the run with that one, or start afresh under "
            f"another name. {way_out}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} could not be read: {CHECKSUMS_FILE} is damaged ({one_line(error)}). {way_out}"
        ) from None
    if stated != _digest(content):
        raise CheckpointError(
            f"{folder} could not be read: {CHECKSUMS_FILE} is damaged or was changed. {way_out}"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format_version {version}; this embcomp reads {FORMAT_VERSION}. Finish "
            "the run with the embcomp that wrote it, or start afresh under another name"
        )
    return files


def _first_problem(folder: Path, files: Mapping[str, Any], way_out: str) -> str | None:
    for name, record in files.items():
        problem = _size_problem(folder / name, record)
        if problem is not None:
            return _damage(folder, name, problem, way_out)
    found = file_checksums(folder / name for name in files)
    for name, record in files.items():
        if found[folder / name] != record["crc32"]:
            return _damage(folder, name, "is damaged: its checksum differs", way_out)
    return None


def _size_problem(path: Path, record: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return "is missing"
    if size == record["bytes"]:
        return None
    return f"is damaged: it has {size:,} bytes, {record['bytes']:,} were written"


def _damage(folder: Path, name: str, problem: str, way_out: str) -> str:
    what = "is not a readable checkpoint" if name == INDEX_FILE else "could not be read"
    return f"{folder} {what}: {name} {problem}. {way_out}"


def _records(paths: Iterable[Path]) -> dict[str, Any]:
    return {
        path.name: {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in file_checksums(paths).items()
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint's tensors; of pickles, only the index's own classes.

    Args:
        folder: the checkpoint's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of what is where.

        Raises:
            pickle.UnpicklingError: it holds anything but what such an index is made of.
        """
        with (self._folder / INDEX_FILE).open("rb") as file:
            found = _IndexUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"expected an index, found a {type(found).__name__}")
        meta = getattr(found, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        found.storage_meta = meta
        return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name == "Size":
            return torch.Size
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout)):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where the checkpoint was written, which nobody asks
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module in _INDEX_MODULES:
            found = super().find_class(module, name)
            plain = isinstance(found, type) and found.__module__ == module
            if plain and (hasattr(found, "__dataclass_fields__") or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


def _enum_member(found: Any, name: str) -> Enum:
    """How early releases of Python 3.11 (3.11.2) pickle enums; nothing else is got this way."""
    if isinstance(found, type) and issubclass(found, Enum) and name in found.__members__:
        return found.__members__[name]
    raise pickle.UnpicklingError(f"{name} of {found} has no place in a checkpoint's index")


class PiecewisePlanner(DefaultSavePlanner):
    """Writes long tensors in pieces of rows, as one shard after another.

    A table is a view of the memory that holds all of a kernel's, and what is no whole memory is copied
    before it is written, or read whole before it goes where it belongs. So no piece is longer than 4 MiB,
    or a 1024th of a shard.
    """

    def __init__(self) -> None:
        super().__init__()
        self._wholes: dict[tuple[str, tuple[int, ...]], tuple[MetadataIndex, int, int]] = {}

    def create_local_plan(self) -> SavePlan:
        """What this rank writes."""
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self._pieces(item)]
        return dataclasses.replace(plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The values of an item.

        Args:
            write_item: one of the plan's.
        """
        index = write_item.index
        found = self._wholes.get((index.fqn, tuple(index.offset or ())))
        if found is None:
            return super().resolve_data(write_item)
        whole, row, rows = found
        tensor: torch.Tensor = self.lookup_object(whole)
        return tensor.detach().narrow(0, row, rows)

    def _pieces(self, item: WriteItem) -> Iterator[WriteItem]:
        data = item.tensor_data
        if data is None or len(data.chunk.sizes) not in (1, 2):
            yield item
            return
        rows, size = data.chunk.sizes[0], data.chunk.sizes.numel() * data.properties.dtype.itemsize
        at_once = max(_PIECE_BYTES, size // _MOST_PIECES)
        if size <= at_once:
            yield item
            return
        step = max(1, at_once * rows // size)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            offsets = torch.Size((data.chunk.offsets[0] + start, *data.chunk.offsets[1:]))
            sizes = torch.Size((count, *data.chunk.sizes[1:]))
            self._wholes[item.index.fqn, tuple(offsets)] = item.index, start, count
            yield dataclasses.replace(
                item,
                index=MetadataIndex(item.index.fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=dataclasses.replace(
                    data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes)
                ),
            )


class CheckpointPlanner(DefaultLoadPlanner):
    """Loads what is no tensor as plain values, running nothing."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where it belongs.

        Args:
            read_item: which one.
            value: as `torch.save` wrote it.
        """
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
