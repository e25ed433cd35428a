"""What a compressed look-up costs over a bare FBGEMM kernel that reads as many rows.

    python benchmarks/lookup.py [--batch-size 8192] [--rows 100000] [--repeats 15]

Each method's collection is sharded by DistributedModelParallel on one process, as in training, and
steps forward and backward with fused SGD. Its peer is one SplitTableBatchedEmbeddingBags kernel
that is handed the physical ids ready made: the same rows, widths and bags. The two run in turn and
the ratio is the median of the pairs'; beside it that of the CPU time, which other processes on the
machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from result_table import ResultTable
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise as on_rank
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import QR, BackendConfig, CompressedEmbeddingBagCollection, Full, Hash, Unified
from embcomp.training.distributed.quiet import quiet_libraries

DIM = 16
FEATURES = 26
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Pair:
    """One step of ours and one of the bare kernel: (seconds, seconds of CPU time) each."""

    ours: tuple[float, float]
    bare: tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """What a method's steps took."""

    name: str
    rows_read: int
    pairs: list[Pair]

    def ratios(self, clock: int) -> list[float]:
        return sorted(pair.ours[clock] / pair.bare[clock] for pair in self.pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each of the 26 tables")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store.name}",
            rank=0,
            world_size=1,
        )
        rows = [measure(*method, args, device) for method in methods()]
        report(rows, args)
        dist.destroy_process_group()


def methods() -> list[tuple[str, BackendConfig]]:
    return [
        ("full", Full()),
        ("hash", Hash(ratio=0.1)),
        ("qr mult", QR(budget="10%")),
        ("qr add", QR(budget="10%", combine="add")),
        ("qr concat", QR(budget="10%", combine="concat")),
        ("unified, 1 look-up", Unified(budget="10%", num_chunks=1)),
        ("unified, 2 look-ups", Unified(budget="10%", num_chunks=2)),
    ]


def measure(
    name: str, config: BackendConfig, args: argparse.Namespace, device: torch.device
) -> Measured:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=DIM, num_embeddings=args.rows, feature_names=[f"f{i}"]
        )
        for i in range(FEATURES)
    ]
    batches = [make_batch(args, device) for _ in range(4)]
    collection = CompressedEmbeddingBagCollection(tables, config)
    ours = collection_step(collection, device)
    physical = [collection.route(batch) for batch in batches]
    rows = [first if first is not None else second for first, second, _ in physical]
    peer = bare_step(collection, device)
    pairs = []
    for i in range(args.repeats + 2):
        bare = timed(peer, rows[i % 4], device)
        pairs.append(Pair(timed(ours, batches[i % 4], device), bare))
    return Measured(name, rows[0].values().numel(), pairs[2:])


def make_batch(args: argparse.Namespace, device: torch.device) -> KeyedJaggedTensor:
    size = args.batch_size
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(FEATURES)],
        values=torch.randint(0, args.rows, (FEATURES * size,), device=device),
        lengths=torch.ones(FEATURES * size, dtype=torch.int32, device=device),
        stride=size,
        length_per_key=[size] * FEATURES,
    )


def collection_step(
    collection: CompressedEmbeddingBagCollection, device: torch.device
) -> Callable[[KeyedJaggedTensor], None]:
    for inner in collection.inner_collections():
        _apply_optimizer_in_backward(torch.optim.SGD, inner.parameters(), {"lr": LEARNING_RATE})
    model = DistributedModelParallel(Holder(collection), device=device, plan=table_wise(collection))
    grad: list[torch.Tensor] = []

    def step(batch: KeyedJaggedTensor) -> None:
        values = model(batch)
        if not grad:
            grad.append(torch.randn_like(values))
        values.backward(grad[0])

    return step


def table_wise(collection: CompressedEmbeddingBagCollection) -> ShardingPlan:
    """Every table on the one rank, in the fused kernel."""
    names = {"rows": collection.rows, "unpooled_rows": collection.unpooled_rows}
    return ShardingPlan(
        {
            f"collection.{name}": construct_module_sharding_plan(
                inner,
                {table: on_rank(rank=0) for table in inner.embedding_bags},
                sharder=EmbeddingBagCollectionSharder(),
                local_size=1,
                world_size=1,
                device_type=collection.device.type,
            )
            for name, inner in names.items()
            if inner is not None
        }
    )


class Holder(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.collection(features).values()


def bare_step(
    collection: CompressedEmbeddingBagCollection, device: torch.device
) -> Callable[[KeyedJaggedTensor], None]:
    tables = [table.config() for table in collection.physical_tables]
    on_cuda = device.type == "cuda"
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[
            (
                table.num_embeddings,
                table.embedding_dim,
                EmbeddingLocation.DEVICE if on_cuda else EmbeddingLocation.HOST,
                ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU,
            )
            for table in tables
        ],
        feature_table_map=[n for n, t in enumerate(tables) for _ in t.feature_names],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=LEARNING_RATE,
    )
    kernel.init_embedding_weights_uniform(-0.05, 0.05)
    grad: list[torch.Tensor] = []

    def step(rows: KeyedJaggedTensor) -> None:
        values = kernel(rows.values(), rows.offsets())
        if not grad:
            grad.append(torch.randn_like(values))
        values.backward(grad[0])

    return step


def timed(
    step: Callable[[KeyedJaggedTensor], None], batch: KeyedJaggedTensor, device: torch.device
) -> tuple[float, float]:
    """Seconds of one step: of the clock, and of this process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, worked = time.perf_counter(), time.process_time()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - worked


def report(rows: list[Measured], args: argparse.Namespace) -> None:
    table = ResultTable(
        f"forward + backward, batch {args.batch_size}, {FEATURES} features, dim {DIM}, "
        f"{args.rows:,} rows a table, {torch.get_num_threads()} threads",
        (
            "method",
            "rows read",
            "ours ms",
            "bare kernel ms",
            "ratio",
            "min",
            "max",
            "CPU time ratio",
        ),
        names=("method",),
    )
    for row in rows:
        ratios = row.ratios(0)
        table.add(
            row.name,
            f"{row.rows_read:,}",
            f"{1e3 * statistics.median(pair.ours[0] for pair in row.pairs):.1f}",
            f"{1e3 * statistics.median(pair.bare[0] for pair in row.pairs):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f}",
            f"{ratios[-1]:.2f}",
            f"{statistics.median(row.ratios(1)):.2f}",
        )
    table.show()


if __name__ == "__main__":
    with quiet_libraries():
        main()
