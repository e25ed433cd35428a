"""What a change that changes nothing leaves as it is: one JSON before it, compared after it.

    python -m benchmarks.unchanged before.json
    python -m benchmarks.unchanged after.json --against before.json

Written down are a generated and prepared dataset, artefacts of every method as drawn and as trained
for some steps, runs of every recipe, the figures of `embcomp demo`, and what `ls`, `cat` and `plan`
print. Everything is compared to the bit, times and versions left out; so both runs must be made on
one machine, in one environment. `--rows 100000` shortens the demonstration; with much fewer, its budget cannot be met.
Exit code 1 names what differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from embcomp import BACKENDS, CompressedEmbeddingBagCollection, save
from embcomp.cli import app
from embcomp.models import MODELS
from tests.helpers.backends_under_test import CASES
from tests.helpers.digests import artefact_digests, bag_tables, dataset_digests, sha
from tests.helpers.training_cases import write_recipe_dataset

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("search_"))
SEARCHES = sorted(path.stem for path in CONFIGS.glob("search_*.yaml"))
SHORT = ["data.batch_size=64", "data.eval_batch_size=256", "train.epochs=1", "train.max_steps=4"]
SHORT_EVOLUTION = ["tables.method.generations=1", "tables.method.population=4"]
# Trained methods that have no recipe.
MORE_RUNS = {"low_rank": "tables.method={name: low_rank, subvector_dim: 4, latent_dim: 2}"}
TIMES = ("samples_per_second", "train_seconds", "wall_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the JSON to write")
    parser.add_argument("--against", type=Path, help="an earlier JSON to compare with")
    parser.add_argument("--rows", type=int, default=300_000, help="of the demonstration")
    args = parser.parse_args()
    before = None if args.against is None else json.loads(args.against.read_text())
    if before is not None and before["rows"] != args.rows:
        sys.exit(f"{args.against} is of --rows {before['rows']}; compare with as many")
    torch.set_num_threads(1)  # sums are then made in one order
    parts: dict[str, Callable[[Path], Any]] = {
        "catalogue": catalogue,
        "dataset": generated_dataset,
        "fresh artefacts": fresh_artefacts,
        "runs": runs,
        "demo": lambda folder: demo(folder, args.rows),
    }
    after: dict[str, Any] = {"rows": args.rows}
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            after[name] = part(Path(folder))
    args.out.write_text(json.dumps(after, indent=1) + "\n")
    if before is not None:
        differences = list(compared("", before, after))
        print("\n".join([*differences, f"{len(differences)} difference(s)"]))
        sys.exit(1 if differences else 0)


def compared(path: str, before: Any, after: Any) -> Iterator[str]:
    """One line for each value that differs, is missing or is new."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from compared(
                f"{path}/{key}", before.get(key, "nothing"), after.get(key, "nothing")
            )
    elif before != after:
        yield f"{path[1:]}:\n  - {_line(before)}\n  + {_line(after)}"


def _line(value: Any) -> str:
    return str(value).replace("\n", "\n    ")


def embcomp(*arguments: str | Path) -> str:
    """What the command prints to stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code != 0:
        sys.exit(f"embcomp {' '.join(map(str, arguments))}: {result.output}")
    return result.stdout


def catalogue(folder: Path) -> dict[str, str]:
    """What `ls`, `cat` of methods and models, `plan` of recipes and the spaces of searches print."""
    data = write_recipe_dataset(folder / "toy")
    found = {"ls": embcomp("ls", "--data", folder)}
    found |= {f"cat {name}": embcomp("cat", name) for name in sorted({*BACKENDS, *MODELS})}
    found["cat DATASET"] = embcomp("cat", data)
    for name in RECIPES:
        found[f"plan {name}"] = embcomp("plan", CONFIGS / f"{name}.yaml", f"data.path={data}")
    for name in SEARCHES:
        path = f"overrides.data.path={data}"
        found[f"search {name}"] = embcomp("search", CONFIGS / f"{name}.yaml", path, "--dry-run")
    return found


def generated_dataset(folder: Path) -> dict[str, Any]:
    """A log, and its columns and vocabularies after `prepare`."""
    raw, data = folder / "raw.txt", folder / "data"
    embcomp("generate", raw, "--rows", "5000", "--renewal", "0.2")
    embcomp("prepare", "criteo", raw, data, "--min-count", "2", "--numeric", "I5=standard_log")
    return {"log": sha(raw.read_bytes()), **dataset_digests(data, exact=True)}


def fresh_artefacts(folder: Path) -> dict[str, Any]:
    """Every conformance case as its seed draws it, saved with wide and with narrow rows."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        collection = CompressedEmbeddingBagCollection(bag_tables(), case.config).eval()
        for row_type in ("fp32", "int8"):
            path = folder / f"{name}-{row_type}"
            save(collection.compact(), path, row_type=row_type)
            found[path.name] = artefact_digests(path)
    return found


def runs(folder: Path) -> dict[str, Any]:
    """Every recipe, cut short, on a toy dataset: its report, its log and its artefact."""
    data = write_recipe_dataset(folder / "toy")
    given: dict[str, list[str | Path]] = {
        name: [CONFIGS / f"{name}.yaml", f"data.path={data}", *SHORT] for name in RECIPES
    }
    for name, method in MORE_RUNS.items():
        given[name] = [*given["criteo_autoint_full"], f"name={name}", method]
    found = {}
    for name, arguments in given.items():
        short = SHORT_EVOLUTION if "optembed" in name else []
        embcomp("train", *arguments, *short, "--runs", folder, "--quiet")
        embcomp("export", folder / name, folder / f"{name}-artefact")
        artefact = artefact_digests(folder / f"{name}-artefact")
        found[name] = {**run_figures(folder / name), "artefact": artefact}
    return found


def demo(folder: Path, rows: int) -> dict[str, Any]:
    """The demonstration's dataset and runs."""
    embcomp("demo", "--out", folder, "--rows", str(rows))
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/dataset/dataset.json")):
        found["dataset"] = dataset_digests(path.parent, exact=True)
    for path in sorted(folder.glob("*/runs/*/report.json")):
        found[path.parent.name] = run_figures(path.parent)
    return found


def run_figures(run: Path) -> dict[str, Any]:
    """A run's report without times, and a checksum of its log."""
    report = without_times(json.loads((run / "report.json").read_text()))
    return {"report": report, "metrics.jsonl": sha((run / "metrics.jsonl").read_bytes())}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
