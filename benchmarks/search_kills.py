"""Kills a search again and again, and compares its end with that of one that was left alone.

    python benchmarks/search_kills.py [--kills 20] [--candidates 10] [--storage sqlite]

The search trains candidates on a toy dataset and retrains the best. Its process is killed by signal 9
at moments drawn from a seed: after so many more lines of its study, or so many seconds. At the end its
candidates, scores, recipes and retrained metrics must be those of the search that was left alone, no
finished candidate may have been trained again, and no file or process may be left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import psutil
import yaml
from optuna.trial import TrialState
from result_table import ResultTable

from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.search.attempts import latest_attempts
from embcomp.search.trials.storage import open_storage

RECIPE: dict[str, Any] = {
    "name": "toy",
    "tables": {"embedding_dim": 8, "method": "full"},
    "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
    "train": {"epochs": 2, "device": "cpu", "checkpoint_every": 8},
}
SEARCH: dict[str, Any] = {
    "name": "kills",
    "budget": "30%",
    "groups": [{"choices": [{"method": "low_dim", "width": [1, 2, 4, 8]}]}],
    "fidelity": {"valid_rows": 256},
    "finals": {"points": 1, "seeds": 2},
}
GONE_WITHIN = 20.0  # seconds in which a killed search's trainings end, too


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--storage", choices=("journal", "sqlite"), default="journal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        kill_and_compare(Path(temporary), args)


def kill_and_compare(folder: Path, args: argparse.Namespace) -> None:
    """Run both searches, and print what was compared."""
    path = write_search(folder, args.candidates)
    alone, killed = folder / "alone", folder / "killed"
    start(path, alone, args.storage).wait()
    draw, kills = random.Random(args.seed), 0
    done: dict[str, Any] = {}
    for _ in range(args.kills):
        if not kill_once(path, killed, args.storage, draw):
            break
        kills += 1
        now = finished(killed, args.storage)
        assert done.items() <= now.items(), "a finished candidate was lost or trained again"
        done = now
    ended = start(path, killed, args.storage)
    assert ended.wait() == 0, "the search did not end well"
    now = finished(killed, args.storage)
    assert done.items() <= now.items(), "a finished candidate was lost or trained again"
    assert len(now) == args.candidates
    assert outcome(alone) == outcome(killed), "another end than that of the search left alone"
    left = files(killed) - files(alone)
    assert not left, f"left behind: {dict(left)}"
    table = ResultTable(
        "killed search", ("study", "kills", "candidates", "end", "left"), ("study",)
    )
    table.add(args.storage, str(kills), str(len(now)), "the same", "nothing")
    table.show()


def write_search(folder: Path, candidates: int) -> Path:
    """A toy dataset, a recipe and the search over it."""
    write_toy_dataset(folder / "toy", rows=(2048, 256, 256), num_values=(300, 60, 8))
    data = {"path": str(folder / "toy"), "batch_size": 64, "eval_batch_size": 256}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": data}))
    trials = {"count": candidates, "devices": "cpu", "threads": 1, "retries": 100}
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({**SEARCH, "recipe": str(recipe), "trials": trials}))
    return path


def url_of(folder: Path, storage: str) -> str | None:
    """Where the study lies."""
    return f"sqlite:///{folder / 'study.db'}" if storage == "sqlite" else None


def start(path: Path, folder: Path, storage: str) -> subprocess.Popen[bytes]:
    """The search's command."""
    folder.mkdir(exist_ok=True)
    url = url_of(folder, storage)
    command = [sys.executable, "-c", "from embcomp.cli import main; main()", "search", str(path)]
    command += ["--searches", str(folder), "--quiet", *([f"storage={url}"] if url else [])]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_once(path: Path, folder: Path, storage: str, draw: random.Random) -> bool:
    """Start the search and kills it; False when it ended before."""
    process = start(path, folder, storage)
    own = psutil.Process(process.pid)
    begun, grown = time.monotonic(), size_of(folder, storage)
    steps, seconds = draw.randint(0, 12), draw.uniform(4, 30)
    while size_of(folder, storage) - grown < steps or steps == 0:
        if process.poll() is not None:
            return False
        if time.monotonic() - begun > seconds:
            break
        time.sleep(0.01)
    time.sleep(draw.choice((0.0, 0.0, draw.random())))
    children = own.children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, living = psutil.wait_procs(children, timeout=GONE_WITHIN)
    assert not living, f"trainings that outlive their search: {living}"
    return True


def size_of(folder: Path, storage: str) -> int:
    """How far a study has come, in any unit that grows with every change."""
    if storage == "sqlite":
        path = folder / "study.db"
        return path.stat().st_mtime_ns // 10**6 % 10**9 if path.exists() else 0
    journal = folder / SEARCH["name"] / "study.journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def finished(folder: Path, storage: str) -> dict[str, Any]:
    """When each candidate was scored, and with what; a candidate is its options."""
    home = folder / SEARCH["name"]
    if not (home / "study.journal").exists() and not (folder / "study.db").exists():
        return {}
    opened = open_storage(url_of(folder, storage), home)
    names = optuna.study.get_all_study_names(opened)
    if SEARCH["name"] not in names:
        return {}
    study = optuna.load_study(study_name=SEARCH["name"], storage=opened)
    complete = [one for one in study.trials if one.state is TrialState.COMPLETE]
    found = {
        json.dumps(one.user_attrs["options"]): (one.datetime_complete, one.values)
        for one in latest_attempts(study)
        if one.state is TrialState.COMPLETE
    }
    assert len(complete) == len(found), "a candidate was scored twice"
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """What a search found, but for times and numbers of attempts."""
    home = folder / SEARCH["name"]
    result = json.loads((home / "search_result.json").read_text())
    candidates = [
        {key: one.get(key) for key in ("state", "options", "values", "serve_bytes")}
        for one in result["candidates"]
    ]
    recipes = {
        path.name: re.sub(r"candidate \d+", "candidate", path.read_text())
        for path in (home / "points").glob("*.yaml")
    }
    metrics = sorted(
        json.dumps([report.get("valid"), report.get("test")], sort_keys=True)
        for report in map(json.loads, (p.read_text() for p in home.glob("finals/*/report.json")))
    )
    assert candidates and recipes and metrics
    return {"candidates": candidates, "recipes": recipes, "metrics": metrics}


def files(folder: Path) -> Counter[str]:
    """All files by name, without numbers."""
    return Counter(
        re.sub(r"\d+", "N", str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file()
    )


if __name__ == "__main__":
    main()
