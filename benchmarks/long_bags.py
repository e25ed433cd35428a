"""What one long feature beside single-valued ones costs, over TorchRec's own collections.

    python benchmarks/long_bags.py [--values 100] [--batch-size 1024] [--rows 10000] [--repeats 7]
        [--methods full 'qr mult'] [--json FILE]

26 features, one of which has `--values` ids in a sample and the others one. Our collections hold the
tables by each method, TorchRec's EmbeddingBagCollection and EmbeddingCollection hold them whole; all
step forward and backward, unsharded. Memory is the most that torch's allocator held at once for a step,
the first one after the collection was built; seconds are of CPU time, which other processes on the
machine disturb least, of later steps taken in turn with the peer's, and the ratio is the median of the
pairs'. `--json` writes one object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from result_table import ResultTable
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)

from embcomp import BackendConfig, CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from embcomp.backends import (
    LR2VQ,
    QR,
    Blocks,
    Coded,
    DNISSearch,
    Full,
    Hash,
    LowDim,
    LowRank,
    Matryoshka,
    OptEmbed,
    Unified,
)
from embcomp.io.atomic_files import write_atomically
from embcomp.training.distributed.quiet import quiet_libraries

DIM = 16
FEATURES = 26


@dataclass(frozen=True)
class Result:
    """A method's steps over TorchRec's."""

    method: str
    collection: str
    memory: int
    memory_ratio: float
    first_seconds: float
    seconds: float
    seconds_ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--values", type=int, default=100, help="ids of the long feature's bags")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each of the 26 tables")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", nargs="+", help="some of them, by name")
    parser.add_argument("--json", type=Path, help="where to write the results, one object a line")
    args = parser.parse_args()
    results = [
        result
        for name, config in methods(args.rows)
        if args.methods is None or name in args.methods
        for result in measure(name, config, args)
    ]
    if args.json is not None:
        lines = [json.dumps(vars(result)) for result in results]
        write_atomically(args.json, "".join(line + "\n" for line in lines))
    report(results, args)


def methods(rows: int) -> list[tuple[str, BackendConfig]]:
    names = [f"t{i}" for i in range(FEATURES)]
    return [
        ("full", Full()),
        ("hash", Hash(ratio=0.1)),
        ("qr mult", QR(budget="10%")),
        ("qr add", QR(budget="10%", combine="add")),
        ("qr concat", QR(budget="10%", combine="concat")),
        ("unified", Unified(budget="10%")),
        ("low_dim", LowDim(width=4)),
        ("low_rank", LowRank(latent_dim=8, from_dense=False)),
        ("low_rank with bias", LowRank(latent_dim=8, bias=True, from_dense=False)),
        ("optembed", OptEmbed()),
        ("matryoshka", Matryoshka()),
        ("dnis search", DNISSearch()),
        (
            "blocks",
            Blocks(widths=dict.fromkeys(names, (16, 4)), cuts=dict.fromkeys(names, (rows // 10,))),
        ),
        ("lr2vq", LR2VQ(subvector_dim=4, num_codewords=64, from_dense=False)),
        ("coded", Coded(subvector_dim=4, num_codewords=64)),
    ]


def measure(name: str, config: BackendConfig, args: argparse.Namespace) -> list[Result]:
    torch.manual_seed(0)
    batch = make_batch(args)
    bags = [EmbeddingBagConfig(**settings(i, args.rows)) for i in range(FEATURES)]
    singles = [EmbeddingConfig(**settings(i, args.rows)) for i in range(FEATURES)]
    pairs: list[tuple[str, nn.Module, nn.Module]] = [
        (
            "EmbeddingBagCollection",
            CompressedEmbeddingBagCollection(bags, config),
            EmbeddingBagCollection(tables=bags),
        ),
        (
            "EmbeddingCollection",
            CompressedEmbeddingCollection(singles, config),
            EmbeddingCollection(tables=singles),
        ),
    ]
    return [compare(name, *pair, batch, args.repeats) for pair in pairs]


def settings(index: int, rows: int) -> dict:
    return {
        "name": f"t{index}",
        "embedding_dim": DIM,
        "num_embeddings": rows,
        "feature_names": [f"f{index}"],
    }


def make_batch(args: argparse.Namespace) -> KeyedJaggedTensor:
    bags = [1] * (FEATURES - 1) + [args.values]
    counts = [args.batch_size * values for values in bags]
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(FEATURES)],
        values=torch.randint(0, args.rows, (sum(counts),)),
        lengths=torch.tensor(bags, dtype=torch.int32).repeat_interleave(args.batch_size),
        stride=args.batch_size,
        length_per_key=counts,
    )


def compare(
    method: str,
    collection: str,
    ours: nn.Module,
    theirs: nn.Module,
    batch: KeyedJaggedTensor,
    repeats: int,
) -> Result:
    peer, _ = first_step(theirs, batch)
    memory, first = first_step(ours, batch)
    times = [(timed(ours, batch), timed(theirs, batch)) for _ in range(repeats + 1)][1:]
    return Result(
        method=method,
        collection=collection,
        memory=memory,
        memory_ratio=round(memory / peer, 3),
        first_seconds=round(first, 4),
        seconds=round(statistics.median(mine for mine, _ in times), 4),
        seconds_ratio=round(statistics.median(mine / other for mine, other in times), 3),
    )


def first_step(collection: nn.Module, batch: KeyedJaggedTensor) -> tuple[int, float]:
    """The most bytes held at once beyond those before the step, and its seconds of CPU time."""
    seconds: list[float] = []
    memory = peak_bytes(lambda: seconds.append(timed(collection, batch)))
    return memory, seconds[0]


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator held at once for some work, FBGEMM's included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def timed(collection: nn.Module, batch: KeyedJaggedTensor) -> float:
    """Seconds of CPU time of one step."""
    start = time.process_time()
    found = collection(batch)
    parts = found.values() if isinstance(found, dict) else [found]
    sum(part.values().square().sum() for part in parts).backward()
    collection.zero_grad()
    return time.process_time() - start


def report(results: list[Result], args: argparse.Namespace) -> None:
    table = ResultTable(
        f"forward + backward, batch {args.batch_size}, one feature of {args.values} ids beside "
        f"{FEATURES - 1} of one, dim {DIM}, {args.rows:,} rows a table",
        (
            "method",
            "collection",
            "memory",
            "over TorchRec's",
            "first step",
            "step",
            "over TorchRec's ",
        ),
        names=("method", "collection"),
    )
    for result in results:
        table.add(
            result.method,
            result.collection,
            f"{result.memory / 1e6:.1f} MB",
            f"{result.memory_ratio:.2f}",
            f"{1e3 * result.first_seconds:.0f} ms",
            f"{1e3 * result.seconds:.1f} ms",
            f"{result.seconds_ratio:.2f}",
        )
    table.show()


if __name__ == "__main__":
    with quiet_libraries():
        main()
