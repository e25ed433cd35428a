"""What choosing codes takes: hand-overs of `pq` and `lr2vq`, nearest codewords, packing.

    python benchmarks/codes.py [--rows 1000000] [--dim 32] [--width 4] [--codewords 256]
                               [--against COMMIT] [--json FILE] [--repeats 3]

Every measurement is made in a process of its own, in turn with the same one of another commit
(`--against`) and, where faiss can be imported, with faiss' ProductQuantizer on the same vectors. Times
are those of the processor, which a busy machine spoils least, of the fastest of the repeats. `--json`
writes one object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from result_table import ResultTable

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("embcomp", "models", "data_pipelines", "search")
CASES = ("pq", "lr2vq quantize", "lr2vq codes", "nearest", "pack")
FAISS = ("nearest", "pq")  # what faiss has, too

# Runs on any commit that has the two methods; earlier ones have other names.
CHILD = """
import json, resource, sys, time
case, rows, dim, width, count, threads, faiss = json.loads(sys.argv[1])
import torch
torch.set_num_threads(threads)
random = torch.Generator().manual_seed(0)

def timed(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    seconds = {"seconds": time.process_time() - processor, "wall": time.perf_counter() - wall}
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return found, {**seconds, "more_mib": more / 1024}

def measured_faiss(values):
    import faiss
    faiss.omp_set_num_threads(threads)
    model = faiss.ProductQuantizer(dim, dim // width, (count - 1).bit_length())
    array = values.numpy()
    _, training = timed(lambda: model.train(array))
    _, coding = timed(lambda: model.compute_codes(array))
    if case == "nearest":
        return coding
    both = {name: training[name] + coding[name] for name in training}
    return {**both, "more_mib": max(training["more_mib"], coding["more_mib"])}

def forms():
    try:
        from embcomp.backends.base import MethodState, StageInputs
        from embcomp.tables.specs import TableSpec
        return MethodState, StageInputs, TableSpec
    except ImportError:
        from embcomp.backend import Form, Past
        from embcomp.tables import TableSpec
        return Form, Past, TableSpec

def start(method, stage, tables, before, StageInputs):
    begin = getattr(method, "start_stage", None) or method.begin
    past = StageInputs(before=before, initial=lambda: before, counts={}, results={}, seed=1)
    return begin(next(s for s in method.stages() if s.name == stage), tables, past)

def measured():
    from embcomp.backends import LR2VQ, PQ, Full, LowRank
    MethodState, StageInputs, TableSpec = forms()
    tables = [TableSpec(name="t", num_embeddings=rows, embedding_dim=dim, feature_names=("f",))]
    size = {"subvector_dim": width, "num_codewords": count}
    if case == "pq":
        values = torch.randn(rows, dim, generator=random)
        before = MethodState(config=Full(), tensors={"rows.t": values})
        return timed(lambda: start(PQ(**size), "codes", tables, before, StageInputs))[1]
    if case.startswith("lr2vq"):
        latent, positions = (width + 1) // 2, dim // width
        tensors = {
            "rows.t": torch.randn(rows, positions * latent, generator=random),
            "combine.projections.weight": torch.eye(width)[:latent].repeat(positions, 1, 1),
        }
        config = LowRank(latent_dim=latent, subvector_dim=width)
        before, method = MethodState(config=config, tensors=tensors), LR2VQ(**size)
        form, first = timed(lambda: start(method, "quantize", tables, before, StageInputs))
        if case.endswith("quantize"):
            return first
        return timed(lambda: form.config.compact(tables, form))[1]
    if case == "nearest":
        try:
            from embcomp.backends.codebooks.nearest import nearest
        except ImportError:
            from embcomp.kmeans import nearest
        values = torch.randn(rows, dim // width, width, generator=random)
        words = torch.randn(dim // width, count, width, generator=random)
        which = torch.arange(dim // width)
        def every_block():
            for block in values.split(1 << 15):
                nearest(block, words, which)
        return timed(every_block)[1]
    try:
        from embcomp.backends.codebooks.bit_packing import pack_bits
    except ImportError:
        from embcomp.bits import pack_bits
    codes = torch.randint(count, (rows, dim // width), generator=random)
    return timed(lambda: pack_bits(codes, (count - 1).bit_length()))[1]

found = measured_faiss(torch.randn(rows, dim, generator=random)) if faiss else measured()
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--width", type=int, default=4, help="of a sub-vector; divides --dim")
    parser.add_argument("--codewords", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--faiss-python", default=sys.executable, help="that imports faiss")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(args, case, Path(folder)) for case in args.cases]
    report(found)
    if args.json is not None:
        args.json.write_text("".join(f"{json.dumps(one)}\n" for one in found), encoding="utf-8")


def measure(args: argparse.Namespace, case: str, folder: Path) -> dict[str, Any]:
    """One case here, at the other commit and in faiss, in turn."""
    sides = {name: (python, path) for name, python, path in _sides(args, case, folder)}
    settings = [case, args.rows, args.dim, args.width, args.codewords, args.threads]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (python, path) in sides.items():
            runs[name].append(_run(python, path, [*settings, name == "faiss"]))
    best = {name: min(own, key=lambda run: run["seconds"]) for name, own in runs.items()}
    found: dict[str, Any] = {
        "case": case,
        **{name: getattr(args, name) for name in ("rows", "dim", "width", "codewords", "threads")},
        **best,
    }
    for name in best:
        if name != "here":
            found[f"times_faster_than_{name}"] = best[name]["seconds"] / best["here"]["seconds"]
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def _sides(
    args: argparse.Namespace, case: str, folder: Path
) -> Iterator[tuple[str, str, Path | None]]:
    yield "here", sys.executable, ROOT
    if args.against is not None:
        other = folder / args.against
        if not other.exists():
            archive = ["git", "-C", str(ROOT), "archive", args.against, *PARTS]
            packed = subprocess.run(archive, check=True, capture_output=True).stdout
            with tarfile.open(fileobj=BytesIO(packed)) as tar:
                tar.extractall(other, filter="data")
        yield args.against, sys.executable, other
    if case in FAISS and not subprocess.call(
        [args.faiss_python, "-c", "import faiss, torch"], stderr=subprocess.DEVNULL
    ):
        yield "faiss", args.faiss_python, None


def _run(python: str, path: Path | None, settings: list[Any]) -> dict[str, float]:
    threads = {"OMP_NUM_THREADS": str(settings[-2])}
    given = {} if path is None else {"PYTHONPATH": str(path)}
    command = [python, "-W", "ignore", "-c", CHILD, json.dumps(settings)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, cwd="/", env={**os.environ, **threads, **given}
    )
    answer: dict[str, float] = json.loads(done.stdout.decode().splitlines()[-1])
    return answer


def report(found: list[dict[str, Any]]) -> None:
    """A line for each side of each case."""
    columns = ("case", "where", "processor s", "wall s", "MiB more", "times as long as here")
    table = ResultTable("Choosing codes", columns, ("case", "where"))
    for one in found:
        for name, side in one.items():
            if isinstance(side, dict):
                ratio = side["seconds"] / one["here"]["seconds"]
                seconds = (f"{side['seconds']:.2f}", f"{side['wall']:.2f}")
                table.add(one["case"], name, *seconds, f"{side['more_mib']:.0f}", f"{ratio:.2f}")
    table.show()


if __name__ == "__main__":
    main()
