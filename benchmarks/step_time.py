"""What a training step costs: at several numbers of rows, or with several methods.

    python benchmarks/step_time.py [--rows 1000000 10000000 50000000] [--batch-size 8192]
        [--optimizer rowwise_adagrad] [--repeats 15]
    python benchmarks/step_time.py --rows 1000000 --methods full unified optembed
        '{name: qr, combine: add}'

The first asks whether a step costs the same whatever the number of rows, the second what the form in
which a method trains costs over full tables. AutoInt on 26 features, through the parts of `embcomp train`: sharded model, fused
row optimizer, dense Adam. The subjects take turns, so that whatever else the machine does slows all of
them; a ratio is the median over the rounds. CPU time is that of this process alone, which others
disturb less. Ids are drawn beforehand, uniformly (each look-up
misses the cache, the worst case) and by Zipf's law, as logs have them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from result_table import ResultTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends import BACKENDS
from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.schema import CategoricalFeature, DatasetInfo, NumericFeature
from embcomp.training.build import build_model, shard_model
from embcomp.training.distributed.process import Process, process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.optim.optimizers import Optimizers
from embcomp.training.optim.precision import Precision
from embcomp.training.steps import PlainSteps, Updates

FEATURES = 26
NUMERIC = 13
BATCHES = 4


@dataclass
class Subject:
    """A model of one size with one method, ready to step."""

    method: str
    rows: int
    steps: PlainSteps
    batches: dict[str, list[Batch]]

    def time_step(self, ids: str, number: int) -> tuple[float, float]:
        """Seconds of one step on a batch: of the clock, and of this process's CPU time."""
        begun, worked = time.perf_counter(), time.process_time()
        self.steps.run(iter([self.batches[ids][number % BATCHES]])).item()
        return time.perf_counter() - begun, time.process_time() - worked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = [1_000_000, 10_000_000, 50_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help="of all tables together")
    parser.add_argument("--methods", nargs="+", default=["full"], help="as tables.method")
    parser.add_argument("--budget", default="25%", help="of methods with an open size")
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--optimizer", default="rowwise_adagrad")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    with quiet_libraries(), process_group("auto") as process:
        subjects = [
            make_subject(method, rows, args, process)
            for method in args.methods
            for rows in args.rows
        ]
        table = ResultTable(
            f"forward, backward and update, batch {args.batch_size}, {args.optimizer}",
            (
                "ids",
                "method",
                "rows",
                "step",
                "ratio to the first",
                "CPU time",
                "ratio to the first",
            ),
            names=("ids", "method"),
        )
        for ids in ("uniform", "zipf"):
            times = measure(subjects, ids, args.repeats)
            for subject, rounds in zip(subjects, times):
                cells = []
                for clock in range(2):
                    pairs = [(mine[clock], first[clock]) for mine, first in zip(rounds, times[0])]
                    cells.append(f"{1e3 * statistics.median(mine for mine, _ in pairs):.1f} ms")
                    cells.append(f"{statistics.median(mine / first for mine, first in pairs):.3f}")
                table.add(ids, subject.method, f"{subject.rows:,}", *cells)
        table.show()


def measure(subjects: list[Subject], ids: str, repeats: int) -> list[list[tuple[float, float]]]:
    """Seconds of each round's step, for each subject; they take turns in changing order."""
    times: list[list[tuple[float, float]]] = [[] for _ in subjects]
    for number in range(-2, repeats):  # two rounds to warm up
        order = range(len(subjects)) if number % 2 else reversed(range(len(subjects)))
        for index in order:
            seconds = subjects[index].time_step(ids, number)
            if number >= 0:
                times[index].append(seconds)
    return times


def make_subject(method: str, rows: int, args: argparse.Namespace, process: Process) -> Subject:
    """Build and shards a model with so many rows in all."""
    info = DatasetInfo(
        name=f"rows-{rows}",
        numeric=[NumericFeature(name=f"I{i}") for i in range(NUMERIC)],
        categorical=[
            CategoricalFeature(name=f"C{i}", num_embeddings=rows // FEATURES)
            for i in range(FEATURES)
        ],
        splits={},
    )
    config = make_config(method, args.budget, args.optimizer)
    sharded = shard_model(build_model(config, info, torch.device("meta")), config, process)
    sharded.train()
    updates = Updates(Optimizers(sharded, config.train), None)
    steps = PlainSteps(sharded, updates, process, Precision(False, process.device))
    rng = np.random.default_rng(rows)
    batches = {
        ids: [draw_batch(rng, ids, rows // FEATURES, args.batch_size) for _ in range(BATCHES)]
        for ids in ("uniform", "zipf")
    }
    return Subject(config.tables.method.name, rows, steps, batches)


def make_config(method: str, budget: str, optimizer: str) -> TrainConfig:
    chosen = yaml.safe_load(method)
    name = chosen["name"] if isinstance(chosen, dict) else chosen
    is_open = isinstance(chosen, str) and bool(BACKENDS[name].size_fields)
    return parse_config(
        {
            "name": "step_time",
            "data": {"path": "generated"},
            "tables": {
                "embedding_dim": 16,
                "method": chosen,
                "budget": budget if is_open else None,
            },
            # Small, so that the tables weigh more in a step.
            "model": {
                "name": "autoint",
                "attention_dim": 32,
                "attention_layers": 2,
                "num_heads": 2,
            },
            "train": {"row_optimizer": {"name": optimizer}},
        }
    )


def draw_batch(rng: np.random.Generator, ids: str, cardinality: int, batch_size: int) -> Batch:
    """A batch of single-valued features; Zipf's exponent is 1.1."""
    size = FEATURES * batch_size
    if ids == "uniform":
        values = rng.integers(0, cardinality, size)
    else:
        values = np.minimum(rng.zipf(1.1, size) - 1, cardinality - 1)
    sparse = KeyedJaggedTensor(
        keys=[f"C{i}" for i in range(FEATURES)],
        values=torch.from_numpy(values.astype(np.int64)),
        lengths=torch.ones(size, dtype=torch.int64),
        stride=batch_size,
    )
    dense = torch.from_numpy(rng.normal(size=(batch_size, NUMERIC)).astype(np.float32))
    return Batch(dense=dense, sparse=sparse, labels=(dense[:, 0] > 0).float())


if __name__ == "__main__":
    main()
