"""What `embcomp compress` takes of a table that no process holds: memory, time by step, going on after a kill.

    python benchmarks/compress.py [--size 4GiB] [--dim 64] [--cases pq,int8,int4] [--budget 10%]
                                  [--memory 1GiB] [--kill] [--folder DIR] [--json FILE]

A `.npy` table of float32 rows (mixtures of 4,096 centres and noise) is written block by block and compressed
by one process for each case, which may not have more private memory than `--memory` (RLIMIT_DATA: what it
asks for beyond that fails, whether it is used or not). With `--kill` it is killed (SIGKILL) when half of its
blocks are done, and the same command goes on. Beside it stand what others need on as many threads: faiss'
ProductQuantizer, where it can be imported, for the codes of `pq`; reading the file and writing what comes out,
and packing rows that are in memory, for `int8` and `int4`. Times are of the processor and, in brackets, of the
clock, which a busy machine spoils.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embcomp.tables.budget import parse_budget
from embcomp.tables.row_types import RowType, pack

BLOCK = 1 << 14  # rows
CASES: dict[str, tuple[str, RowType, str | None]] = {
    "pq": ("pq", "fp32", None),
    "int8": ("full", "int8", "100%"),
    "int4": ("full", "int4", "100%"),
}
SAMPLED = 1 << 17  # rows of the comparisons


@dataclass(frozen=True)
class Measured:
    """What one case took; times are (processor, clock) in seconds."""

    case: str
    rows: int
    dim: int
    table_bytes: int
    out_bytes: int
    error: float
    total: tuple[float, float]
    steps: dict[str, tuple[float, float]]
    peak_private_bytes: int
    limit_bytes: int
    resumed: bool
    against: dict[str, float]


def write_table(path: Path, size: int, dim: int) -> int:
    """A table of about so many bytes; its rows."""
    rows = size // (4 * dim)
    table = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    centres = np.random.default_rng(0).normal(size=(4096, dim)).astype(np.float32)
    for start in range(0, rows, BLOCK):
        random = np.random.default_rng(start + 1)
        count = min(BLOCK, rows - start)
        own = centres[random.integers(0, len(centres), count)]
        noise = random.standard_normal((count, dim), dtype=np.float32)
        table[start : start + count] = own + 0.5 * noise
    table.flush()
    return rows


def child(settings: dict[str, Any]) -> None:
    """Compress in this process, and print what each step took as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (settings["limit"], settings["limit"]))
    from embcomp.collection.table_row_types import RowTypes
    from embcomp.compressing.approximation import method_of
    from embcomp.compressing.source_compression import SourceJob, compress_source, open_job
    from embcomp.serving.artefact_loading import load
    from embcomp.serving.modules import ServingEmbeddingBagCollection

    torch.set_num_threads(settings["threads"])
    steps: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    @contextmanager
    def step(name: str, total: int) -> Iterator[Callable[[int], None]]:
        begun, clock = time.process_time(), time.perf_counter()
        yield lambda done: None
        known = steps[name]
        steps[name] = (
            known[0] + time.process_time() - begun,
            known[1] + time.perf_counter() - clock,
        )

    begun, clock = time.process_time(), time.perf_counter()
    opened = open_job(
        SourceJob(
            source=Path(settings["source"]),
            method=method_of(settings["method"])(),
            budget=settings["budget"],
            types=RowTypes.parse(settings["dtype"]),
        )
    )
    found = compress_source(opened, Path(settings["out"]), step)
    total = (time.process_time() - begun, time.perf_counter() - clock)
    serving = load(settings["out"], verify=False, mmap=True)
    assert isinstance(serving, ServingEmbeddingBagCollection)
    (method,) = serving.plan.methods.values()
    print(
        json.dumps(
            {
                "total": total,
                "steps": steps,
                "out_bytes": found.bytes,
                "error": found.tables[0].error.error,
                "resumed": found.resumed,
                "width": getattr(method, "subvector_dim", None),
                "codewords": getattr(method, "num_codewords", None),
            }
        )
    )


def run(settings: dict[str, Any], *, kill_at: int | None) -> tuple[dict[str, Any], int]:
    """What a child prints, and its peak of private memory; None and that where it was killed."""
    words = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(settings)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    kept = Path(settings["out"]).parent / f".{Path(settings['out']).name}.compressing"
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        if kill_at is not None and sum(1 for _ in kept.glob("*/*.safetensors")) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    said, _ = process.communicate()
    if kill_at is not None:
        return {}, peak
    if process.returncode:
        raise SystemExit(f"the child ended with {process.returncode}: {settings}")
    return json.loads(said.splitlines()[-1]), peak


def private_bytes(pid: int) -> int:
    """Bytes of a process in memory that no file holds."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def against(case: str, source: Path, found: dict[str, Any], threads: int) -> dict[str, float]:
    """Rows a second of others, by processor time, on the first rows of the table."""
    torch.set_num_threads(threads)
    rows = np.ascontiguousarray(np.load(source, mmap_mode="r")[:SAMPLED])
    if case != "pq":
        values, kind = torch.from_numpy(rows), CASES[case][1]
        packing = fastest(lambda: [pack(each, kind) for each in values.split(BLOCK)])
        copying = fastest(lambda: copied(source, rows.nbytes, found["out_bytes"]))
        return {"packing": len(rows) / packing, "read and written": len(rows) / copying}
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return {}
    faiss.omp_set_num_threads(threads)
    width, dim = found["width"], rows.shape[1]
    parts = -(-dim // width)
    padded = np.zeros((len(rows), parts * width), np.float32)
    padded[:, :dim] = rows
    model = faiss.ProductQuantizer(parts * width, parts, (found["codewords"] - 1).bit_length())
    model.train(padded[: 256 * found["codewords"]])
    return {"faiss": len(rows) / fastest(lambda: model.compute_codes(padded))}


def copied(source: Path, size: int, written: int) -> None:
    """Read as much of a file, and write what comes out of it."""
    part = written * size // source.stat().st_size
    with source.open("rb") as file, tempfile.TemporaryFile(dir=source.parent) as out:
        for _ in range(0, size, 4 << 20):
            file.read(4 << 20)
        out.write(bytes(part))
        out.flush()
        os.fsync(out.fileno())


def fastest(function: Callable[[], object]) -> float:
    """Processor seconds of the fastest of three."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return min(times)


def measure(case: str, args: argparse.Namespace, source: Path, rows: int) -> Measured:
    method, dtype, budget = CASES[case]
    out = source.parent / f"out-{case}"
    settings = {
        "source": str(source),
        "out": str(out),
        "method": method,
        "dtype": dtype,
        "budget": budget or args.budget,
        "threads": args.threads,
        "limit": parse_budget(args.memory, full_bytes=1),
    }
    peak = 0
    if args.kill:
        blocks = rows // max(256, (4 << 20) // (4 * args.dim))
        _, peak = run(settings, kill_at=max(1, blocks // 2))
    found, again = run(settings, kill_at=None)
    assert found["resumed"] == args.kill, "a killed command is gone on with"
    result = Measured(
        case=case,
        rows=rows,
        dim=args.dim,
        table_bytes=source.stat().st_size,
        out_bytes=found["out_bytes"],
        error=found["error"],
        total=tuple(found["total"]),
        steps={name: tuple(times) for name, times in found["steps"].items()},
        peak_private_bytes=max(peak, again),
        limit_bytes=settings["limit"],
        resumed=found["resumed"],
        against=against(case, source, found, args.threads),
    )
    shutil.rmtree(out)
    return result


def show(found: Measured) -> None:
    print(
        f"{found.case}: {found.rows:,} rows of {found.dim}, {found.table_bytes:,} bytes to "
        f"{found.out_bytes:,}, error {found.error:.4f}, private memory {found.peak_private_bytes >> 20} "
        f"MiB of {found.limit_bytes >> 20}{', gone on with after a kill' if found.resumed else ''}"
    )
    for name, (processor, clock) in [*found.steps.items(), ("all", found.total)]:
        rate = found.rows / processor if processor else float("inf")
        print(f"  {name}: {processor:.1f} s ({clock:.1f}), {rate:,.0f} rows/s")
    for name, rate in found.against.items():
        print(f"  {name}: {rate:,.0f} rows/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="4GiB")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--budget", default="10%", help="of pq")
    parser.add_argument("--memory", default="1GiB", help="that a process may ask for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the table is made; temporary by default")
    parser.add_argument("--json", type=Path, help="a file to write one object a line to")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "table.npy"
        rows = write_table(source, parse_budget(args.size, full_bytes=1), args.dim)
        for case in args.cases.split(","):
            found = measure(case, args, source, rows)
            show(found)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
