"""How fast prepared rows become batches, beside the limit: decoding the same files and no more.

python benchmarks/loader.py                       # 2M generated rows, 26 + 13 features
python benchmarks/loader.py --dataset data/criteo --split train
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import (
    CategoricalFeature,
    DatasetInfo,
    NumericFeature,
    SplitInfo,
)
from embcomp.data_pipelines.synthetic.generate import draw
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig

ROW_GROUP_ROWS = 65_536
MIN_ROWS_PER_SECOND = 1.5e6


def write_dataset(folder: Path, rows: int, scale: float) -> DatasetInfo:
    """Write generated rows as `prepare` would lay them out, values standing for their ranks."""
    config = SyntheticConfig(rows=rows, scale=scale)
    path = folder / "part-00000.parquet"
    positives, writer = 0, None
    for raw, _, label in draw(config):
        columns = {"label": label.astype(np.float32)}
        logs = np.log1p(np.where(raw.absent, 0, np.maximum(raw.counts, 0)))
        columns |= {f"I{i + 1}": column.astype(np.float32) for i, column in enumerate(logs)}
        columns |= {
            f"C{f + 1}": np.where(values < 0, 0, values + 2).astype(np.int32)
            for f, values in enumerate(raw.values)
        }
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        positives += int(label.sum())
    assert writer is not None
    writer.close()
    info = DatasetInfo(
        name="generated",
        numeric=[NumericFeature(name=f"I{i + 1}") for i in range(13)],
        categorical=[
            CategoricalFeature(name=f"C{f + 1}", num_embeddings=cardinality + 2)
            for f, cardinality in enumerate(config.cardinalities)
        ],
        splits={"train": SplitInfo(files=[path.name], rows=rows, positives=positives)},
    )
    info.save(folder)
    return info


def decode_only(info: DatasetInfo, split: str) -> int:
    """Decode every row group with pyarrow and drop it: no loader can be faster."""
    rows = 0
    for file in info.split(split).files:
        with pq.ParquetFile(info.folder / file) as reader:
            for index in range(reader.num_row_groups):
                rows += len(reader.read_row_group(index))
    return rows


def load(info: DatasetInfo, split: str, batch_size: int, shuffle: bool, prefetch: int) -> int:
    loader = ParquetLoader(
        info, split, batch_size=batch_size, shuffle=shuffle, drop_last=False, prefetch=prefetch
    )
    return sum(len(batch.labels) for batch in loader)


@dataclass(frozen=True)
class Speed:
    """Rows per second by the clock, and per second of CPU time, which other processes' load on the
    machine does not lower."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall / 1e6:8.2f} M rows/s{self.cpu / 1e6:8.2f} M rows per CPU second"


def measure(run: Callable[[], int], repeats: int) -> Speed:
    """The best of several runs."""
    wall = cpu = 0.0
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        rows = run()
        wall = max(wall, rows / (time.perf_counter() - start))
        cpu = max(cpu, rows / (time.process_time() - start_cpu))
    return Speed(wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a prepared dataset; generated if absent")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--scale", type=float, default=0.06, help="of Criteo's cardinalities")
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dataset is not None:
            info = DatasetInfo.load(arguments.dataset)
        else:
            info = write_dataset(Path(folder), arguments.rows, arguments.scale)
        split, size = arguments.split, arguments.batch_size
        limit = measure(partial(decode_only, info, split), arguments.repeats)
        print(f"{info.split(split).rows:,} rows, batches of {size:,}")
        print(f"{'pyarrow, decode only':24}{limit}")
        slowest = limit.wall
        for shuffle in (False, True):
            for prefetch in (0, 2):
                run = partial(load, info, split, size, shuffle, prefetch)
                speed = measure(run, arguments.repeats)
                name = f"{'shuffled' if shuffle else 'in order'}, prefetch {prefetch}"
                print(f"{name:24}{speed}, {speed.cpu / limit.cpu:.2f} of decoding alone")
                slowest = min(slowest, speed.wall)
        verdict = "met" if slowest >= MIN_ROWS_PER_SECOND else "MISSED"
        print(f"target {MIN_ROWS_PER_SECOND / 1e6:.1f} M rows/s: {verdict}")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
