"""How fast `prepare` is, and whether it stays within its memory.

    python benchmarks/prepare.py [--rows 5000000] [--max-memory 512MiB] [--folder DIR]

Generates a Criteo log (or takes --source), prepares it in a process of its own and prints rows per
second, CPU time and the process's peak resident memory; exit code 1 when the peak is above
--max-memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from embcomp.data_pipelines.preparing.workspace import mib
from embcomp.tables.budget import parse_budget


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--scale", type=float, default=0.05, help="of Criteo's cardinalities")
    parser.add_argument("--max-memory", default="512MiB")
    parser.add_argument("--min-count", type=int, default=1)
    parser.add_argument("--source", type=Path, help="a Criteo log to use instead")
    parser.add_argument(
        "--folder", type=Path, help="where to work; a temporary folder if not given"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = args.source or Path(folder) / "train.txt"
        if args.source is None:
            from embcomp.data_pipelines.synthetic.generate import write_criteo_log
            from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig

            start = time.perf_counter()
            write_criteo_log(source, SyntheticConfig(rows=args.rows, scale=args.scale))
            print(f"generated {args.rows:,} rows in {time.perf_counter() - start:.0f} s")
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            result = pool.apply(
                measure, (str(source), str(Path(folder) / "out"), args.max_memory, args.min_count)
            )
        rows, ids, wall, cpu, peak = result
        size = source.stat().st_size
    limit = parse_budget(args.max_memory, name="--max-memory")
    print(f"input        {rows:,} rows, {mib(size)}, {size / limit:.1f} times the memory limit")
    print(f"ids          {ids:,}")
    print(f"wall time    {wall:.1f} s, {rows / wall:,.0f} rows/s")
    print(f"CPU time     {cpu:.1f} s, {rows / cpu:,.0f} rows/s of one core")
    print(f"peak memory  {mib(peak)} of {mib(limit)}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return int(peak > limit)


def measure(
    source: str, output: str, max_memory: str, min_count: int
) -> tuple[int, int, float, float, int]:
    """Prepare in this process; return rows, ids, wall and CPU seconds and peak bytes."""
    from embcomp.data_pipelines.prepare import prepare

    wall, cpu = time.perf_counter(), time.process_time()
    info = prepare(
        source,
        output,
        importer="criteo",
        min_count=min_count,
        max_memory=max_memory,
        split="random",
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ids = sum(feature.num_embeddings for feature in info.categorical)
    return info.raw_rows, ids, wall, cpu, peak_memory()


def peak_memory() -> int:
    """Return this process's peak resident bytes (getrusage's figure may be a parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    if match is None:
        raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    sys.exit(main())
