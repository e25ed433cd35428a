"""How long tables take from one stage to the next, and what memory that takes beside a rank's shards.

    python benchmarks/handover.py [--methods pq,dnis] [--rows 1000000] [--dim 16] [--ranks 1]
        [--against e3f9063] [--more] [--json FILE]

A run of each method is made whose stages are a step long, and its hand-overs are measured: on this
checkout, and in turn on the one of another commit (`--against ""` leaves it out), where tables are whole on
one rank, as not all of its methods can be placed row-wise. Seconds are those of the clock, which a busy
machine spoils, and of the processor, of the rank that took most. `extra memory` is the
most anonymous memory of any rank during a hand-over, over that at its beginning, as a share of a rank's
part of the tables. With `--more` the first rank then compacts the run's tables, exports and inspects them,
and exports them with vocabularies rewritten where something is pruned; it has no part of the tables, so that what
this takes is a share of all of them. `--json` adds an object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from result_table import ResultTable

REPOSITORY = Path(__file__).resolve().parent.parent
AGAINST = "e3f9063"

METHODS: dict[str, dict[str, Any]] = {
    "pq": {"name": "pq", "subvector_dim": 4},
    "lr2vq": {"name": "lr2vq", "subvector_dim": 4, "latent_dim": 2},
    "dnis": {"name": "dnis", "budget": "25%"},
    "optembed": {"name": "optembed", "budget": "25%", "generations": 0, "population": 1},
    "low_rank": {"name": "low_rank", "latent_dim": 4},
    "matryoshka": {"name": "matryoshka", "budget": "50%", "width_grid": 8},
}

DATASET = """
import sys
try:
    from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
except ImportError:  # where it was once
    from embcomp.data_pipelines.toy import write_toy_dataset
folder, rows = sys.argv[1], int(sys.argv[2])
sizes = {"rows": (rows, 2000, 2000), "num_values": (rows - 2, 1000, 50)}
write_toy_dataset(folder, row_group_rows=1 << 17, **sizes)
"""

CHILD = """
import gc, json, os, sys, threading, time
from pathlib import Path
import embcomp.training.run as run_module
from embcomp.config import load_config
from embcomp.training import train

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

found, prepare = [], run_module.prepare_start

def stage_of(args):  # what a hand-over is called with has changed between commits
    index = next(each for each in args if isinstance(each, int))
    parts = [getattr(each, "schedule", each) for each in args]
    return next(each for each in parts if hasattr(each, "stages")).stages[index].name

def measured(stage, function):
    gc.collect()
    before, most, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.wait(0.002):
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, processor = time.perf_counter(), time.process_time()
    try:
        return function()
    finally:
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        stop.set()
        watcher.join()
        extra = max(0, most[0] - before)
        line = {"stage": stage, "seconds": seconds, "processor": processor, "extra": extra}
        found.append(line)

def compacted(run):
    from embcomp.training.stages.opened_model import open_trained
    from embcomp.training.stages.run_context import RunContext
    open_trained(RunContext.opened(run)).tables.compact()

def after_training(run):  # what one process does with the tables of all
    from embcomp.errors import ConfigError
    from embcomp.serving.artefact_report import inspect_artefact
    from embcomp.training.export.export import export_run
    measured("compact", lambda: compacted(run))
    measured("export", lambda: export_run(run, rows=2000))
    measured("inspect", lambda: inspect_artefact(f"{run}/artefact"))
    try:
        measured("rewrite", lambda: export_run(run, f"{run}/rewritten", rewrite=True, rows=2000))
    except ConfigError:  # nothing is pruned
        found.pop()

run_module.prepare_start = lambda *args: measured(stage_of(args), lambda: prepare(*args))
config, runs, out, more = sys.argv[1:]
loaded = load_config(config)
train(loaded, runs=runs, quiet=True)
rank = os.environ.get("RANK", "0")
if more and rank == "0":
    after_training(f"{runs}/{loaded.name}")
Path(f"{out}.{rank}").write_text(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the largest table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--against", default=AGAINST, help="a commit; empty for none")
    parser.add_argument(
        "--more", action="store_true", help="also compact, export, inspect and rewrite vocabularies"
    )
    parser.add_argument("--json", type=Path, help="a file to add results to")
    args = parser.parse_args()
    table = ResultTable(
        f"hand-overs, {args.rows:,} rows x {args.dim}, {args.ranks} rank(s)",
        ["method", "stage", "commit", "seconds", "of the processor", "extra memory"],
        ["method", "stage", "commit"],
    )
    with tempfile.TemporaryDirectory() as name, checkouts(args.against, Path(name)) as commits:
        folder = Path(name)
        for commit, checkout in commits.items():
            write_dataset(folder / f"data-{commit}", checkout, args.rows)
        for method in args.methods.split(","):
            for commit, checkout in commits.items():
                for line in measure(method, commit, checkout, folder, args):
                    ratio = f"{line['extra_memory_ratio']:.2f}"
                    times = [f"{line[key]:.2f}" for key in ("seconds", "processor_seconds")]
                    table.add(method, str(line["stage"]), commit, *times, ratio)
                    if args.json:
                        with args.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
    table.show()


@contextmanager
def checkouts(against: str, folder: Path) -> Iterator[dict[str, Path]]:
    """This checkout, and another commit's beside it while it is needed."""
    found = {"here": REPOSITORY}
    if against:
        found[against] = folder / "other"
        command = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run(
            [*command, "add", "--detach", str(found[against]), against],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield found
    finally:
        if against:
            subprocess.run([*command, "remove", "--force", str(found[against])], check=True)


def write_dataset(folder: Path, checkout: Path, rows: int) -> None:
    """Write a table of so many rows, and two small ones, in a checkout's own format."""
    command = [sys.executable, "-c", DATASET, str(folder), str(rows)]
    # Not from here: the folder a command runs in comes before PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, cwd=checkout, env=environment)


def measure(
    method: str, commit: str, checkout: Path, folder: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run a method's stages on a checkout; a line for each of its hand-overs."""
    import yaml

    place = folder / f"{method}-{commit}"
    place.mkdir()
    (place / "config.yaml").write_text(
        yaml.safe_dump(config_of(method, folder / f"data-{commit}", args))
    )
    launch = [sys.executable]
    if args.ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
    (place / "child.py").write_text(CHILD)
    more = "more" if commit == "here" and args.more else ""
    command = [*launch, "child.py", "config.yaml", "runs", "found", more]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        failure = f"{method} at {commit} failed:\n{done.stderr[-3000:]}"
        if commit == "here":
            sys.exit(failure)
        print(failure, file=sys.stderr, flush=True)
        return []
    ranks = [json.loads(file.read_text()) for file in sorted(place.glob("found.*"))]
    whole = args.rows * args.dim * 4
    alone = ("compact", "export", "inspect", "rewrite")
    found: dict[str, dict[str, Any]] = {}
    for each in (line for rank in ranks for line in rank):
        own = found.setdefault(each["stage"], {"seconds": 0.0, "processor": 0.0, "extra": 0})
        for key in own:
            own[key] = max(own[key], each[key])
    return [
        {
            "method": method,
            "stage": stage,
            "commit": commit,
            "rows": args.rows,
            "dim": args.dim,
            "ranks": args.ranks,
            "seconds": own["seconds"],
            "processor_seconds": own["processor"],
            "extra_bytes": own["extra"],
            "extra_memory_ratio": own["extra"] / (whole if stage in alone else whole / args.ranks),
        }
        for stage, own in found.items()
    ]


def config_of(method: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A run whose stages are one step long."""
    settings = dict(METHODS[method])
    budget = settings.pop("budget", None)
    sharding = "row_wise" if args.ranks > 1 else "table_wise"
    return {
        "name": method,
        "data": {
            "path": str(data),
            "batch_size": 1024,
            "eval_batch_size": 2000,
            "search_share": 0.01,
        },
        "tables": {"embedding_dim": args.dim, "method": settings, "budget": budget},
        "model": {"name": "fm"},
        "train": {"max_steps": 1, "device": "cpu", "sharding": sharding},
    }


if __name__ == "__main__":
    main()
