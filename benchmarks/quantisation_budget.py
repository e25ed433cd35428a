"""What budgets buy of `pq` and `lr2vq`, against the best of the sizes that they could buy.

    python benchmarks/quantisation_budget.py [--dims 16,64,128] [--budgets 1,2,3,5,10,20,30]
        [--planted-rows 8000] [--log-rows 40000] [--methods pq,lr2vq] [--json FILE] [--markdown FILE]

Rows are planted with a flat spectrum, with one that falls as trained tables' does (`power`), or around
64 centres (`clustered`), along axes of any direction; `trained` are the longest tables of an AutoInt
after an epoch on a generated log, weighted as a run would. For every width of sub-vectors (and, with
lr2vq, of latents) the most codewords that fit are clustered by k-means, and what they lose of the
variance is measured (with lr2vq, a third of what narrow latents leave out counts, as a run regains the
rest). Printed are the sizes that the budget bought before any training (`expected`) and after it
(`measured`), and what they lose as multiples of the least. Clusterings are measured with other seeds
than those that choose.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from result_table import ResultTable, check_folder
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp.backends import LR2VQ, PQ
from embcomp.backends.codebooks.clustered import Clustered
from embcomp.backends.codebooks.clustering import id_weights
from embcomp.backends.codebooks.measured_size import Size, TrainedSample, choose_size
from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.errors import BudgetError, EmbcompError
from embcomp.io.atomic_files import write_atomically
from embcomp.layers.row_sources import MemoryRows
from embcomp.tables.specs import TableSpec, specs_from_configs
from embcomp.training import load_model, train

METHODS: dict[str, type[Clustered]] = {"pq": PQ, "lr2vq": LR2VQ}
FALLS = {"flat": 0.0, "power": 1.5}
CENTRES, NOISE = 64, 0.3
LONGEST = 2  # trained tables that are measured


@dataclass(frozen=True)
class Case:
    """A table."""

    name: str
    table: TableSpec
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a budget bought of a method for a table; errors as multiples of the least."""

    rows: str
    dim: int
    method: str
    budget: float
    best: str
    least_error: float
    expected: str
    expected_over_least: float
    used: float
    measured: str
    measured_over_least: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dims", default="16,64,128")
    parser.add_argument("--budgets", default="1,2,3,5,10,20,30", help="per cent of the full tables")
    parser.add_argument("--planted-rows", type=int, default=8_000)
    parser.add_argument("--log-rows", type=int, default=40_000, help="of the generated log")
    parser.add_argument("--methods", default="pq,lr2vq")
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    parser.add_argument("--markdown", type=Path, help="a file to write the table to as well")
    args = parser.parse_args()
    check_folder(args.markdown)
    budgets = [float(share) for share in args.budgets.split(",")]
    outcomes: list[Outcome] = []
    table = ResultTable(
        "Quantisation within budgets: errors as multiples of the least",
        ("rows", "dim", "method", "budget", "best size", "error", "expected", "", "measured", " "),
        names=("rows", "method", "best size", "expected", "measured"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args, Path(folder)):
            for method in args.methods.split(","):
                found = list(compare(case, METHODS[method], method, budgets))
                outcomes += found
                for each in found:
                    add(table, each)
                print(f"{case.name}, {case.table.embedding_dim}, {method}: measured", flush=True)
                if args.json is not None:
                    text = json.dumps([asdict(each) for each in outcomes], indent=1)
                    write_atomically(args.json, text + "\n")
    table.show(args.markdown)


def cases(args: argparse.Namespace, folder: Path) -> Iterator[Case]:
    dims = [int(dim) for dim in args.dims.split(",")]
    for dim in dims:
        for kind in (*FALLS, "clustered"):
            rows = planted(kind, args.planted_rows, dim)
            (table,) = specs_from_configs(
                [
                    EmbeddingBagConfig(
                        name=kind, num_embeddings=len(rows), embedding_dim=dim, feature_names=["f"]
                    )
                ]
            )
            yield Case(kind, table, rows, torch.ones(len(rows), dtype=torch.float64))
    raw, data = folder / "raw.txt", folder / "data"
    write_criteo_log(raw, SyntheticConfig(rows=args.log_rows, scale=0.003))
    prepare(raw, data, importer="criteo", min_count=2)
    for dim in dims:
        yield from trained(data, folder, dim)


def planted(kind: str, rows: int, dim: int) -> Tensor:
    """(rows, dim) rows whose spectrum is known."""
    if kind == "clustered":
        which = torch.randint(0, CENTRES, (rows,), generator=torch.Generator().manual_seed(4))
        return drawn(CENTRES, dim, seed=3)[which] + NOISE * drawn(rows, dim, seed=5)
    turn, _ = torch.linalg.qr(drawn(dim, dim, seed=2))
    return drawn(rows, dim, seed=1) * torch.arange(1, dim + 1) ** (-FALLS[kind] / 2) @ turn


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(data: Path, folder: Path, dim: int) -> Iterator[Case]:
    """The longest tables after an epoch."""
    config = parse_config(
        {
            "name": f"full{dim}",
            "seed": 1,
            "data": {"path": str(data), "batch_size": 512, "eval_batch_size": 8192},
            "tables": {"embedding_dim": dim, "method": "full"},
            "model": {"name": "autoint", "attention_dim": 32, "attention_layers": 2},
            "train": {
                "row_optimizer": {"name": "rowwise_adagrad", "learning_rate": 0.05},
                "dense_optimizer": {"name": "adam", "learning_rate": 0.001},
            },
        }
    )
    train(config, runs=folder / "runs", quiet=True)
    collection = load_model(folder / "runs" / config.name).get_submodule("tables")
    (state,) = collection.states()  # type: ignore[operator]
    counted = id_counts(DatasetInfo.load(data))
    counts = {name: torch.from_numpy(own) for name, own in counted.items()}
    longest = sorted(state.tables, key=lambda table: -table.num_embeddings)[:LONGEST]
    for table in longest:
        rows = state.form.rows(table.name).whole().detach()
        weights = id_weights([table], counts)[table.name].whole()
        yield Case(f"trained {table.name}", table, rows, weights)


def compare(
    case: Case, make: type[Clustered], method: str, budgets: list[float]
) -> Iterator[Outcome]:
    name = case.table.name
    sample = TrainedSample.of(
        [case.table],
        {name: MemoryRows(case.rows)},
        {name: MemoryRows(case.weights)},
        seed=make().seed,
    )
    errors: dict[tuple[int, int, int, int], float] = {}

    def error(size: Size, seed: int) -> float:
        key = (size.subvector_dim, size.num_codewords, size.latent_dim, seed)
        if key not in errors:
            layout = make(subvector_dim=size.subvector_dim).layout([case.table])
            errors[key] = sample.error(
                layout,
                latent=size.latent_dim,
                codewords=size.num_codewords,
                scaled=False,
                seed=seed,
            )
        return errors[key]

    def chosen_by(size: Size) -> float:
        return error(size, make().seed)

    for share in budgets:
        try:
            bound = make(choose="measured").fit_budget([case.table], f"{share}%")
            expected = make().fit_budget([case.table], f"{share}%")
        except BudgetError:
            continue
        sizes = bound.sizes_to_measure([case.table])
        choice = choose_size(sizes, chosen_by).best
        best = min(sizes, key=lambda size: error(size, 9))
        bought = Size(
            subvector_dim=expected.width,
            num_codewords=expected.codewords,
            latent_dim=expected.expected_latent,
            bytes=expected.serve_bytes([case.table]),
        )
        least = max(error(best, 9), 1e-12)
        yield Outcome(
            rows=case.name,
            dim=case.table.embedding_dim,
            method=method,
            budget=share,
            best=shown(best),
            least_error=least,
            expected=shown(bought),
            expected_over_least=max(error(bought, 9), 1e-12) / least,
            used=100 * bought.bytes / case.table.full_bytes,
            measured=shown(choice),
            measured_over_least=max(error(choice, 9), 1e-12) / least,
        )


def shown(size: Size) -> str:
    latent = "" if size.latent_dim == size.subvector_dim else f" of {size.latent_dim}"
    return f"{size.subvector_dim}: {size.num_codewords}{latent}"


def add(table: ResultTable, each: Outcome) -> None:
    table.add(
        each.rows,
        str(each.dim),
        each.method,
        f"{each.budget:g} %",
        each.best,
        f"{each.least_error:.4f}",
        each.expected,
        f"{each.expected_over_least:.2f}",
        each.measured,
        f"{each.measured_over_least:.2f}",
    )


if __name__ == "__main__":
    try:
        main()
    except EmbcompError as error:
        raise SystemExit(f"error: {error}") from None
