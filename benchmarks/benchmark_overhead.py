"""What `embcomp benchmark` takes beyond the trainings that it starts.

    python benchmarks/benchmark_overhead.py configs/criteo_deepfm_full.yaml --data DATASET [--trials 2]

Runs a small benchmark (full and hashed tables, two seeds, one training at a time), then the same trainings
again as `embcomp train` runs them, each from its own YAML in a process of its own. Prints the processor
time of both with their child processes, and of the benchmark's own process, which a busy machine hardly
changes, and what is left when it grows with the number of trainings alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", default="10%", help="of the hashed tables")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        path = home / "benchmark.yaml"
        path.write_text(yaml.safe_dump(document(args)))
        whole = processor_seconds(["benchmark", str(path), "--folder", str(home / "all"), "-q"])
        again = processor_seconds(["benchmark", str(path), "--folder", str(home / "all"), "-q"])
        runs = sorted((home / "all" / "overhead").glob("*/*.yaml"))
        bare = sum(
            processor_seconds(["train", str(run), "--runs", str(home / "bare"), "-q"])
            for run in runs
        )
    each = (whole - again - bare) / len(runs)
    print(
        f"{len(runs)} trainings: {bare:.1f} s of processor time bare, {whole:.1f} s in a benchmark"
    )
    print(
        f"{100 * each * len(runs) / bare:+.1f} % with each training; {again:.1f} s once for the start, "
        "the comparisons and the page"
    )


def document(args: argparse.Namespace) -> dict[str, object]:
    return {
        "name": "overhead",
        "recipe": args.recipe,
        "overrides": {"data": {"path": str(args.data.resolve())}},
        "methods": ["hash"],
        "budgets": [args.budget],
        "seeds": args.seeds,
        "tuning": {"trials": args.trials, "rounds": 1},
        "processes": {"devices": "cpu", "threads": 1},
    }


def processor_seconds(words: list[str]) -> float:
    """User and system time of a command and of every process that it waited for."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "embcomp.cli", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


if __name__ == "__main__":
    main()
