"""Whether an artefact is the one that was written: a checksum for each tensor and each file.

`config.json` holds them all and a digest of itself, so that one number stands for the whole folder.
A tensor's is computed when its bytes are in the cache anyway, those of files in threads beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, EmbcompError
from embcomp.io.tensor_checksums import Checksums
from embcomp.io.tensor_files import header_size
from embcomp.serving.artefact_config import (
    CONFIG_FILE,
    TENSORS_SUFFIX,
    ArtefactConfig,
    FileChecksum,
)
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.artefact_tensors import WAY_OUT, TensorReader

_CHUNK = 1 << 22  # elements that are looked at together


def with_checksums(
    config: ArtefactConfig, folder: Path, tensors: Mapping[str, str]
) -> ArtefactConfig:
    """The description with a checksum of each tensor and of each other file in the folder.

    Args:
        config: the artefact's description so far.
        folder: where all files but `config.json` lie.
        tensors: the checksums of what was written, by the names in the files.
    """
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file != folder / CONFIG_FILE
    )
    with Checksums() as checksums:
        own = {file: checksums.of_file(file, stop=_covered(file)) for file in files}
        return config.model_copy(
            update={
                "tensors": dict(tensors),
                "files": {
                    file.relative_to(folder).as_posix(): FileChecksum(
                        bytes=file.stat().st_size, crc32=wait()
                    )
                    for file, wait in own.items()
                },
            }
        )


def _covered(file: Path) -> int | None:
    """How many bytes a file's own checksum covers: of a file of tensors, its header."""
    return header_size(file) if file.suffix == TENSORS_SUFFIX else None


@contextmanager
def checked(folder: Path, config: ArtefactConfig) -> Iterator[None]:
    """Check every file of an artefact while it is used; tensors are checked as they are read.

    Args:
        folder: the artefact's.
        config: its description, whose own digest was checked.

    Raises:
        ArtefactError: at the end, for a file that is not the one that was written.
    """
    with Checksums() as checksums:
        files = [_begin_file(checksums, folder, name, config) for name in config.files]
        try:
            yield
        except EmbcompError:  # it names the damage better than a checksum can
            raise
        except Exception:
            _check_all(files)  # damaged values may break anything; then this is why
            raise
        _check_all(files)


def check_artefact(folder: Path) -> ArtefactConfig:
    """Check every byte of an artefact through small buffers; returns its description.

    Raises:
        ArtefactError: something in it is not what was written.
    """
    config = ArtefactConfig.read(folder)
    with checked(folder, config), TensorReader(mapped=True) as reader:
        stored = find_tensors(folder)
        odd = sorted(set(stored) ^ set(config.tensors))
        if odd:
            raise ArtefactError(
                f"{folder}: the tensor {odd[0]} is in {CONFIG_FILE} or in the files, not in both; "
                f"{WAY_OUT}"
            )
        for name, tensor in stored.items():
            reader.check(tensor, config.tensors[name])
    return config


def _check_all(files: Iterable[Callable[[], None]]) -> None:
    for check in files:
        check()


def _begin_file(
    checksums: Checksums, folder: Path, name: str, config: ArtefactConfig
) -> Callable[[], None]:
    """Start with one file; what is returned waits, and raises where it is another than written."""
    path, record = folder / name, config.files[name]
    if not path.is_file():
        return _failing(f"{folder} has no {name}, which {CONFIG_FILE} lists; {WAY_OUT}")
    size = path.stat().st_size
    if size != record.bytes:
        return _failing(
            f"{path} is damaged or was changed: it has {size:,} bytes, {record.bytes:,} were "
            f"written; {WAY_OUT}"
        )
    wait = checksums.of_file(path, stop=_covered(path))

    def check() -> None:
        if wait() != record.crc32:
            raise ArtefactError(
                f"{path} is damaged or was changed: its checksum is not the one in {CONFIG_FILE}; "
                f"{WAY_OUT}"
            )

    return check


def _failing(text: str) -> Callable[[], None]:
    """Raise later, when whoever reads the file has had the chance to say it better."""

    def check() -> None:
        raise ArtefactError(text)

    return check


def check_vocabularies(config: ArtefactConfig, info: DatasetInfo, source: Path) -> None:
    """Raise an ArtefactError where a table has more or fewer ids than its feature's vocabulary.

    Args:
        config: describes the tables.
        info: the dataset whose ids they take.
        source: where both lie, for the error.
    """
    sizes = {feature.name: feature.num_embeddings for feature in info.categorical}
    for record in (config.tables, config.first_order):
        for table in [] if record is None else record.tables:
            for name in table.feature_names:
                if sizes.get(name, table.num_embeddings) != table.num_embeddings:
                    raise ArtefactError(
                        f"{source}: table {table.name!r} holds {table.num_embeddings:,} ids, and "
                        f"the vocabulary of its feature {name!r} has {sizes[name]:,} of them; they "
                        "are of two datasets. Export the run again from the dataset that it was "
                        "trained on"
                    )


def check_file(folder: Path, config: ArtefactConfig, name: str) -> None:
    """Check one file, before it is read by itself.

    Raises:
        ArtefactError: the file is not the one that was written.
    """
    if name not in config.files:
        raise ArtefactError(f"{folder / CONFIG_FILE} lists no {name}; {WAY_OUT}")
    with Checksums() as checksums:
        _begin_file(checksums, folder, name, config)()
