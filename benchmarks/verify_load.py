"""What checking every byte adds to `embcomp.load`, verify on and off side by side.

    python benchmarks/verify_load.py [--gigabytes 1] [--pairs 15] [--json FILE]

An artefact of full float32 tables, one of which holds most of the rows, is saved once and loaded in
turn with `verify=True` and `verify=False`, so that a machine that slows down slows both. The files
are in the page cache, where checking costs most beside reading; a first pair is not counted. A piece
is checked by the thread that has just read it, so processor time shows what checking costs, and wall
time what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from result_table import ResultTable
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp import CompressedEmbeddingBagCollection, Full, load, save

DIM = 16
SHARES = (0.75, 0.2, 0.04, 0.01)  # of the rows, by table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rows", choices=("auto", "fbgemm", "torch"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artefact = Path(folder) / "artefact"
        size = write(artefact, round(args.gigabytes * 1e9))
        pairs = [(timed(artefact, args.rows, True), timed(artefact, args.rows, False))]
        pairs = [
            (timed(artefact, args.rows, True), timed(artefact, args.rows, False))
            for _ in range(args.pairs)
        ]
    found = {"bytes": size, "rows": args.rows, "cores": len(os.sched_getaffinity(0))}
    for n, what in enumerate(("wall", "processor")):
        on, off = [[each[k][n] for each in pairs] for k in (0, 1)]
        found[what] = {
            "verify_on_seconds": on,
            "verify_off_seconds": off,
            "median_on": statistics.median(on),
            "median_off": statistics.median(off),
            "median_ratio": statistics.median(a / b for a, b in zip(on, off)),
            "ratio_of_fastest": min(on) / min(off),
        }
    report(found)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write(artefact: Path, size: int) -> int:
    """Save about so many bytes of rows; returns how many they are."""
    rows = size // (4 * DIM)
    configs = [
        EmbeddingBagConfig(
            name=f"t{n}",
            num_embeddings=max(1, round(rows * share)),
            embedding_dim=DIM,
            feature_names=[f"t{n}"],
        )
        for n, share in enumerate(SHARES)
    ]
    torch.manual_seed(0)
    saved = save(CompressedEmbeddingBagCollection(configs, Full()), artefact)
    assert saved.config.tables is not None
    return saved.config.tables.bytes


def timed(artefact: Path, rows: str, verify: bool) -> tuple[float, float]:
    """Seconds by the wall and of all cores."""
    wall, used = time.perf_counter(), time.process_time()
    loaded = load(artefact, rows=rows, verify=verify)  # type: ignore[arg-type]
    spent = time.perf_counter() - wall, time.process_time() - used
    del loaded
    return spent


def report(found: dict) -> None:
    table = ResultTable(
        f"loading {found['bytes']:,} bytes, rows={found['rows']}, {found['cores']} cores",
        ("seconds", "verify on", "verify off", "median ratio", "ratio of the fastest"),
        names=("seconds",),
    )
    for what in ("wall", "processor"):
        own = found[what]
        table.add(
            what,
            f"{own['median_on']:.3f}",
            f"{own['median_off']:.3f}",
            f"{own['median_ratio']:.2f}",
            f"{own['ratio_of_fastest']:.2f}",
        )
    table.show()


if __name__ == "__main__":
    main()
