"""Kills exports again and again, and compares the end with that of one that was left alone.

    python benchmarks/export_kills.py [--kills 20] [--format safetensors]

A toy run is trained and exported in several files. Exports of it to one place are killed by signal 9 at
moments drawn from a seed: before anything is written, while files are written and while they are compared.
At the end the artefact must be that of the export that was left alone, to the byte; no killed export may
have left a part of it under its name, and nothing may be left beside it. Each export is a process that is
forked from one that has loaded the libraries and computed nothing.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from result_table import ResultTable

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.serving.artefact_loading import load
from embcomp.training.api import train
from embcomp.training.export.export import Format, export_run

VALUES = (20_000, 8_000, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--format", choices=("safetensors", "pt2"), default="safetensors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        begun = kill_and_compare(Path(temporary), args.kills, args.seed, args.format)
    table = ResultTable("killed exports", ("kills", "while writing", "end", "left"), ())
    table.add(str(args.kills), str(begun), "the same", "nothing")
    table.show()


def kill_and_compare(folder: Path, kills: int, seed: int, format: Format) -> int:
    """Kill exports of a run, then let one end; returns how many had begun to write."""
    out, alone = folder / "out", folder / "alone"
    out.mkdir()
    alone.mkdir()
    started = time.monotonic()
    assert ended(in_child(train_toy, folder)) == 0
    train_seconds = time.monotonic() - started
    started = time.monotonic()
    assert ended(in_child(export, folder, alone, format)) == 0
    seconds = time.monotonic() - started
    print(f"trained in {train_seconds:.1f} s, exported in {seconds:.1f} s", file=sys.stderr)
    draw, done, begun = random.Random(seed), 0, 0
    while done < kills:
        wrote = kill_once(folder, out, format, draw, seconds)
        if wrote is None:  # it had ended before
            remove(out / "artefact")
            continue
        done, begun = done + 1, begun + wrote
        assert not (out / "artefact").exists(), "a killed export has left something"
        assert all(is_unfinished(entry) for entry in out.iterdir()), list(out.iterdir())
    assert ended(in_child(export, folder, out, format)) == 0
    assert contents(out) == contents(alone), "another end than that of the export left alone"
    assert ended(in_child(check, out)) == 0
    return begun


def train_toy(folder: Path) -> None:
    """A finished run of tables that take some MB."""
    write_toy_dataset(folder / "data", rows=(max(VALUES), 256, 256), num_values=VALUES)
    content = {
        "name": "toy",
        "data": {"path": str(folder / "data"), "batch_size": 2048, "eval_batch_size": 256},
        "tables": {"embedding_dim": 16, "method": "full"},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"epochs": 1, "device": "cpu"},
    }
    train(TrainConfig.model_validate(content), runs=folder, quiet=True)


def export(folder: Path, into: Path, format: Format) -> None:
    export_run(
        folder / "toy",
        into / "artefact",
        row_type="int8",
        formats=(format,),
        rows=512,
        max_file_size="256KiB",
    )


def check(out: Path) -> None:
    assert len(list((out / "artefact").glob("*.safetensors"))) > 1
    load(out / "artefact")


def in_child(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A function that runs in a process of its own."""
    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def kill_once(
    folder: Path, out: Path, format: Format, draw: random.Random, seconds: float
) -> bool | None:
    """Whether the killed export had begun to write; None where it ended before."""
    before = {entry.name for entry in out.iterdir()}
    process = in_child(export, folder, out, format)
    limit = time.monotonic() + draw.uniform(0, 2 * seconds)
    wait = draw.random() * draw.choice((0.01, 0.1, 0.5)) * seconds
    while time.monotonic() < limit:
        if {entry.name for entry in out.iterdir()} - before:
            time.sleep(wait)
            break
        time.sleep(0.001)
    process.kill()
    status = ended(process)
    assert status in (0, -signal.SIGKILL), "the export did not end well"
    return None if status == 0 else bool({entry.name for entry in out.iterdir()} - before)


def is_unfinished(entry: Path) -> bool:
    return entry.name.startswith(".artefact.") and entry.name.endswith(".unfinished")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; a program, which bears the time, and what describes it by name only."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    timed = {"program.pt2", "config.json"} if any(f.suffix == ".pt2" for f in files) else set()
    return {
        str(path.relative_to(folder)): b"" if path.name in timed else path.read_bytes()
        for path in files
    }


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
