"""Runs whose tables do not fit into what a rank may have, and do fit into what four may have.

    python benchmarks/rank_limit.py [--methods pq,lr2vq,dnis,optembed] [--mib 1000] [--dim 64] [--ranks 4]
        [--handover-memory 128MiB] [--against e3f9063] [--phases] [--json FILE]

For each method the same small run is made first on tables of a thousand rows: the most private memory
(VmData, which RLIMIT_DATA bounds: what a process asks for, used or not) that one of its ranks ever has is
what a rank takes without tables. A rank of the large run then may have that, `train.handover_memory`, and
1.25 times its part of the tables with their optimizer's state. Under this limit every rank trains, hands
over, and evaluates the best weights again; then one process exports the run under the same limit and compares
the artefact with the trained model. The same limit is tried on one rank, and on as many ranks of another commit
(`--against ""` leaves it out), which both should die of it. `--phases` says what the ranks did when they
had most.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handover import AGAINST, METHODS, checkouts
from result_table import ResultTable

from embcomp.tables.budget import parse_budget

MIB = 1 << 20
AMPLE = 1 << 40  # bytes: no limit, but one
TIMEOUT = 300  # seconds for a command
SMALL = 1000  # rows of a table that counts as none
COMMANDS = ("train", "evaluate", "export")
SHARE = 1.25  # of a rank's part of the tables: what it may have of them

DATASET = """
import sys
try:
    from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
except ImportError:  # where it was once
    from embcomp.data_pipelines.toy import write_toy_dataset
folder, rows, values = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sizes = {"rows": (rows, 2048, 2048), "num_values": (values, values, 50)}
write_toy_dataset(folder, row_group_rows=1 << 15, **sizes)
"""

CHILD = """
import json, os, resource, sys
command, limit, run = sys.argv[1], int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import importlib, threading, time
from pathlib import Path

peaks, phases, ended = {}, ["start"], threading.Event()

def private():
    for line in open("/proc/self/status"):
        if line.startswith("VmData"):
            return 1024 * int(line.split()[1])

def watch():
    while not ended.wait(0.002):
        peaks[phases[-1]] = max(peaks.get(phases[-1], 0), private())

def named(module, function, phase):
    try:
        module = importlib.import_module(module)
        inner = getattr(module, function)
    except (ImportError, AttributeError):  # another commit
        return
    def outer(*args, **kwargs):
        phases.append(phase)
        try:
            return inner(*args, **kwargs)
        finally:
            phases.pop()
    setattr(module, function, outer)

threading.Thread(target=watch, daemon=True).start()
import embcomp.training.api
from embcomp.config import load_config
from embcomp.training import evaluate, train
named("embcomp.training.loop", "shard_model", "build")
named("embcomp.training.loop", "save_checkpoint", "checkpoint")
named("embcomp.training.loop", "load_start", "start")
named("embcomp.training.loop", "load_weights", "best weights")
named("embcomp.training.run", "prepare_start", "hand-over")
named("embcomp.training.run", "StageSearch", "search")
phases.append(command)
if command == "train":
    auc = train(load_config(f"{run}.yaml"), runs="runs", quiet=True).test["auc"]
elif command == "evaluate":
    auc = evaluate(f"runs/{run}", "test", quiet=True).metrics.auc
else:
    from embcomp.training.export.export import export_run
    parity = export_run(f"runs/{run}", rows=2048).parity
    auc = parity.served.auc
ended.set()
rank = os.environ.get("RANK", "0")
Path(f"{run}-{command}.{rank}").write_text(json.dumps({"peaks": peaks, "auc": auc}))
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: the most private memory of a rank, by phase, or what it died of."""

    peaks: dict[str, int]
    auc: float
    died_of: str

    @property
    def peak(self) -> int:
        """The most that a rank had."""
        return max(self.peaks.values(), default=0)


@dataclass(frozen=True)
class Case:
    """One method under its limit."""

    method: str
    ranks: int
    table_bytes: int
    overhead_bytes: int
    limit_bytes: int
    train: Ended
    evaluate: Ended
    export: Ended
    one_rank: Ended
    against: Ended | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", default="pq,lr2vq,dnis,optembed")
    parser.add_argument("--mib", type=int, default=1000, help="of the two large tables together")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--handover-memory", default="128MiB")
    parser.add_argument("--against", default=AGAINST, help="a commit; empty for none")
    parser.add_argument("--phases", action="store_true", help="print the peak of each phase")
    parser.add_argument("--json", type=Path, help="a file to add results to, an object a line")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    args = parser.parse_args()
    table = ResultTable(
        f"{args.mib} MiB of rows x {args.dim} on {args.ranks} ranks",
        ["method", "no tables", "limit", *COMMANDS, "one rank", args.against or "-"],
        ["method"],
    )
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as name,
        checkouts(args.against, Path(name)) as commits,
    ):
        for method in args.methods.split(","):
            case = measure(method, Path(name), commits, args)
            table.add(
                method,
                f"{case.overhead_bytes / MIB:.0f} MiB",
                f"{case.limit_bytes / MIB:.0f} MiB",
                *(shown(getattr(case, command)) for command in COMMANDS),
                shown(case.one_rank),
                shown(case.against),
            )
            if args.phases:
                for phase, peak in sorted(case.train.peaks.items(), key=lambda each: -each[1]):
                    print(f"{method} {phase}: {peak / MIB:.0f} MiB", flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(case)) + "\n")
    table.show()


def shown(ended: Ended | None) -> str:
    """How a command ended, in a cell."""
    if ended is None:
        return ""
    return ended.died_of or f"{ended.peak / MIB:.0f} MiB"


def measure(method: str, folder: Path, commits: dict[str, Path], args: argparse.Namespace) -> Case:
    """Run a method with and without tables, here and at the other commit."""
    values = args.mib * MIB // (2 * 4 * args.dim)
    here = commits["here"]
    for place in ("none", "many"):
        rows = SMALL if place == "none" else values
        write_dataset(folder / f"{place}-here", here, values, rows)
    small = run("train", method, "none", folder, here, AMPLE, args.ranks, args)
    assert not small.died_of, small.died_of
    state = 4 * 2 * values  # of row-wise Adagrad, a number a row
    table_bytes = args.mib * MIB + state
    limit = small.peak + parse_budget(args.handover_memory)
    limit += int(SHARE * table_bytes / args.ranks)
    ended: dict[str, Ended] = {}
    for command in COMMANDS:
        ranks = 1 if command == "export" else args.ranks
        ended[command] = run(command, method, "many", folder, here, limit, ranks, args)
    alone = run("train", method, "many", folder, here, limit, 1, args)
    other = None
    for commit, checkout in commits.items():
        if commit != "here":
            write_dataset(folder / f"many-{commit}", checkout, values, values)
            other = run("train", method, "many", folder, checkout, limit, args.ranks, args, commit)
    return Case(
        method=method,
        ranks=args.ranks,
        table_bytes=table_bytes,
        overhead_bytes=small.peak,
        limit_bytes=limit,
        one_rank=alone,
        against=other,
        **ended,
    )


def write_dataset(folder: Path, checkout: Path, rows: int, values: int) -> None:
    """Write two features of so many values, and a small one, in a checkout's own format."""
    if folder.exists():
        return
    command = [sys.executable, "-c", DATASET, str(folder), str(rows), str(values)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(checkout)})


def run(
    command: str,
    method: str,
    tables: str,
    folder: Path,
    checkout: Path,
    limit: int,
    ranks: int,
    args: argparse.Namespace,
    commit: str = "here",
) -> Ended:
    """Run a command on ranks that may have so much private memory each."""
    import yaml

    name = f"{method}-{tables}"
    # Evaluated and exported is the run that was trained on several ranks.
    place = folder / f"{name}-{commit}-{ranks if command == 'train' else args.ranks}"
    place.mkdir(exist_ok=True)
    (place / "child.py").write_text(CHILD)
    config = config_of(method, name, folder / f"{tables}-{commit}", args, commit)
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launch += ["--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    words = [*launch, "child.py", command, str(limit), name]
    error = finished(words, place, environment)
    files = sorted(place.glob(f"{name}-{command}.*"))
    if error is not None or len(files) < ranks:
        return Ended({}, 0.0, error or "died: without a word")
    found = [json.loads(file.read_text()) for file in files]
    phases = {phase for each in found for phase in each["peaks"]}
    peaks = {phase: max(each["peaks"].get(phase, 0) for each in found) for phase in phases}
    return Ended(peaks, found[0]["auc"], "")


def finished(words: list[str], place: Path, environment: dict[str, str]) -> str | None:
    """Run a command to its end; what it died of, if it did. Its ranks are ended with it."""
    process = subprocess.Popen(
        words,
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, text = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"no end in {TIMEOUT} s"
    return cause(text) if process.returncode else None


def cause(text: str) -> str:
    """What a rank died of: the first line that says so."""
    signs = ("can't allocate memory", "bad_alloc", "Cannot allocate", "MemoryError")
    if any(sign in text for sign in signs):
        return "died: no memory"
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return f"died: {lines[0][:60]}" if lines else f"died: {text[-60:]}"


def config_of(
    method: str, name: str, data: Path, args: argparse.Namespace, commit: str
) -> dict[str, Any]:
    """A run whose stages are two steps long."""
    settings = dict(METHODS[method])
    budget = settings.pop("budget", None)
    train: dict[str, Any] = {"max_steps": 2, "device": "cpu", "sharding": "row_wise"}
    if commit == "here":
        train |= {"handover_memory": args.handover_memory, "shard_codes_above": 1 << 16}
    return {
        "name": name,
        "data": {
            "path": str(data),
            "batch_size": 1024,
            "eval_batch_size": 2048,
            "search_share": 0.01,
            "shuffle_buffer": 1 << 12,
        },
        "tables": {"embedding_dim": args.dim, "method": settings, "budget": budget},
        "model": {"name": "dlrm"},
        "train": train,
    }


if __name__ == "__main__":
    main()
