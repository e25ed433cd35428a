"""Damages everything that embcomp reads, at random, and counts what it says: nothing may pass in silence.

    PYTHONPATH=. python benchmarks/damage.py [--lines 5000] [--configs 500] [--artefacts 200] [--folders 200]

What is damaged, and what may come of it:

- lines of raw logs in six formats: a line is read, or counted as malformed, and both by itself: the same
  alone as among others; where Python's own reading is simple it is compared too;
- configs: a recipe with one value replaced is read, or refused in one line;
- artefacts: loading refuses, or the answers are those of the whole artefact;
- prepared datasets and runs: `validate`, `evaluate --verify` and resumed training refuse, or end as they
  would have.

A refusal is an error of embcomp's own in one line; anything else is a traceback and fails. Run it from
the root of a checkout, as it borrows the tests' ways to damage an artefact.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from result_table import ResultTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embcomp
from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.importers.base import RawFile
from embcomp.data_pipelines.importers.registry import make_importer
from embcomp.data_pipelines.importers.text import LineError, Parsed, TextTable
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import EmbcompError
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables
from embcomp.training import evaluate, train
from tests.helpers.artefact_damage import DAMAGES
from tests.helpers.backends_under_test import CASES
from tests.helpers.raw_logs import criteo_bytes, criteo_rows

REFUSED, SAME, SILENT, TRACE = "refused", "same", "silent", "traceback"
OUTCOMES = (REFUSED, SAME, SILENT, TRACE)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NOISE = [
    b"\t",
    b",",
    b" ",
    b":",
    b'"',
    b"\r",
    b"\x00",
    b"-",
    b".",
    b"e",
    b"0",
    b"7",
    b"\xff",
    b"\xc3",
]
NOISE += [text.encode() for text in ("\x85", "\u2028", "\ufeff", "é", "\x0b", "\x1c", "nan", "::")]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    float("nan"),
    "",
    "\x00",
    "1000%",
    [],
    {},
    [[]],
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, count in (("lines", 5000), ("configs", 500), ("artefacts", 200), ("folders", 200)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    table = ResultTable("Damaged inputs", ["what", "tried", *OUTCOMES], ["what"])
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for what, outcomes in (
            ("lines of raw logs", lines(folder, args.lines, draw)),
            ("configs", configs(args.configs, draw)),
            ("artefacts", artefacts(folder, args.artefacts, draw)),
            ("datasets", datasets(folder, args.folders // 2, draw)),
            ("runs", runs(folder, args.folders - args.folders // 2, draw)),
        ):
            table.add(what, str(sum(outcomes.values())), *(str(outcomes[o]) for o in OUTCOMES))
            failed += outcomes[SILENT] + outcomes[TRACE]
    table.show()
    sys.exit(bool(failed))


def judged(what: str, use: Callable[[], bool]) -> str:
    """What came of a damaged input.

    Args:
        what: the damage, for the report.
        use: reads the input; whether the answer is that of the whole one.
    """
    try:
        same = use()
    except EmbcompError as error:
        own = str(error).splitlines()
        if all(line.startswith("  ") for line in own[1:]):  # one line for each fault of a document
            return REFUSED
        print(f"{what}: an error of several lines: {error}")
    except Exception as error:  # noqa: BLE001  (whatever a library raises is what is looked for)
        print(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    else:
        if same:
            return SAME
        print(f"{what}: was used in silence, with another answer")
        return SILENT
    return TRACE


def lines(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """Mutated lines of every text format, in blocks and alone."""
    found: Counter[str] = Counter()
    formats = text_formats(folder)
    for number, (name, (importer, sound)) in enumerate(formats.items()):
        path = folder / f"{name}.txt"
        path.write_bytes(b"".join(line + b"\n" for line in sound))
        table = importer.open([RawFile(path=path)])
        own = count // len(formats) + (number < count % len(formats))
        for start in range(0, own, 50):
            block = [mutated(draw.choice(sound), draw) for _ in range(min(50, own - start))]
            found += judged_lines(name, table, block)
    return found


def text_formats(folder: Path) -> dict[str, tuple[Any, list[bytes]]]:
    """By name: an importer and sound lines of its format."""
    shop = {"label": "click", "numeric": ["price"], "categorical": ["user", "item"]}
    found: dict[str, tuple[Any, list[bytes]]] = {
        "criteo": (make_importer("criteo"), criteo_bytes(criteo_rows(60)).splitlines())
    }
    for kind, separator in (("csv", b","), ("tsv", b"\t")):
        schema = folder / f"{kind}.yaml"
        columns = ["click", "price", "user", "item"]
        schema.write_text(
            yaml.safe_dump({"name": "shop", "format": kind, "columns": columns} | shop)
        )
        rows = [
            [b"01"[n % 2 : n % 2 + 1], b"%d.5" % n, b"u%d" % (n % 7), b'"i, ""%d"""' % n]
            for n in range(60)
        ]
        if kind == "tsv":
            rows = [[*row[:3], b"i %d" % n] for n, row in enumerate(rows)]
        found[kind] = (make_importer("table", schema), [separator.join(row) for row in rows])
    tokens = {
        "indices": b"%d:1 %d:1 %d:1",
        "pairs": b"user:%d movie:%d tag:%d",
        "ffm": b"0:%d:1 1:%d:1 2:%d:1",
    }
    for form, text in tokens.items():
        rows_of = [b"%d " % (n % 2) + text % (n % 5, 10 + n % 7, 30 + n % 3) for n in range(60)]
        found[form] = (make_importer("libfm", form=form), rows_of)
    return found


def mutated(line: bytes, draw: random.Random) -> bytes:
    """One to three insertions, removals and replacements, never of a newline."""
    content = line
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        until = min(len(content), at + draw.choice([0, 0, 1, 1, 2, 5]))
        content = content[:at] + draw.choice([b"", *NOISE]) + content[until:]
    return content.replace(b"\n", b"")


def judged_lines(name: str, table: TextTable, block: Sequence[bytes]) -> Counter[str]:
    """A block of lines: every one read or refused, and each as it is alone."""
    alone = [one_line(table, line) for line in block]
    together = [[row] for row in rows_of_block(table, block)]
    found: Counter[str] = Counter()
    for line, mine, among in zip(block, alone, together):
        text = f"{name} line {line!r}"
        if isinstance(mine, Exception):
            found[judged(text, partial(_raised, mine))] += 1
            continue
        if isinstance(among[0], Exception):  # a line before it stopped the file
            among = [mine]
        expected = sound_fields(name, line)
        wrong = mine != among[0] or (expected is not None and expected != (mine is not None))
        if wrong:
            print(f"{text}: alone {mine}, among others {among[0]}, sound: {expected}")
        found[SILENT if wrong else REFUSED if mine is None else SAME] += 1
    return found


def _raised(error: Exception) -> bool:
    raise error


def one_line(table: TextTable, line: bytes) -> tuple | Exception | None:
    """The values of a line by itself; None where it is malformed."""
    return rows_of_block(table, [line])[0]


def rows_of_block(table: TextTable, block: Sequence[bytes]) -> list[tuple | Exception | None]:
    """The values of each line; None for those that are malformed."""
    data = b"".join(line + b"\n" for line in block)
    try:
        parsed: Parsed = table.parse(data, len(block), 0)
    except LineError as error:
        return [EmbcompError(f"line {error.offset}: {error.reason}")] * len(block)
    except Exception as error:  # noqa: BLE001  (counted as a traceback)
        return [error] * len(block)
    at = range(len(block)) if parsed.positions is None else parsed.positions.tolist()
    values = dict(zip(at, parsed.frame.select(pl.all().cast(pl.String, strict=False)).rows()))
    bad = {place for place, _ in parsed.bad}
    if bad & values.keys() or len(bad) + len(values) != len(block):
        return [ValueError("a line is neither read nor refused, or both")] * len(block)
    return [values.get(place) for place in range(len(block))]


def sound_fields(name: str, line: bytes) -> bool | None:
    """Whether a line of Criteo is sound by Python's reading; None where that does not tell."""
    if name != "criteo":
        return None
    line = line.removesuffix(b"\r")
    try:
        fields = line.decode().split("\t")
    except UnicodeDecodeError:
        return False
    if len(fields) != 40 or fields[0] not in ("0", "1"):
        return None if len(fields) == 40 else False
    numbers = [field for field in fields[1:14] if field.strip(" \t")]
    plain = [field.lstrip("-") for field in numbers]
    if all(
        p.isascii() and p.isdigit() and len(p) < 18 and len(f) - len(p) < 2
        for p, f in zip(plain, numbers)
    ):
        return True
    return None


def configs(count: int, draw: random.Random) -> Counter[str]:
    """Recipes with one value replaced by another."""
    documents = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
    trainings = [document for document in documents if "model" in document]
    whole = [parse_config(document).model_dump(mode="json") for document in trainings]
    found: Counter[str] = Counter()
    for _ in range(count):
        document = copy.deepcopy(draw.choice(whole))
        parent, key = draw.choice(places(document))
        parent[key] = draw.choice([*VALUES, [parent[key]], {"name": parent[key]}])
        text = f"config {document.get('name')} with {key}: {parent[key]!r}"
        found[judged(text, partial(_reads, document))] += 1
    return found


def _reads(document: dict[str, Any]) -> bool:
    parse_config(document)
    return True


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found: list[tuple[Any, Any]] = []
    for key, value in items:
        found.append((node, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def artefacts(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """Saved collections of every method that is served as it stands, one damage each."""
    cases = [name for name, case in CASES.items() if case.config.is_serving_form]
    batch = KeyedJaggedTensor.from_lengths_sync(
        keys=["f0", "f1", "f2"],
        values=torch.arange(180) % 60,
        lengths=torch.ones(180, dtype=torch.int64),
    )
    found: Counter[str] = Counter()
    for number in range(count):
        case = cases[number % len(cases)]
        place = folder / "artefacts" / case
        if not place.exists():
            embcomp.save(pooled(CASES[case], awkward_tables((16, 6, 3))), place)
        right = embcomp.load(place)(batch).values()
        damage = draw.choice(sorted(DAMAGES))
        copied = shutil.copytree(place, folder / "damaged")
        DAMAGES[damage](copied, draw)

        def answers_alike(copied: Path = copied, right: torch.Tensor = right) -> bool:
            return torch.equal(embcomp.load(copied)(batch).values(), right)

        found[judged(f"artefact {case}, {damage}", answers_alike)] += 1
        shutil.rmtree(copied)
    return found


def damage_a_file(folder: Path, draw: random.Random) -> str:
    """Flip a bit, cut, empty, remove, or swap with another file; what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    content = path.read_bytes()
    kind = draw.choice(["flip", "flip", "flip", "cut", "empty", "remove", "swap", "append"])
    if kind == "flip":
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "append":
        path.write_bytes(content + content[-7:])
    elif kind == "remove":
        path.unlink()
    else:
        other = draw.choice([each for each in files if each.suffix == path.suffix])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{kind} {path.relative_to(folder)}"


def datasets(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """A prepared dataset with one file damaged, validated in full."""
    source = folder / "toy"
    write_toy_dataset(source, rows=(120, 40, 40), files_per_split=2)
    found: Counter[str] = Counter()
    for _ in range(count):
        copied = shutil.copytree(source, folder / "damaged" / "toy")
        what = damage_a_file(copied, draw)
        same = all(
            (copied / path.relative_to(source)).read_bytes() == path.read_bytes()
            for path in source.rglob("*.*")
            if path.is_file() and (copied / path.relative_to(source)).exists()
        )

        def valid_alike(copied: Path = copied, same: bool = same) -> bool:
            validate_dataset(copied)
            return same

        found[judged(f"dataset, {what}", valid_alike)] += 1
        shutil.rmtree(folder / "damaged")
    return found


def runs(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """A run that stopped half way with one file damaged: evaluated or resumed."""
    data = folder / "toy"
    config = parse_config(
        {
            "name": "run",
            "data": {"path": str(data), "batch_size": 16, "eval_batch_size": 40},
            "tables": {"embedding_dim": 4, "method": "full"},
            "model": {"name": "deepfm", "hidden_units": [4], "batch_norm": False},
            "train": {"epochs": 2, "device": "cpu", "checkpoint_every": 4},
        }
    )
    train(config, runs=folder / "whole", quiet=True)
    right = scored(folder / "whole")
    (folder / "whole/run/report.json").unlink()
    found: Counter[str] = Counter()
    for number in range(count):
        copied = shutil.copytree(folder / "whole", folder / "damaged")
        what = damage_a_file(copied / "run", draw)
        resume = number % 2 == 1

        def ends_alike(copied: Path = copied, resume: bool = resume) -> bool:
            if resume:
                train(config, runs=copied, quiet=True)
            return scored(copied) == right

        found[judged(f"run, {what}, {'resumed' if resume else 'scored'}", ends_alike)] += 1
        shutil.rmtree(copied)
    return found


def scored(place: Path) -> str:
    """The test metrics of a run as text, to the last digit."""
    return json.dumps(dataclasses.asdict(evaluate(place / "run", quiet=True, verify=True).metrics))


if __name__ == "__main__":
    main()
