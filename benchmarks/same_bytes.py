"""Do two installations prepare the same bytes, whatever their versions of polars?

    python benchmarks/same_bytes.py OTHER_PYTHON [--rows 30000]

Prepares generated logs with this interpreter and with OTHER_PYTHON, both on this checkout, and
compares every file; exit code 1 when one differs. So little memory is given that values are also
cut into hash partitions. Both need the same pyarrow, which writes its version into Parquet files;
OTHER_PYTHON needs no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent

SCHEMA = """
name: shop
label: label
numeric: [{name: price, transform: standard_log}]
categorical: [user, {name: tags, separator: "|"}]
"""

CHILD = """
import json, sys
from importlib import metadata
import polars, pyarrow
metadata.version, installed = (lambda n: "0" if n == "embcomp" else installed(n)), metadata.version
from embcomp.data_pipelines import prepare as module
module._room = lambda size: 200_000
for call in json.loads(sys.argv[1]):
    module.prepare(**call)
print("polars", polars.__version__, "pyarrow", pyarrow.__version__)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a Python interpreter with other packages")
    parser.add_argument("--rows", type=int, default=30_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, args.rows)
        found = [
            prepared(python, folder, folder / f"by-{number}")
            for number, python in enumerate((Path(sys.executable), args.other))
        ]
    differing = sorted(
        file for file in found[0] | found[1] if found[0].get(file) != found[1].get(file)
    )
    for file in differing:
        print(f"differs: {file}")
    print(f"{len(found[0])} files, {len(differing)} differ")
    return int(bool(differing))


def write_inputs(folder: Path, rows: int) -> None:
    """Write a log in Criteo's format, and a table with bags."""
    from embcomp.data_pipelines.synthetic.generate import write_criteo_log
    from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig

    write_criteo_log(folder / "train.txt", SyntheticConfig(rows=rows, scale=0.01))
    rng = np.random.default_rng(0)
    lines = ["label,price,user,tags"]
    for _ in range(rows):
        tags = "|".join(f"tag number {n}" for n in rng.zipf(1.3, int(rng.integers(0, 4))) % 999)
        lines.append(f"{rng.integers(2)},{rng.integers(900)},u{rng.zipf(1.2) % 9999},{tags}")
    (folder / "shop.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "shop.yaml").write_text(SCHEMA, encoding="utf-8")


def prepared(python: Path, folder: Path, out: Path) -> dict[str, str]:
    """Prepare with an interpreter; return SHA-256 by file."""
    criteo: dict[str, object] = {
        "source": str(folder / "train.txt"),
        "importer": "criteo",
        "min_count": 2,
    }
    table: dict[str, object] = {"source": str(folder / "shop.csv"), "importer": "table"}
    table["schema"] = str(folder / "shop.yaml")
    calls = [
        criteo | {"output": str(out / f"criteo-{numeric}"), "numeric": numeric}
        for numeric in ("standard_log", "bucket")
    ]
    calls.append(table | {"output": str(out / "shop")})
    done = subprocess.run(
        [python, "-c", CHILD, json.dumps(calls)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout.strip())
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


if __name__ == "__main__":
    sys.exit(main())
