"""How long `import embcomp`, the command's help and the check of a YAML take, beside another checkout.

    python benchmarks/import_time.py [--against ../before] [--repeats 15] [--json times.json]

Each command is a fresh process of this interpreter. The two checkouts take turns in changing order, so
that whatever else the machine does slows both; one round warms the file caches and is not counted. The
ratio is the median of the pairs', this checkout over the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "from embcomp.cli import main; main()"
SUBJECTS = {
    "import embcomp": ["-c", "import embcomp"],
    "embcomp --help": ["-c", COMMAND, "--help"],
    "embcomp validate RECIPE": ["-c", COMMAND, "validate", "configs/criteo_autoint_unified.yaml"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    checkouts = {"this": ROOT}
    if args.against is not None:
        if not (args.against / "embcomp" / "__init__.py").is_file():
            sys.exit(f"--against {args.against}: expected a checkout of embcomp")
        checkouts["other"] = args.against.resolve()
    figures = {}
    for name, arguments in SUBJECTS.items():
        figures[name] = summary(measure(arguments, checkouts, args.repeats))
        print(name, *(f"{key} {value:.3f}" for key, value in figures[name].items()), sep="  ")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(
    arguments: list[str], checkouts: dict[str, Path], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each round, by checkout."""
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    for number in range(-1, repeats):
        order = list(checkouts) if number % 2 else list(reversed(checkouts))
        for name in order:
            seconds = time_process(arguments, checkouts[name])
            if number >= 0:
                times[name].append(seconds)
    return times


def time_process(arguments: list[str], checkout: Path) -> float:
    # Found before any installed copy: `-c` puts the working directory first as well.
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    begun = time.perf_counter()
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=environment, check=False, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} in {checkout}: {done.stderr}")
    return seconds


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Least and median seconds of each checkout, and the median ratio."""
    found: dict[str, float] = {}
    for name, seconds in times.items():
        found |= {f"{name} min": min(seconds), f"{name} median": statistics.median(seconds)}
    if "other" in times:
        pairs = zip(times["this"], times["other"])
        found["ratio"] = statistics.median(mine / theirs for mine, theirs in pairs)
    return found


if __name__ == "__main__":
    main()
