"""What searchers find at a byte budget: test AUC after retraining, and what the search cost.

    python benchmarks/search_quality.py configs/movielens_deepfm_full.yaml \\
        --budgets 50%,20%,10% --seeds 3 --trials 20 [key=value ...]

Every searcher chooses one width for each table (DNIS: columns for each block of frequencies) of the
same recipe, and its best candidate by validation AUC is retrained in full on seeds that no search
used. Searches are ordinary ones of `embcomp search` under `--searches`, so a benchmark that is
stopped goes on where it was. Searchers that train candidates do so for `--search-epochs`,
supernets and DNIS as long as the recipe says. The cost is in trainings of the recipe: candidates and
supernets, retraining left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_table import ResultTable, check_folder, spread

from embcomp.config.train_config import load_config
from embcomp.errors import EmbcompError
from embcomp.io.yaml_reading import apply_override
from embcomp.search import SearchConfig, SearchResult, parse_search, search

WIDTHS = [1, 2, 4, 8, 12, 16]
SUPERNETS = {"evolution-optembed": "optembed", "evolution-matryoshka": "matryoshka"}
TRAINED = ("uniform", "greedy", "tpe", "nsga2", "random")
GRADIENT = {
    "dnis": {"method": "dnis"},
    "dnis-fresh": {"method": "dnis", "inherit": False},  # retrained from initial weights
}
SEARCHERS = (*TRAINED, *SUPERNETS, *GRADIENT)


@dataclass(frozen=True)
class Row:
    """A searcher at a budget."""

    searcher: str
    budget: str
    result: SearchResult

    def test(self, metric: str) -> list[float]:
        return self.result.points[0].metrics(metric, "test")

    @property
    def trainings(self) -> float:
        return self.result.cost.full_trainings + self.result.cost.prepared_trainings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a training YAML")
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe")
    parser.add_argument("--searchers", default=",".join(SEARCHERS))
    parser.add_argument("--budgets", default="50%,20%,10%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20, help="candidates that are trained")
    parser.add_argument("--scores", type=int, default=200, help="candidates of a supernet")
    parser.add_argument("--search-epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of a training; by default all cores")
    parser.add_argument("--searches", type=Path, default=Path("searches/quality"))
    parser.add_argument("--markdown", type=Path, help="a file to write the table to as well")
    args = parser.parse_intermixed_args()
    if unknown := set(args.searchers.split(",")) - set(SEARCHERS):
        parser.error(
            f"--searchers: no {', '.join(sorted(unknown))}; there are {', '.join(SEARCHERS)}"
        )
    check_folder(args.markdown)
    rows = []
    for budget in args.budgets.split(","):
        for searcher in args.searchers.split(","):
            try:
                result = search(search_of(args, searcher, budget), folder=args.searches, quiet=True)
            except EmbcompError as error:
                print(f"{searcher} at {budget}: {error}", flush=True)
                continue
            rows.append(Row(searcher, budget, result))
            print(f"{searcher} at {budget}: test AUC {spread(rows[-1].test('auc'))}", flush=True)
    report(args, rows)


def search_of(args: argparse.Namespace, searcher: str, budget: str) -> SearchConfig:
    """The search of one searcher at one budget."""
    load_config(args.recipe, args.overrides)  # its errors, before the first search
    overrides: dict[str, Any] = {}
    for override in args.overrides:
        apply_override(overrides, override)
    document: dict[str, Any] = {
        "name": f"{args.recipe.stem}_{searcher}_{budget.rstrip('%')}",
        "recipe": str(args.recipe),
        "overrides": overrides,
        "budget": budget,
        "groups": [{"choices": [{"method": "low_dim", "width": WIDTHS}]}],
        "sampler": {"name": searcher},
        "trials": {"count": args.trials, "threads": args.threads},
        "fidelity": {"epochs": args.search_epochs},
        "finals": {"points": 1, "seeds": args.seeds, "baseline": False},
    }
    if searcher in SUPERNETS:
        document["evaluator"] = {"name": "supernet", "method": SUPERNETS[searcher]}
        document["sampler"] = {"name": "evolution"}
        document["trials"]["count"] = args.scores
        document["fidelity"] = {}
    elif searcher in GRADIENT:
        document["groups"] = [{"choices": [GRADIENT[searcher]]}]
        document["sampler"] = {"name": "gradient"}
        document["fidelity"] = {}
    return parse_search(document)


def report(args: argparse.Namespace, rows: list[Row]) -> None:
    table = ResultTable(
        f"{args.recipe.stem}, {args.seeds} seed(s): test split",
        ("budget", "searcher", "bytes", "AUC", "log loss", "candidates", "trainings"),
        names=("budget", "searcher"),
    )
    for row in rows:
        point, cost = row.result.points[0], row.result.cost
        table.add(
            row.budget,
            row.searcher,
            f"{point.serve_bytes:,}",
            spread(row.test("auc")),
            spread(row.test("log_loss")),
            str(cost.trainings),
            f"{row.trainings:.1f}",
        )
    table.show(args.markdown)


if __name__ == "__main__":
    try:
        main()
    except EmbcompError as error:
        raise SystemExit(f"error: {error}") from None
