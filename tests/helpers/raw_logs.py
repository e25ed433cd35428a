"""Small raw logs for the tests of preparing data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from embcomp.data_pipelines.schema import DatasetInfo

CRITEO_COLUMNS = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def criteo_rows(rows: int, seed: int = 0, values: int = 30) -> list[list[str]]:
    """Rows of Criteo fields as text; the third field of each row is its number."""
    rng = np.random.default_rng(seed)
    table = []
    for row in range(rows):
        numbers = [str(n) if n >= -1 else "" for n in rng.integers(-4, 300, 13)]
        numbers[1] = str(row)
        drawn = np.minimum(rng.zipf(1.5, 26), values)
        words = ["" if v == 7 else f"{v * 2654435761 % 2**32:08x}" for v in drawn]
        table.append([str(int(rng.random() < 0.3)), *numbers, *words])
    return table


def criteo_bytes(rows: list[list[str]]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def write_criteo(path: Path, rows: int, seed: int = 0, values: int = 30) -> list[list[str]]:
    table = criteo_rows(rows, seed, values)
    path.write_bytes(criteo_bytes(table))
    return table


def read_split(info: DatasetInfo, split: str) -> pl.DataFrame:
    files = info.split(split).files
    frames = [pl.read_parquet(info.folder / file) for file in files]
    return pl.concat(frames) if frames else pl.DataFrame()


def vocabulary(info: DatasetInfo, name: str) -> pl.DataFrame:
    feature = next(f for f in info.categorical if f.name == name)
    return pl.read_parquet(info.folder / feature.vocabulary)


def decode(info: DatasetInfo, name: str) -> dict[int, str]:
    found = vocabulary(info, name)
    return dict(zip(found["id"].to_list(), found["value"].to_list()))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
