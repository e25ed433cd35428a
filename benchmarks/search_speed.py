"""Time to propose, repair and place candidates: a billion rows on eight described GPUs.

    python benchmarks/search_speed.py [--candidates 1000] [--memory 80GiB] [--budget 10%]

No data, no device and no allocation: 26 tables with Criteo's proportions, widths and hashed rows to
choose from. Each candidate is drawn by the sampler, brought into the budget, and checked against
the devices; its score is made up, so that samplers have something to learn from. Every candidate's
bytes are then counted anew from its plan, and some are placed by TorchRec's planner itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import optuna
from result_table import ResultTable

from embcomp.data_pipelines.synthetic.synthetic_rows import CRITEO_CARDINALITIES
from embcomp.planning.config_plan import TableSize
from embcomp.search.api import Prepared, directions_of, prepare_search
from embcomp.search.config.search_config import parse_search
from embcomp.search.samplers.optuna_sampler import RepairedSampler, make_encoding, make_source
from embcomp.search.space.space import Candidate

RECIPE = """
name: speed
data: {path: none, batch_size: 16384}
tables: {embedding_dim: 64, method: full}
model: {name: autoint}
"""
CHOICES = [
    {"method": "low_dim", "width": [1, 2, 4, 8, 16, 32]},
    {"method": "hash", "ratio": [0.001, 0.01, 0.05, 0.1, 0.2, 0.5], "collisionless": 0},
    "full",
]
PLACED = 5
"""Candidates whose placement is asked for again."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--samplers", default="random,nsga2,tpe")
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--memory", default="80GiB")
    parser.add_argument("--world-size", type=int, default=8)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = ResultTable(
        f"{args.rows:,} rows, {args.world_size} x {args.memory}, {args.budget}",
        (
            "sampler",
            "candidates",
            "ms each",
            "p99 ms",
            "CPU ms each",
            "feasible",
            "used",
            "planner asked",
        ),
        names=("sampler",),
    )
    for sampler in args.samplers.split(","):
        table.add(*run(args, sampler))
    table.show()


def run(args: argparse.Namespace, sampler_name: str) -> list[str]:
    prepared = prepare(args, sampler_name)
    repair, config = prepared.repair, prepared.config
    encoding = make_encoding(config, repair)
    sampler = RepairedSampler(
        make_source(config, repair, encoding),
        encoding,
        repair,
        fill=config.fills,
        quality_sign=1,
        seed=config.seed,
    )
    study = optuna.create_study(directions=directions_of(config), sampler=sampler)
    seconds, candidates = [], []
    processor = 0.0
    for _ in range(args.candidates):
        begun, processor_begun = time.perf_counter(), time.process_time()
        trial = study.ask(fixed_distributions=encoding.distributions)
        candidate = encoding.decode(trial.params)
        fits = repair.devices.fits(candidate)
        seconds.append(time.perf_counter() - begun)
        processor += time.process_time() - processor_begun
        assert fits
        candidates.append(candidate)
        study.tell(trial, score(prepared, candidate))
    asked = repair.devices.asked
    sizes = [prepared.space.plan(c).footprint.serve_bytes for c in candidates]
    placed = [repair.devices.place(c) for c in candidates[:: max(1, len(candidates) // PLACED)]]
    feasible = sum(size <= repair.budget for size in sizes)
    assert len(placed) >= 1
    return [
        sampler_name,
        f"{len(candidates):,}",
        f"{1e3 * statistics.mean(seconds):.1f}",
        f"{1e3 * sorted(seconds)[int(0.99 * len(seconds))]:.1f}",
        f"{1e3 * processor / len(seconds):.1f}",
        f"{feasible / len(sizes):.0%}",
        f"{min(sizes) / repair.budget:.2%} or more",
        f"{asked:,}",
    ]


def prepare(args: argparse.Namespace, sampler: str) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE)
        config = parse_search(
            {
                "name": "speed",
                "recipe": str(recipe),
                "budget": args.budget,
                "groups": [{"choices": CHOICES}],
                "sampler": {"name": sampler},
                "topology": {"world_size": args.world_size, "device_memory": args.memory},
            }
        )
        scale = args.rows / sum(CRITEO_CARDINALITIES)
        sizes = [
            TableSize(name=f"C{i + 1}", num_embeddings=max(3, int(rows * scale)))
            for i, rows in enumerate(CRITEO_CARDINALITIES)
        ]
        return prepare_search(config, sizes)


def score(prepared: Prepared, candidate: Candidate) -> float:
    """A made-up metric: each table gains by the logarithm of its share."""
    return sum(
        (1 + u % 5) * math.log(unit.options[place].bytes / unit.full_bytes)
        for u, (unit, place) in enumerate(zip(prepared.space.units, candidate))
    )


if __name__ == "__main__":
    main()
