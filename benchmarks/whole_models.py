"""What a whole model's scores take: an artefact, its network on full tables, and its ONNX program.

    python benchmarks/whole_models.py [--models autoint dlrm] [--batch-sizes 1 64 1024] [--json FILE]

A model on compressed tables is saved and loaded as `embcomp.load` does it, and exported as `program.onnx`,
which runs in ONNX Runtime with as many threads as torch has. Its peer is the same network around TorchRec's
EmbeddingBagCollection of full float32 tables (an `nn.EmbeddingBag` each), in plain PyTorch. All answer the
same batches, another one with every call; ids are drawn from all over the tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from result_table import ResultTable
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import BackendConfig, CompressedEmbeddingBagCollection, Hash, load
from embcomp.backends import Coded
from embcomp.models import MODELS, ModelConfig, ModelInputs
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_saving import save_model
from embcomp.serving.exported_program import Program, program_inputs
from embcomp.serving.programs.forms import FormBatch, check_form, open_form, write_form
from embcomp.tables.row_types import ROW_TYPES, RowType
from embcomp.training.distributed.quiet import quiet_libraries

DIM, NUM_DENSE = 16, 13
BATCHES = 16  # of each size, taken in turn
ROUNDS, WARM_UP = 5, 5  # in which all answer one after another; calls of each that are not counted
METHODS: dict[str, BackendConfig] = {
    "coded": Coded(subvector_dim=4, num_codewords=256),
    "hash": Hash(ratio=0.1),
}
Answer = Callable[[FormBatch], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["autoint", "dlrm"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["coded"])
    parser.add_argument("--row-type", choices=ROW_TYPES, default="int8")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--rows", type=int, default=100_000, help="ids of each table")
    parser.add_argument("--features", type=int, default=26, help="tables, of a feature each")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="one object a line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = ResultTable(
        f"scores of {args.features} features, dim {DIM}, {args.rows:,} ids a table, {NUM_DENSE} numbers, "
        f"{torch.get_num_threads()} threads, microseconds",
        ("model", "tables", "batch", "answers", "p50", "p99"),
        names=("model", "tables", "answers"),
    )
    for model in args.models:
        for method in args.methods:
            for line in measure(model, method, args):
                table.add(*(f"{x:,.0f}" if isinstance(x, float) else str(x) for x in line.values()))
                if args.json is not None:
                    with args.json.open("a") as file:
                        file.write(json.dumps({**line, "ids": args.rows}) + "\n")
    table.show()


@torch.no_grad()
def measure(
    model: str, method: str, args: argparse.Namespace
) -> list[dict[str, str | int | float]]:
    torch.manual_seed(0)
    names = [f"f{n}" for n in range(args.features)]
    with tempfile.TemporaryDirectory() as folder:
        answers = answering(
            MODELS[model](), METHODS[method], names, args.rows, args.row_type, Path(folder) / "a"
        )
        found: list[dict[str, str | int | float]] = []
        for size in args.batch_sizes:
            batches = [drawn(names, args.rows, size) for _ in range(BATCHES)]
            times = in_turn(list(answers.values()), batches, args.repeats)
            for name, own in zip(answers, times):
                p50, p99 = (1e6 * float(each) for each in np.percentile(own, (50, 99)))
                line: dict[str, str | int | float] = {"model": model, "tables": method}
                found.append({**line, "batch": size, "answers": name, "p50": p50, "p99": p99})
    return found


def answering(
    settings: ModelConfig,
    method: BackendConfig,
    names: list[str],
    rows: int,
    row_type: RowType,
    folder: Path,
) -> dict[str, Answer]:
    """Who scores a batch, by name; the program's answers are compared with the artefact's."""
    inputs = ModelInputs(tuple(names), DIM, NUM_DENSE)

    def built(tables: Callable[[list[EmbeddingBagConfig]], torch.nn.Module]) -> torch.nn.Module:
        parts = [
            tables(configs(names, rows, dim)) if used else None
            for dim, used in ((DIM, settings.uses_embeddings), (1, settings.uses_first_order))
        ]
        return settings.build(inputs, *parts).eval()

    model = built(lambda own: CompressedEmbeddingBagCollection(own, method))
    save_model(model, folder, settings=settings, inputs=inputs, row_type=row_type)
    plain = load(folder, rows="torch", mmap=True)
    write_form("onnx", plain, folder, ArtefactConfig.read(folder), bags=False)
    check_form("onnx", folder, plain, [drawn(names, rows, 7)], bags=False)
    program = Program(plain, bags=False)
    run, artefact = open_form("onnx", folder, program.record()), load(folder)
    full = built(lambda own: EmbeddingBagCollection(tables=own))
    return {
        "artefact": lambda batch: artefact(batch.dense, batch.sparse),
        "full tables, PyTorch": lambda batch: full(batch.dense, batch.sparse),
        "artefact's ONNX program": lambda batch: run(
            program_inputs(program, batch.dense, batch.sparse)
        ),
    }


def configs(names: Sequence[str], rows: int, dim: int) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name]
        )
        for name in names
    ]


def drawn(names: list[str], rows: int, size: int) -> FormBatch:
    count = len(names) * size
    sparse = KeyedJaggedTensor(
        keys=names,
        values=torch.randint(0, rows, (count,)),
        lengths=torch.ones(count, dtype=torch.int32),
        stride=size,
        length_per_key=[size] * len(names),
    )
    return FormBatch(torch.rand(size, NUM_DENSE), sparse)


def in_turn(
    answers: Sequence[Answer], batches: Sequence[FormBatch], repeats: int
) -> list[list[float]]:
    """Seconds of the calls of each: several in a row, so that no runtime's threads wait beside another's."""
    times: list[list[float]] = [[] for _ in answers]
    for _ in range(ROUNDS):
        for own, answer in zip(times, answers):
            took = []
            for n in range(WARM_UP + -(-repeats // ROUNDS)):
                call = partial(answer, batches[n % len(batches)])
                start = time.perf_counter()
                call()
                took.append(time.perf_counter() - start)
            own += took[WARM_UP:]
    return times


if __name__ == "__main__":
    with quiet_libraries():
        main()
