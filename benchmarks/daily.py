"""Whether a click model that goes on from yesterday beats one that begins anew each day.

    python benchmarks/daily.py [--rows 40000] [--days 7] [--seeds 3] [--methods full,pq]

Generates a Criteo log in which values are renewed and effects drift, cuts it into days, prepares each day
with the vocabularies of the day before (`--extend`, room of 30 %) and trains two models on it: one anew
(cold), one that begins with yesterday's (`train.warm_start`). Both are tested on the whole next day. With
`pq` there is a third that begins with yesterday's full tables and searches its codes anew each day
(restructured); the warm one keeps the codes of the first day. Prints the AUC of the next day, the mean over
seeds; exit code 1 where a warm mean is not above the cold one on a day after the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from embcomp.config import parse_config
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.training import Report, train

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "low_dim": {"name": "low_dim", "width": 8},
    "unified": {"name": "unified", "num_buckets": 20_000},
    "hash": {"name": "hash", "num_buckets": 2_000},
    "qr": {"name": "qr", "divisor": 16},
    "pq": {"name": "pq", "subvector_dim": 4, "num_codewords": 64},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=40_000, help="of a day")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="full")
    parser.add_argument("--drift", type=float, default=0.5)
    parser.add_argument("--renewal", type=float, default=0.6)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    args = parser.parse_args()
    begin = time.perf_counter()
    worse = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        days = write_days(folder, args.rows, args.days + 1, args.drift, args.renewal)
        data = prepare_days(folder, days)
        for method in args.methods.split(","):
            found = [follow(folder, data, method, seed) for seed in range(args.seeds)]
            worse += show(method, found)
    print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if worse else 0


def write_days(folder: Path, rows: int, days: int, drift: float, renewal: float) -> list[Path]:
    """One generated log, cut into files of so many rows."""
    whole = folder / "log.txt"
    config = SyntheticConfig(
        rows=rows * days, scale=0.01, drift=drift, renewal=renewal, first_order=1.2
    )
    write_criteo_log(whole, config)
    paths = []
    with whole.open("rb") as lines:
        for day in range(1, days + 1):
            paths.append(folder / f"day{day}.txt")
            with paths[-1].open("wb") as out:
                out.writelines(next(lines) for _ in range(rows))
    whole.unlink()
    return paths


def prepare_days(folder: Path, days: list[Path]) -> list[Path]:
    """Datasets whose test split is the next day; a tenth of the day's last rows picks the best step."""
    data: list[Path] = []
    for number, (day, next_day) in enumerate(pairwise(days), 1):
        lines = day.read_bytes().splitlines(keepends=True)
        cut = len(lines) * 9 // 10
        parts = {"train": lines[:cut], "valid": lines[cut:]}
        for split, own in parts.items():
            (folder / f"{split}.txt").write_bytes(b"".join(own))
        output = folder / f"data{number}"
        info = prepare(
            {"train": folder / "train.txt", "valid": folder / "valid.txt", "test": next_day},
            output,
            importer="criteo",
            min_count=3,
            room="30%",
            extend=data[-1] if data else None,
        )
        ids = sum(feature.num_embeddings for feature in info.categorical)
        changes = [feature.change for feature in info.categorical if feature.change]
        new = sum(change.new for change in changes)
        print(f"day {number}: {ids:,} ids, {new:,} new values", flush=True)
        data.append(output)
    return data


def follow(folder: Path, data: list[Path], method: str, seed: int) -> dict[str, list[float]]:
    """The AUC of the next day, day by day, of each way to go on."""
    aucs: dict[str, list[float]] = {"cold": [], "warm": []}
    runs = folder / f"runs-{method}-{seed}"
    staged = method == "pq"
    if staged:
        aucs["restructured"] = []
    for number, path in enumerate(data, 1):
        cold = run(runs, f"cold{number}", path, method, seed)
        aucs["cold"].append(auc(cold))
        first = number == 1
        before = runs / (f"cold{number - 1}" if number == 2 else f"warm{number - 1}")
        more = {} if first else {"warm_start": str(before)}
        warm = cold if first else run(runs, f"warm{number}", path, method, seed, **more)
        aucs["warm"].append(auc(warm))
        if staged:
            rows = {} if first else {"warm_start": str(runs / f"full{number - 1}")}
            run(runs, f"full{number}", path, "full", seed, **rows)
            start = {"start_from": str(runs / f"full{number}")}
            again = run(runs, f"again{number}", path, method, seed, **start)
            aucs["restructured"].append(auc(again))
    return aucs


def run(runs: Path, name: str, data: Path, method: str, seed: int, **more: str) -> Report:
    """Train on a day for an epoch."""
    config = {
        "name": name,
        "seed": 2021 + seed,
        "data": {"path": str(data), "batch_size": 512},
        "tables": {"embedding_dim": 16, "method": METHODS[method]},
        "model": {"name": "deepfm", "hidden_units": [64, 64]},
        "train": {"row_optimizer": {"learning_rate": 0.05}, **more},
    }
    return train(parse_config(config), runs=runs, quiet=True)


def auc(report: Report) -> float:
    """The AUC of the next day."""
    assert report.test is not None
    return float(report.test["auc"])


def show(method: str, found: list[dict[str, list[float]]]) -> int:
    """Print the means over seeds; on how many days after the first the warm one is not ahead."""
    ways = list(found[0])
    print(f"\n{method}: AUC of the next day, mean of {len(found)} seeds")
    print(
        "| day | "
        + " | ".join(ways)
        + " | warm - cold |\n|---" * 1
        + "|---" * (len(ways) + 1)
        + "|"
    )
    worse = 0
    for day in range(len(found[0]["cold"])):
        means = {way: statistics.mean(each[way][day] for each in found) for way in ways}
        gains = [each["warm"][day] - each["cold"][day] for each in found]
        cells = " | ".join(f"{means[way]:.4f}" for way in ways)
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        print(f"| {day + 1} | {cells} | {statistics.mean(gains):+.4f} ± {spread:.4f} |", flush=True)
        worse += day > 0 and statistics.mean(gains) <= 0
    return worse


if __name__ == "__main__":
    sys.exit(main())
