"""The process that trains one candidate: `python -m embcomp.search.evaluators.trial_process CONFIG --runs DIR`.

It is an ordinary training run, started by a worker, whose end it does not outlive; why it failed is
left in a file for the worker to read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil

from embcomp.io.atomic_files import write_atomically

PARENT = "EMBCOMP_SEARCH_WORKER"
"""Environment variable with the worker's process id and the second in which it began."""
FAILURE_FILE = "failure.json"
LATENCY_FILE = "latency.json"
MEASURED_FILE = "measured.json"
SCORES_FILE = "scores.npz"
"""The logits and labels of the test rows."""


def main() -> None:
    """Train, and leaves word of a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--scored", action="store_true")
    arguments = parser.parse_args()
    threading.Thread(target=_die_with_worker, daemon=True).start()

    from embcomp.config.train_config import load_config
    from embcomp.search.evaluators.latency import look_up_microseconds
    from embcomp.training.api import train

    config = load_config(arguments.config)
    folder = arguments.runs / config.name
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        is_trained = (folder / "report.json").exists()
        memory = None if is_trained else psutil.Process().memory_info().rss
        scores = folder / SCORES_FILE if arguments.scored else None
        train(config, runs=arguments.runs, scores=scores)
        if scores is not None and is_first and not (folder / MEASURED_FILE).exists():
            from embcomp.search.evaluators.served_measures import measure_run

            _write(folder / MEASURED_FILE, measure_run(folder, scores, idle_memory=memory))
        if arguments.latency and is_first and not (folder / LATENCY_FILE).exists():
            _write(folder / LATENCY_FILE, {"microseconds": look_up_microseconds(config)})
    except BaseException as error:
        if is_first:
            _write(arguments.runs / f"{config.name}.{FAILURE_FILE}", describe(error))
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process that trained sharded tables may abort while it shuts down


def describe(error: BaseException) -> dict[str, str]:
    """What kind of failure an error is."""
    text = str(error).strip() or type(error).__name__
    low = text.lower()
    kind = "error"
    if isinstance(error, MemoryError) or "out of memory" in low or "can't allocate memory" in low:
        kind = "out of memory"
    elif "training loss became" in low:
        kind = "diverged"
    return {"kind": kind, "message": text.split("\n")[0]}


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content))


def _die_with_worker() -> None:
    """A worker that is killed cannot take its trials along, nor torchrun its ranks: they watch."""
    worker, parent = os.environ.get(PARENT), os.getppid()
    if worker is None:
        return
    pid, created = worker.split(":")
    while _lives(int(pid), float(created)) and os.getppid() == parent:
        time.sleep(0.5)
    print("the worker that started this trial is gone; stopping", file=sys.stderr, flush=True)
    os._exit(1)


def _lives(pid: int, created: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created) <= 2
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
