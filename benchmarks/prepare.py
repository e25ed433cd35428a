"""How fast `prepare` is, within which memory, and how many times as fast as something else.

    python benchmarks/prepare.py [--rows 5000000 | --source FILE] [--max-memory 512MiB] [--rounds 3]
        [--json FILE] [--against COMMAND] [--folder DIR]

Generates a Criteo log (or takes --source), prepares it in a process of its own, round after round, and
prints rows per second, CPU time and the most resident memory of any round; exit code 1 when that is above
--max-memory. Seconds are those of the call of `prepare`, without the start of Python.

COMMAND is another program that does the same, in turn with this one. `{source}` and `{output}` in it stand
for the log and for a folder to be made. The last line that it prints is a JSON object with the `rows` that
it prepared and the `seconds` that it took (what else it has is kept); a ratio is the median over the rounds
of its time divided by ours. Another commit is measured by this file, on a work tree of it:

    git worktree add --detach ../older e3f9063
    python benchmarks/prepare.py --against \\
        "env PYTHONPATH=../older python benchmarks/prepare.py --once {source} {output}"

FuxiCTR is measured by `benchmarks/fuxictr_prepare.py`.

--json adds a line with all figures to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--scale", type=float, default=0.05, help="of Criteo's cardinalities")
    parser.add_argument("--max-memory", default="512MiB")
    parser.add_argument("--min-count", type=int, default=1)
    parser.add_argument("--split", default="random")
    parser.add_argument("--numeric", default="log1p", help="the transform of numbers")
    parser.add_argument("--source", type=Path, help="a Criteo log to use instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", help="another program, as described above")
    parser.add_argument("--json", type=Path, help="a file to add a line of figures to")
    parser.add_argument(
        "--folder", type=Path, help="where to work; a temporary folder if not given"
    )
    parser.add_argument("--once", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        source, output = args.once
        print(json.dumps(measure(source, output, args)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = args.source or generated(Path(folder) / "train.txt", args)
        ours, theirs = rounds(source, Path(folder), args)
        return report(source, ours, theirs, args)


def generated(path: Path, args: argparse.Namespace) -> Path:
    """Write a Criteo log."""
    from embcomp.data_pipelines.synthetic.generate import write_criteo_log
    from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig

    start = time.perf_counter()
    write_criteo_log(path, SyntheticConfig(rows=args.rows, scale=args.scale))
    print(f"generated {args.rows:,} rows in {time.perf_counter() - start:.0f} s", flush=True)
    return path


def rounds(
    source: Path, folder: Path, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each round measured: of this program, and of the other one if there is any."""
    options = ["max_memory", "min_count", "split", "numeric"]
    told = [
        text for name in options for text in (f"--{name.replace('_', '-')}", getattr(args, name))
    ]
    mine = shlex.join([sys.executable, __file__, *map(str, told), "--once", "{source}", "{output}"])
    commands = [mine, *([args.against] if args.against else [])]
    found: list[list[dict[str, Any]]] = [[] for _ in commands]
    for number in range(args.rounds):
        order = range(len(commands)) if number % 2 == 0 else reversed(range(len(commands)))
        for at in order:
            output = folder / f"program-{at}" / "out"
            output.parent.mkdir()
            found[at].append(run(commands[at], source, output, is_mine=at == 0))
            shutil.rmtree(output.parent)
    return found[0], found[1] if args.against else []


def run(command: str, source: Path, output: Path, *, is_mine: bool) -> dict[str, Any]:
    """Run a program; return what its last line says."""
    words = [
        word.replace("{source}", str(source)).replace("{output}", str(output))
        for word in shlex.split(command)
    ]
    environment = dict(os.environ)
    if is_mine:
        paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        float(found["seconds"]), int(found["rows"])
    except (ValueError, KeyError, TypeError, IndexError):
        sys.exit(f"{command} did not end with a line of JSON:\n{done.stdout}{done.stderr}"[-3000:])
    return found


def report(
    source: Path,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    args: argparse.Namespace,
) -> int:
    """Print the figures; return the exit code."""
    from embcomp.data_pipelines.preparing.workspace import mib
    from embcomp.tables.budget import parse_budget

    limit, size = parse_budget(args.max_memory, name="--max-memory"), source.stat().st_size
    rows, peak = ours[0]["rows"], max(each["peak_bytes"] for each in ours)
    print(f"input        {rows:,} rows, {mib(size)}, {size / limit:.1f} times the memory limit")
    print(f"ids          {ours[0]['ids']:,}")
    wall, cpu = (statistics.median(e[name] for e in ours) for name in ("seconds", "cpu_seconds"))
    print(f"wall time    {wall:.1f} s, {rows / wall:,.0f} rows/s, {size / wall / 1e6:,.0f} MB/s")
    print(f"CPU time     {cpu:.1f} s, {rows / cpu:,.0f} rows/s of one core")
    print(f"peak memory  {mib(peak)} of {mib(limit)}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    line: dict[str, Any] = {"rows": rows, "bytes": size, "limit": limit, "ours": ours}
    if theirs:
        line |= {"against": args.against, "theirs": theirs, "ratios": ratios(ours, theirs)}
        for name, ratio in line["ratios"].items():
            print(f"ratio        {ratio:.2f} in {name.replace('_', ' ')} of the other program's")
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(peak > limit)


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as long the other program takes for a row, by each clock that it told."""
    return {
        name: statistics.median(
            (other[name] / other["rows"]) / (mine[name] / mine["rows"])
            for mine, other in zip(ours, theirs)
        )
        for name in ("seconds", "cpu_seconds")
        if all(name in each for each in theirs)
    }


def measure(source: str, output: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prepare in this process; return its figures."""
    # Nothing else of embcomp: another commit may have it elsewhere.
    from embcomp.data_pipelines.prepare import prepare

    wall, cpu = time.perf_counter(), time.process_time()
    info = prepare(
        source,
        output,
        importer="criteo",
        min_count=args.min_count,
        max_memory=args.max_memory,
        split=args.split,
        numeric=args.numeric,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ids = sum(feature.num_embeddings for feature in info.categorical)
    return {
        "rows": info.raw_rows,
        "seconds": wall,
        "cpu_seconds": cpu,
        "ids": ids,
        "peak_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Return this process's peak resident bytes (getrusage's figure may be a parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    if match is None:
        raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    sys.exit(main())
