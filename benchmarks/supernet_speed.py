"""What scoring a candidate on a supernet costs over a bare validation pass of the same model.

    python benchmarks/supernet_speed.py [--rows 100000] [--candidates 20] [--method matryoshka]
        [--model autoint] [--embedding-dim 16]

A toy log of 26 features, of which half is search-validation rows; the supernet is trained for two
steps, as weights cost the same whatever they are. The bare pass scores the model with full tables on
the same batches, which lie in memory for both. Bare passes and candidates take turns, so that
whatever else the machine does slows both; ratios are medians over the rounds. CPU time is that of this
process alone, which others disturb less. A search then goes through the same number of candidates
with everything that surrounds a score: proposing, repairing, the study's journal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_table import ResultTable

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.search.api import make_evaluator, prepare_search, search
from embcomp.search.config.search_config import SearchConfig, parse_search
from embcomp.search.evaluators.supernet_evaluator import SupernetEvaluator
from embcomp.search.evaluators.training_evaluator import make_slots
from embcomp.training.build import build_model, shard_model
from embcomp.training.data import SEARCH, evaluation_batches
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.reporting.evaluation import evaluate_batches

FEATURES, NUMERIC = 26, 13
VALUES = (10_000, 1_000, 100, 20)  # of the features, in turn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="that a candidate is scored on")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--method", default="matryoshka", choices=["matryoshka", "optembed"])
    parser.add_argument("--model", default="autoint")
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8192)
    args = parser.parse_args()
    if 2 * args.rows < max(VALUES):
        parser.error(f"--rows must be at least {max(VALUES) // 2}: each value occurs once or more")
    with tempfile.TemporaryDirectory() as name, quiet_libraries():
        folder = Path(name)
        config = write_search(args, folder)
        print_passes(args, config, folder)
        print_search(config, folder)


def write_search(args: argparse.Namespace, folder: Path) -> SearchConfig:
    write_toy_dataset(
        folder / "data",
        rows=(2 * args.rows, 2048, 2048),
        num_values=[VALUES[i % len(VALUES)] for i in range(FEATURES)],
        num_numeric=NUMERIC,
        row_group_rows=16_384,
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: speed\ndata: {{path: {folder / 'data'}, eval_batch_size: {args.batch_size}, "
        "search_share: 0.5}\n"
        f"tables: {{embedding_dim: {args.embedding_dim}, method: full}}\n"
        f"model: {{name: {args.model}}}\n"
    )
    return parse_search(
        {
            "name": "speed",
            "recipe": str(recipe),
            "budget": "25%",
            "groups": [{"choices": [{"method": "low_dim", "width": "auto"}]}],
            "evaluator": {"name": "supernet", "method": args.method},
            "sampler": {"name": "evolution"},
            "fidelity": {"max_steps": 2},
            "trials": {"count": args.candidates},
            "finals": {"points": 0},
        }
    )


def print_passes(args: argparse.Namespace, config: SearchConfig, folder: Path) -> None:
    prepared = prepare_search(config)
    home = folder / config.name
    home.mkdir()
    evaluator = make_evaluator(prepared, home, make_slots(config.trials, torch.cuda.device_count()))
    assert isinstance(evaluator, SupernetEvaluator)
    evaluator.prepare()
    bare = bare_pass(evaluator)
    places = [len(unit.options) for unit in prepared.space.units]
    bare()
    evaluator.score(tuple(0 for _ in places))
    rounds = []
    for number in range(args.candidates):
        candidate = tuple((number + u) % count for u, count in enumerate(places))
        rounds.append((timed(bare), timed(partial(evaluator.score, candidate))))
    evaluator.close()
    table = ResultTable(
        f"{args.rows:,} rows, {args.method}, {args.model}, {evaluator.fidelity}",
        ("", "bare pass", "candidate", "ratio"),
        names=(),
    )
    for kind, what in enumerate(("wall ms", "CPU ms")):
        passes = [[each[kind] for each in pair] for pair in rounds]
        medians = [statistics.median(column) for column in zip(*passes)]
        ratio = statistics.median(scored / plain for plain, scored in passes)
        table.add(what, *(f"{1e3 * each:.1f}" for each in medians), f"{ratio:.2f}")
    per_minute = 60 / statistics.median(scored[0] for _, scored in rounds)
    table.show()
    print(f"{per_minute:.0f} candidates a minute, scores alone")


def bare_pass(evaluator: SupernetEvaluator) -> Callable[[], Any]:
    """Score the recipe's model with full tables on the rows that candidates are scored on."""
    config = evaluator.supernet_config()
    document = config.model_dump(mode="json")
    document["tables"]["method"] = "full"
    document["train"]["stages"] = {}
    plain = type(config).model_validate(document)
    info = DatasetInfo.load(plain.data.path)
    process = evaluator.process
    unsharded = build_model(plain, info, torch.device("meta"))
    sharded = shard_model(unsharded, plain, process)
    batches = list(evaluation_batches(plain, info, SEARCH, process))
    return lambda: evaluate_batches(sharded, batches, process)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time."""
    begun, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - worked


def print_search(config: SearchConfig, folder: Path) -> None:
    """The whole search, whose supernet is trained already."""
    begun = time.perf_counter()
    result = search(config, folder=folder, quiet=True)
    seconds = time.perf_counter() - begun
    scored = sum(candidate.seconds for candidate in result.candidates)
    count = len(result.candidates)
    print(
        f"a search of {count} candidates: {seconds:.1f} s, {scored:.1f} s of them scores; "
        f"{60 * count / seconds:.0f} candidates a minute, loading and the page included"
    )


if __name__ == "__main__":
    main()
