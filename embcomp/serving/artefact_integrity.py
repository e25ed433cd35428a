"""Whether an artefact is the one that was written: a checksum for each tensor and each file.

`config.json` holds them all and a digest of itself, so that one number stands for the whole folder.
Checksums are computed in threads while the tables are built from the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, EmbcompError
from embcomp.io.tensor_checksums import Checksums
from embcomp.serving.artefact_config import CONFIG_FILE, TENSORS_FILE, ArtefactConfig, FileChecksum

_WAY_OUT = "copy the whole folder again, or export the run again"
_CHUNK = 1 << 22  # elements that are looked at together


def with_checksums(
    config: ArtefactConfig, folder: Path, tensors: Mapping[str, Tensor]
) -> ArtefactConfig:
    """The description with a checksum of each tensor and of each other file in the folder.

    Args:
        config: the artefact's description so far.
        folder: where all files but `config.json` lie.
        tensors: what was written, by the names in the file.
    """
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file != folder / CONFIG_FILE
    )
    with Checksums() as checksums:
        begun = {name: checksums.of_tensor(tensor) for name, tensor in tensors.items()}
        own = {file: checksums.of_file(file, stop=_covered(file)) for file in files}
        return config.model_copy(
            update={
                "tensors": {name: wait() for name, wait in begun.items()},
                "files": {
                    file.relative_to(folder).as_posix(): FileChecksum(
                        bytes=file.stat().st_size, crc32=wait()
                    )
                    for file, wait in own.items()
                },
            }
        )


def _covered(file: Path) -> int | None:
    """How many bytes a file's own checksum covers: of the tensors' file, its header."""
    if file.name != TENSORS_FILE:
        return None
    with file.open("rb") as stream:
        return min(8 + int.from_bytes(stream.read(8), "little"), file.stat().st_size)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise an ArtefactError for a tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ArtefactError(
                f"the tensor {name} holds NaN or infinities, so that nothing was written; look for "
                "the step at which training diverged, and save weights from before it"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(_CHUNK))


@contextmanager
def checked(folder: Path, config: ArtefactConfig, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Check every byte of an artefact while it is used to build something.

    Args:
        folder: the artefact's.
        config: its description, whose own digest was checked.
        tensors: what was read, by the names in the file.

    Raises:
        ArtefactError: at the end, for a file or tensor that is not the one that was written.
    """
    with Checksums() as checksums:
        check = _begin(checksums, folder, config, tensors)
        try:
            yield
        except EmbcompError:  # it names the damage better than a checksum can
            raise
        except Exception:
            check()  # damaged values may break anything; then this is why
            raise
        check()


def _begin(
    checksums: Checksums, folder: Path, config: ArtefactConfig, tensors: Mapping[str, Tensor]
) -> Callable[[], None]:
    """Start all checksums; what is returned waits for them and raises for the first odd one."""
    begun = {name: checksums.of_tensor(tensors[name]) for name in config.tensors if name in tensors}
    files = [_begin_file(checksums, folder, name, config) for name in config.files]

    def check() -> None:
        for name, wait in begun.items():
            if wait() != config.tensors[name]:
                raise ArtefactError(_changed_tensor(folder, name, tensors[name]))
        for check_file in files:
            check_file()

    return check


def _begin_file(
    checksums: Checksums, folder: Path, name: str, config: ArtefactConfig
) -> Callable[[], None]:
    """Start with one file; what is returned waits, and raises where it is another than written."""
    path, record = folder / name, config.files[name]
    if not path.is_file():
        return _failing(f"{folder} has no {name}, which {CONFIG_FILE} lists; {_WAY_OUT}")
    size = path.stat().st_size
    if size != record.bytes:
        return _failing(
            f"{path} is damaged or was changed: it has {size:,} bytes, {record.bytes:,} were "
            f"written; {_WAY_OUT}"
        )
    wait = checksums.of_file(path, stop=_covered(path))

    def check() -> None:
        if wait() != record.crc32:
            raise ArtefactError(
                f"{path} is damaged or was changed: its checksum is not the one in {CONFIG_FILE}; "
                f"{_WAY_OUT}"
            )

    return check


def _failing(text: str) -> Callable[[], None]:
    """Raise later, when whoever reads the file has had the chance to say it better."""

    def check() -> None:
        raise ArtefactError(text)

    return check


def _changed_tensor(folder: Path, name: str, tensor: Tensor) -> str:
    odd = "" if _is_finite(tensor) else ", and it holds NaN or infinities"
    return (
        f"{folder / TENSORS_FILE} is damaged or was changed: the checksum of the tensor {name} is "
        f"not the one in {CONFIG_FILE}{odd}; {_WAY_OUT}"
    )


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
        raise ArtefactError(f"{folder / CONFIG_FILE} lists no {name}; {_WAY_OUT}")
    with Checksums() as checksums:
        _begin_file(checksums, folder, name, config)()
