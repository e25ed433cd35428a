"""What a training run takes at its peak, beside what `embcomp plan` says.

    python benchmarks/run_memory.py [--rows 1000000,4000000,8000000] [--method full]

Writes a dataset whose one feature has so many ids, trains a few steps on it in a process of its own, with
a checkpoint, and prints the peak of its resident memory beside the planned bytes of its tables (rows, padding
and optimizer state). Exit code 1 where it is more than 500 MB above the plan.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

MOST = 500 * 10**6
DIM = 16


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default="1000000,4000000,8000000")
    parser.add_argument("--method", default="full", help="a method's name that needs no size")
    args = parser.parse_args()
    over = False
    print("| ids | planned | peak | above the plan |\n|---|---|---|---|")
    for rows in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                planned, peak = pool.apply(measure, (folder, rows, args.method))
        over |= peak - planned > MOST
        megabytes = (planned / 1e6, peak / 1e6, (peak - planned) / 1e6)
        print(
            "| {:,} | {:,.0f} MB | {:,.0f} MB | {:,.0f} MB |".format(rows, *megabytes), flush=True
        )
    return 1 if over else 0


def measure(folder: str, rows: int, method: str) -> tuple[int, int]:
    """The planned bytes of a run's tables, and the peak of its resident memory."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from embcomp.config import parse_config
    from embcomp.data_pipelines.integrity import record_of
    from embcomp.data_pipelines.schema import CategoricalFeature, DatasetInfo, SplitInfo
    from embcomp.planning.config_plan import plan_config, sizes_of
    from embcomp.training import train

    data = Path(folder) / "data"
    data.mkdir()
    rng, splits, checksums = np.random.default_rng(0), {}, {}
    for split in ("train", "valid", "test"):
        labels = np.tile([0, 1], 2048).astype(np.float32)
        ids = rng.integers(0, rows, 4096).astype(np.int32)
        schema = pa.schema(
            [pa.field("label", pa.float32(), False), pa.field("item", pa.int32(), False)]
        )
        table = pa.Table.from_arrays([pa.array(labels), pa.array(ids)], schema=schema)
        file = f"{split}.parquet"
        pq.write_table(table, data / file, write_page_checksum=True)
        checksums[file] = record_of(data / file, 2048)
        splits[split] = SplitInfo(files=[file], rows=4096, positives=2048)
    info = DatasetInfo(
        name="one",
        categorical=[CategoricalFeature(name="item", num_embeddings=rows)],
        splits=splits,
        checksums=checksums,
    )
    info.save(data)
    config = parse_config(
        {
            "name": "run",
            "data": {"path": str(data), "batch_size": 512, "eval_batch_size": 512},
            "tables": {"embedding_dim": DIM, "method": method},
            "model": "fm",
        }
    )
    plan = plan_config(config, sizes_of(info))
    planned = sum(line.train for line in [*plan.lines(), *plan.first_order_lines()])
    train(config, runs=folder, quiet=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return planned, peak


if __name__ == "__main__":
    sys.exit(main())
