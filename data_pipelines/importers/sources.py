"""What a user may name as the source of a dataset, as a list of raw files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from embcomp.data_pipelines.importers.base import Importer, RawFile
from embcomp.data_pipelines.importers.compressed import reading
from embcomp.data_pipelines.splits import SPLITS
from embcomp.errors import DataError
from embcomp.io.remote_paths import as_path

Paths = str | Path | Sequence[str | Path]
Source = Paths | Mapping[str, Paths]


def raw_files(source: Source, importer: Importer) -> list[RawFile]:
    """List the raw files of a source in row order, train before valid before test.

    Raises:
        DataError: a path does not exist, or a mapping's key is no split or train is absent.
    """
    if isinstance(source, Mapping):
        unknown = sorted(set(source) - set(SPLITS))
        if unknown or "train" not in source:
            raise DataError(
                f"files are given for the splits {sorted(source)}; expected train and maybe valid "
                f"and test"
            )
        return [
            RawFile(path=path, split=split)
            for split in SPLITS
            if split in source
            for path in _paths(source[split], importer)
        ]
    files = [RawFile(path=path) for path in _paths(source, importer)]
    seen: set[Path] = set()
    for file in files:
        if file.path.resolve() in seen:
            raise DataError(f"{file.path} is given twice")
        seen.add(file.path.resolve())
    return files


def given_paths(source: Paths) -> list[Path]:
    """List what was named, whether it is there or not."""
    return [as_path(item) for item in ([source] if isinstance(source, str | Path) else source)]


def _paths(source: Paths, importer: Importer) -> list[Path]:
    given = given_paths(source)
    if not given:
        raise DataError(f"no source is given; expected {importer.title}")
    paths: list[Path] = []
    for path in given:
        with reading(path):
            if path.is_dir():
                paths += importer.find(path)
            elif path.is_file():
                paths.append(path)
            else:
                raise DataError(f"source {path} does not exist; expected {importer.title}")
    return paths
