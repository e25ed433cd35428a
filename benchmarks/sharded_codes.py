"""What codes, bitmaps and pointers take on a rank, and a step with them, whole and sharded over ranks.

    python benchmarks/sharded_codes.py [--methods codes,bitmaps,pointers] [--tables 26] [--rows 200000]
        [--ranks 2] [--batch 2048] [--steps 12] [--json FILE]

Each rank is a process on this machine with one thread, connected by gloo: times show what the exchange
costs beside a step, not how fast a network is. `buffers` is what a rank's routes hold, `step` the median
of steps (forward, backward, fused Adagrad) in which every rank has `--batch` single-valued rows, in turn
with whole and with sharded buffers; `route` is the part of it until physical ids are known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from result_table import ResultTable
from torch.distributed.optim import (  # type: ignore[attr-defined]
    _apply_optimizer_in_backward,
)
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embcomp import Coded, CompressedEmbeddingBagCollection, LowDim, Sparse, shard_codes
from embcomp.layers.shardable_buffers import shardable
from embcomp.testing.sharded import SHARDERS, sharding_plan
from embcomp.testing.workers import WorkerPool

DIM = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", default="codes,bitmaps,pointers")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--rows", type=int, default=200_000, help="of each table")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2048, help="rows of a rank's batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="a file to add results to, an object a line")
    args = parser.parse_args()
    table = ResultTable(
        f"{args.tables} tables of {args.rows:,} rows x {DIM}, {args.ranks} ranks, {args.batch} rows each",
        ["method", "held", "buffers (MB)", "route (ms)", "step (ms)"],
        ["method", "held"],
    )
    with WorkerPool(size=args.ranks) as pool:
        for method in args.methods.split(","):
            found = pool.run(args.ranks, measure, method, vars(args) | {"json": None})
            for held in ("whole", "sharded"):
                ranks = [each[held] for each in found]
                line = {key: max(each[key] for each in ranks) for key in ranks[0]}
                table.add(
                    method,
                    held,
                    f"{line['buffer_bytes'] / 1e6:.1f}",
                    f"{1e3 * line['route_seconds']:.1f}",
                    f"{1e3 * line['step_seconds']:.1f}",
                )
                if args.json:
                    shape = {
                        key: getattr(args, key) for key in ("tables", "rows", "ranks", "batch")
                    }
                    with args.json.open("a") as file:
                        file.write(
                            json.dumps({"method": method, "held": held, **shape, **line}) + "\n"
                        )
    table.show()


def measure(method: str, args: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """On every rank: whole and sharded, step by step in turn."""
    names = [f"t{n}" for n in range(args["tables"])]
    plan = {
        "codes": Coded(subvector_dim=2, num_codewords=256),
        "bitmaps": LowDim(kept=dict.fromkeys(names, args["rows"] // 2)),
        "pointers": Sparse(nonzeros=dict.fromkeys(names, args["rows"])),
    }[method]
    models = {held: built(names, plan, args["rows"], held) for held in ("whole", "sharded")}
    times: dict[str, list[tuple[float, float]]] = {held: [] for held in models}
    for step in range(args["steps"] + 2):
        features = batch(names, args, step)
        for held, model in models.items():
            dist.barrier()
            begun = time.perf_counter()
            with torch.no_grad():
                model.module.route(features)
            routed = time.perf_counter()
            model(features).values().sum().backward()
            ended = time.perf_counter()
            if step > 1:
                times[held].append((routed - begun, ended - routed))
    return {
        held: {
            "buffer_bytes": sum(
                buffer.nbytes for part in shardable(model) for buffer in part.buffers(recurse=False)
            ),
            "route_seconds": statistics.median(route for route, _ in times[held]),
            "step_seconds": statistics.median(step for _, step in times[held]),
        }
        for held, model in models.items()
    }


def built(names: list[str], method: Any, rows: int, held: str) -> DistributedModelParallel:
    torch.set_num_threads(1)
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
        for name in names
    ]
    tables = CompressedEmbeddingBagCollection(configs, method, device=torch.device("meta"))
    for inner in tables.inner_collections():
        _apply_optimizer_in_backward(torch.optim.Adagrad, inner.parameters(), {"lr": 0.05})
    if held == "sharded":
        shard_codes(tables, above=1)
    plan = sharding_plan(tables, "row_wise")
    return DistributedModelParallel(
        tables, device=torch.device("cpu"), plan=plan, sharders=SHARDERS
    )


def batch(names: list[str], args: Mapping[str, Any], step: int) -> KeyedJaggedTensor:
    """Ids of which few are frequent, as those of click logs are."""
    random = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    count = args["batch"]
    drawn = torch.rand(len(names) * count, generator=random)
    ids = (args["rows"] ** drawn).long().clamp_(max=args["rows"] - 1)
    lengths = torch.ones(len(ids), dtype=torch.int32)
    return KeyedJaggedTensor(keys=names, values=ids, lengths=lengths)


if __name__ == "__main__":
    main()
