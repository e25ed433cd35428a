"""How int8 rows are best read in ONNX, and what each form of a program costs.

`rows` times four ways of reading int8 rows in onnxruntime, on one table: float32 rows, for comparison; codes and
halves gathered by themselves; `GatherBlockQuantized`; and an artefact's bytes as they lie, restored by
arithmetic. `forms` exports every method in every form, checks the answers over all ids, and times them; compiling
all of them takes minutes.

    python benchmarks/program_forms.py rows
    python benchmarks/program_forms.py forms --forms pt2,onnx --batches 1,4096
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

import numpy as np
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from embcomp import Full, Plan, load, save
from embcomp.backends import QR, Blocks, Coded, Hash, LowDim, LowRank, Sparse, Unified
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.serving.exported_program import Program, program_inputs
from embcomp.serving.programs.forms import FormBatch, check_form, open_form, write_form
from embcomp.tables.row_types import pack

METHODS = {
    "full": lambda rows: Full(),
    "hash": lambda rows: Hash(ratio=0.1),
    "low_dim": lambda rows: LowDim(width=6),
    "kept rows": lambda rows: LowDim(width=16, kept=rows // 10),
    "qr": lambda rows: QR(divisor=300),
    "unified": lambda rows: Unified(budget="10%"),
    "blocks": lambda rows: Blocks(
        widths={f"t{n}": (16, 4) for n in range(26)},
        cuts={f"t{n}": (rows // 10,) for n in range(26)},
    ),
    "coded": lambda rows: Coded(subvector_dim=4, num_codewords=256),
    "low_rank": lambda rows: LowRank(latent_dim=4),
    "sparse": lambda rows: Sparse(nonzeros={f"t{n}": rows * 2 for n in range(26)}),
}


def microseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[3:])


def row_graphs(rows: torch.Tensor) -> dict[str, Any]:
    """Graphs from (N,) ids to (N, D) float32 rows, by what they are called."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    stored = pack(rows, "int8").numpy()
    codes, head = stored[:, 4:].copy(), stored[:, :4].copy().view(np.float16)
    halves = (np.arange(256, dtype=np.uint32) << 8).astype(np.uint16)
    first, following = (own.view(np.float16).astype(np.float32) for own in (halves, halves + 1))
    finite = np.isfinite(first)
    step = np.zeros_like(first)
    step[finite] = following[finite] - first[finite]
    first[~finite] = 0
    float32, int64 = TensorProto.FLOAT, TensorProto.INT64

    def node(kind: str, *inputs: str, out: str, **attributes: Any) -> Any:
        return helper.make_node(kind, list(inputs), [out], **attributes)

    def parted(data: str, out: str, begin: int, end: int, by: int = 1) -> list[Any]:
        names = {key: f"{out}_{key}" for key in ("begin", "end", "axis", "by")}
        values = (begin, end, 1, by)
        made = [
            node("Constant", out=name, value=numpy_helper.from_array(np.array([value])))
            for name, value in zip(names.values(), values)
        ]
        return [*made, node("Slice", data, *names.values(), out=out)]

    plain = [node("Gather", "rows", "ids", out="out")]
    apart = [
        node("Gather", "codes", "ids", out="c8"),
        node("Cast", "c8", out="c", to=float32),
        node("Gather", "head", "ids", out="h16"),
        node("Cast", "h16", out="h", to=float32),
        *parted("h", "scale", 0, 1),
        *parted("h", "bias", 1, 2),
        node("Mul", "c", "scale", out="m"),
        node("Add", "m", "bias", out="out"),
    ]
    quantized = [
        node(
            "GatherBlockQuantized",
            *("codes", "ids", "scales", "zeros"),
            out="m",
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=16,
            bits=8,
        ),
        node("Gather", "biases", "ids", out="bias"),
        node("Add", "m", "bias", out="out"),
    ]
    raw = [
        node("Gather", "stored", "ids", out="bytes"),
        *parted("bytes", "front", 0, 4),
        *parted("bytes", "c8", 4, 1 << 30),
        node("Cast", "c8", out="c", to=float32),
        *parted("front", "low8", 0, 4, 2),
        *parted("front", "high8", 1, 4, 2),
        node("Cast", "low8", out="low", to=float32),
        node("Cast", "high8", out="high", to=TensorProto.INT32),
        node("Gather", "first", "high", out="f"),
        node("Gather", "step", "high", out="s"),
        node("Mul", "s", "low", out="sl"),
        node("Add", "f", "sl", out="h"),
        *parted("h", "scale", 0, 1),
        *parted("h", "bias", 1, 2),
        node("Mul", "c", "scale", out="m"),
        node("Add", "m", "bias", out="out"),
    ]
    held = {
        "rows": rows.numpy(),
        "codes": codes,
        "head": head,
        "scales": head[:, :1].astype(np.float32),
        "biases": head[:, 1:].astype(np.float32),
        "zeros": np.zeros((len(codes), 1), np.uint8),
        "stored": stored,
        "first": first,
        "step": step,
    }
    named = {
        "float32 rows": plain,
        "codes and halves": apart,
        "GatherBlockQuantized": quantized,
        "bytes as they lie": raw,
    }
    graphs = {}
    for name, nodes in named.items():
        used = {own for each in nodes for own in each.input}
        graph = helper.make_graph(
            nodes,
            "rows",
            [helper.make_tensor_value_info("ids", int64, ["n"])],
            [helper.make_tensor_value_info("out", float32, ["n", rows.shape[1]])],
            [numpy_helper.from_array(own, key) for key, own in held.items() if key in used],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        graphs[name] = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(graphs[name])
    return graphs


def time_rows(num_rows: int, dim: int, counts: list[int]) -> None:
    import onnxruntime

    torch.manual_seed(0)
    rows = torch.randn(num_rows, dim) * 0.1
    print(f"{num_rows:,} rows of {dim}, microseconds for so many look-ups")
    print(f"{'':<24}" + "".join(f"{count:>10,}" for count in counts) + "   bytes of the table")
    wanted = None
    for name, graph in row_graphs(rows).items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        content = graph.SerializeToString()
        session = onnxruntime.InferenceSession(content, options)
        line = f"{name:<24}"
        for count in counts:
            ids = {"ids": np.random.default_rng(0).integers(0, num_rows, count)}
            found = session.run(None, ids)[0]
            line += f"{microseconds(partial(session.run, None, ids)):>10,.1f}"
        if name == "codes and halves":
            wanted = found
        if wanted is not None:
            line += f"{len(content):>12,}"
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        print(line)


def time_forms(
    num_rows: int, forms: list[str], sizes: list[int], row_type: str, only: list[str]
) -> None:
    names = [f"t{n}" for n in range(26)]
    tables = [
        EmbeddingBagConfig(name=t, num_embeddings=num_rows, embedding_dim=16, feature_names=[t])
        for t in names
    ]
    print(
        f"26 features of {num_rows:,} ids, dim 16, {row_type}, {torch.get_num_threads()} thread(s)"
    )
    for method, config in METHODS.items():
        if only and method not in only:
            continue
        torch.manual_seed(0)
        plan = Plan(default=config(num_rows))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a"
            saved = save(CompressedEmbeddingBagCollection(tables, plan), path, row_type=row_type)
            plain, fast = load(path, rows="torch", mmap=True), load(path)
            batches = [single(names, num_rows, size) for size in sizes]
            times = [microseconds(partial(fast, batch.sparse)) for batch in batches]
            told = [f"{method:<10}{'load':<8}" + "".join(f"{each:>12,.1f}" for each in times)]
            for form in forms:
                start = time.perf_counter()
                write_form(form, plain, path, saved.config, bags=False)  # type: ignore[arg-type]
                took = time.perf_counter() - start
                error = check_form(form, path, plain, batches, bags=False)  # type: ignore[arg-type]
                program = Program(plain, bags=False)
                run = open_form(form, path, program.record())
                line = f"{'':<10}{form:<8}"
                for batch in batches:
                    inputs = program_inputs(program, batch.dense, batch.sparse)
                    line += f"{microseconds(partial(run, inputs)):>12,.1f}"
                told.append(f"{line}   written in {took:.0f} s, differs by {error:.1g}")
            print("\n".join(told), flush=True)


def single(names: list[str], num_rows: int, size: int) -> FormBatch:
    values = torch.randint(0, num_rows, (len(names) * size,))
    sparse = KeyedJaggedTensor(
        keys=names, values=values, lengths=torch.ones(len(values), dtype=torch.int32)
    )
    return FormBatch(torch.zeros(size, 0), sparse)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("rows", "forms"))
    parser.add_argument("--rows", type=int, default=100_000, help="rows, or ids of a table")
    parser.add_argument("--lookups", type=numbers, default=[26, 26 * 64, 26 * 4096])
    parser.add_argument("--batches", type=numbers, default=[1, 64, 4096])
    parser.add_argument("--forms", default="pt2,onnx,aoti")
    parser.add_argument("--methods", default="", help="only these, with commas between")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "rows":
        time_rows(given.rows, 16, given.lookups)
        return
    only = [name for name in given.methods.split(",") if name]
    with torch.no_grad():
        time_forms(given.rows, given.forms.split(","), given.batches, given.dtype, only)


if __name__ == "__main__":
    main()
