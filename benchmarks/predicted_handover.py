"""How long hand-overs of large tables will take, from measured ones of small tables.

    python benchmarks/handover.py --rows 250000 --dim 64 --against "" --json measured.jsonl
    python benchmarks/handover.py --rows 1000000 --dim 64 --against "" --json measured.jsonl
    python benchmarks/predicted_handover.py measured.jsonl [--tables 26] [--rows 100000000] [--ranks 8,16,64]
        [--markdown FILE]

The model: of each stage, `a + b * rows` seconds of the processor are fitted to what was measured at two or
more sizes of one width on one rank. Blocks of rows are shared out evenly, so `b` counts for a rank's part of
the rows. `a` is mostly k-means on samples that do not grow with the tables: once for all tables, or once for
each where they have codebooks of their own (`lr2vq`); codebooks (a quarter of the columns of a set) are shared
out to the ranks, too. Ranks are taken to have a core each like the one measured on, and files to be as fast
as they are written and read: what a hand-over reads and writes is about the tables before and after it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from result_table import ResultTable, check_folder

OWN_CODEBOOKS = ("lr2vq",)
"""Methods of which each table has its own codebooks, so that k-means runs for each."""
SUBVECTOR = 4  # columns; of `handover.py`


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measured", type=Path, help="of `handover.py --json`")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--rows", type=int, default=100_000_000, help="of each table")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    check_folder(args.markdown)
    worlds = [int(each) for each in args.ranks.split(",")]
    found, dim = read(args.measured)
    table = ResultTable(
        f"{args.tables} tables of {args.rows:,} rows x {dim}: seconds of the processor",
        ["method", "into", "a", "b a million rows", *(f"{world} ranks" for world in worlds)],
        ["method", "into"],
    )
    for (method, stage), sizes in found.items():
        fixed, slope = fitted(sizes)
        times = [
            predicted(method, fixed, slope, args.tables, args.rows, dim, world) for world in worlds
        ]
        shown = [f"{seconds / 60:.0f} min" for seconds in times]
        table.add(method, stage, f"{fixed:.1f} s", f"{1e6 * slope:.2f} s", *shown)
    table.show(args.markdown)


def read(path: Path) -> tuple[dict[tuple[str, str], dict[int, float]], int]:
    """By method and stage, seconds by rows; and the width of all."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    dims = set()
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["commit"] != "here" or line["ranks"] != 1:
            continue
        dims.add(line["dim"])
        known = found[line["method"], line["stage"]]
        seconds = line["processor_seconds"]
        known[line["rows"]] = min(seconds, known.get(line["rows"], seconds))
    if len(dims) != 1 or any(len(sizes) < 2 for sizes in found.values()):
        raise SystemExit(f"{path}: expected one width, and two sizes of each method, on one rank")
    return found, dims.pop()


def fitted(sizes: dict[int, float]) -> tuple[float, float]:
    """Seconds however few the rows, and those of a row; through the smallest and the largest size."""
    low, high = min(sizes), max(sizes)
    slope = max(0.0, (sizes[high] - sizes[low]) / (high - low))
    return max(0.0, sizes[low] - slope * low), slope


def predicted(
    method: str, fixed: float, slope: float, tables: int, rows: int, dim: int, ranks: int
) -> float:
    """Seconds of the rank that takes longest."""
    sets = tables if method in OWN_CODEBOOKS else 1
    codebooks = sets * (dim // SUBVECTOR)
    each = fixed / (dim // SUBVECTOR)
    return each * -(-codebooks // ranks) + slope * tables * rows / ranks


if __name__ == "__main__":
    main()
