"""What a look-up in an artefact costs over a raw gather of float32 rows.

    python benchmarks/serving.py [--batch-sizes 1 64 4096] [--row-types fp32 int8] [--rows 100000]
    python benchmarks/serving.py --rows 10000000 --features 8 --paths auto --methods hash coded

Each method's serving form is saved and loaded as `embcomp.load` does it. Its peer reads one row per
id of the same batch from one flat float32 table with `torch.nn.functional.embedding`, ids ready
made: the least that an uncompressed model can do. The two run in turn and the ratio is the median of
the pairs'. Methods that end in another method's form (a pruned `low_dim`, frequency `blocks`,
frozen codes) are measured by that form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from result_table import ResultTable
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import (
    QR,
    BackendConfig,
    CompressedEmbeddingBagCollection,
    Full,
    Hash,
    LowDim,
    Unified,
    load,
    save,
)
from embcomp.backends import BACKENDS, Blocks, Coded
from embcomp.tables.row_types import ROW_TYPES, RowType
from embcomp.training.distributed.quiet import quiet_libraries

DIM = 16
PATHS = ("auto", "fbgemm", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--row-types", nargs="+", choices=ROW_TYPES, default=["fp32", "int8"])
    parser.add_argument("--rows", type=int, default=100_000, help="ids of each table")
    parser.add_argument("--features", type=int, default=26, help="tables, of a feature each")
    parser.add_argument(
        "--paths", nargs="+", choices=PATHS, default=PATHS, help="what reads the rows"
    )
    parser.add_argument("--methods", nargs="+", help="beginnings of names; all by default")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--json", type=Path, help="one object a line: method, rows, batch, path, ratio"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    table = torch.rand(args.features * args.rows, DIM)
    lines: list[Sequence[str]] = []
    for name, config in methods(args.rows, args.features):
        if args.methods and not name.startswith(tuple(args.methods)):
            continue
        for row_type in args.row_types:
            lines += measure(name, config, row_type, table, args)
    report(lines, args)
    unlisted = sorted(
        set(BACKENDS) - {config.name for _, config in methods(args.rows, args.features)}
    )
    print(f"served in another method's form: {', '.join(unlisted) or 'none'}")


def methods(rows: int, features: int) -> list[tuple[str, BackendConfig]]:
    names = [f"t{i}" for i in range(features)]
    cuts = (rows // 100, rows // 10)
    return [
        ("full", Full()),
        ("hash, 10 %", Hash(ratio=0.1)),
        ("qr mult, 10 %", QR(budget="10%")),
        ("qr add, 10 %", QR(budget="10%", combine="add")),
        ("qr concat, 10 %", QR(budget="10%", combine="concat")),
        ("unified, 10 %", Unified(budget="10%")),
        ("low_dim, width 4", LowDim(width=4)),
        ("low_dim, 10 % kept", LowDim(kept=dict.fromkeys(names, rows // 10))),
        (
            "blocks of 16, 8, 2",
            Blocks(widths=dict.fromkeys(names, (16, 8, 2)), cuts=dict.fromkeys(names, cuts)),
        ),
        ("coded, 4 x 8 bits", Coded(subvector_dim=4, num_codewords=256)),
    ]


def measure(
    name: str,
    config: BackendConfig,
    row_type: RowType,
    table: torch.Tensor,
    args: argparse.Namespace,
) -> list[Sequence[str]]:
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=DIM, num_embeddings=args.rows, feature_names=[f"f{i}"]
        )
        for i in range(args.features)
    ]
    collection = CompressedEmbeddingBagCollection(tables, config).eval()
    found: list[Sequence[str]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "artefact"
        record = save(collection, path, row_type=row_type).config.tables
        saved = 0 if record is None else record.bytes
        paths = {name: load(path, rows=name) for name in args.paths}
        for size in args.batch_sizes:
            ids = torch.randint(0, args.rows, (args.features, size))
            batch = KeyedJaggedTensor(
                keys=[f"f{i}" for i in range(args.features)],
                values=ids.reshape(-1),
                lengths=torch.ones(args.features * size, dtype=torch.int32),
                stride=size,
                length_per_key=[size] * args.features,
            )
            flat = (ids + torch.arange(args.features).unsqueeze(1) * args.rows).t().reshape(-1)
            calls: list[Callable[[], object]] = [
                partial(loaded, batch) for loaded in paths.values()
            ]
            calls.append(partial(torch.nn.functional.embedding, flat, table))
            times = in_turn(calls, args.repeats)
            raw = 1e6 * statistics.median(row[-1] for row in times)
            ratios = [
                statistics.median(row[n] / row[-1] for row in times) for n in range(len(paths))
            ]
            cells = [f"{ratio:.2f}" for ratio in ratios]
            each = f"{1000 * raw * ratios[0] / (size * args.features):,.0f}"
            found.append([name, row_type, f"{saved:,}", str(size), *cells, f"{raw:,.0f}", each])
            if args.json is not None:
                with args.json.open("a") as file:
                    for read_by, ratio in zip(paths, ratios):
                        one = {"method": name, "rows": row_type, "ids": args.rows, "batch": size}
                        one["features"] = args.features
                        file.write(json.dumps({**one, "path": read_by, "ratio": ratio}) + "\n")
    return found


def in_turn(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each call, one row for each repeat, after three that are not counted."""
    rows = []
    for _ in range(repeats + 3):
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
        rows.append(row)
    return rows[3:]


def report(lines: Sequence[Sequence[str]], args: argparse.Namespace) -> None:
    table = ResultTable(
        f"look-up, {args.features} features, dim {DIM}, {args.rows:,} ids a table, "
        f"{torch.get_num_threads()} threads",
        ("method", "rows", "bytes", "batch", *args.paths, "raw us", "ns an id"),
        names=("method", "rows"),
    )
    for line in lines:
        table.add(*line)
    table.show()


if __name__ == "__main__":
    with quiet_libraries():
        main()
