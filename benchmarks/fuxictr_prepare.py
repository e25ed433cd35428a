"""What FuxiCTR's preparation of a Criteo log takes, for `benchmarks/prepare.py --against`.

    PYTHON benchmarks/fuxictr_prepare.py SOURCE OUTPUT [--min-count 10]

PYTHON is an interpreter that has FuxiCTR 2.3 and what its preprocessing imports (ray[data], polars, pandas,
scikit-learn, h5py, PyYAML); nothing of embcomp is needed. Its settings are those of its Criteo_x4: numbers in
buckets by the rule of the challenge's winners, values seen at least --min-count times, the first 80 % of the
rows for training, 10 % for validation. What it wants before it begins is not
timed: three CSV files with a header, and Ray's local cluster.

Prints a line of JSON: `rows`, `seconds` of the wall clock, and the `version`. Compare as

    python benchmarks/prepare.py --rows 400000 --min-count 10 --split chronological --numeric bucket \\
        --against "PYTHON benchmarks/fuxictr_prepare.py {source} {output}"
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--min-count", type=int, default=10)
    args = parser.parse_args()
    files, rows = csv_files(args.source, args.output)
    seconds = prepared(files, args.output, args.min_count)
    print(json.dumps({"rows": rows, "seconds": seconds, "version": version("fuxictr")}))
    return 0


def csv_files(source: Path, output: Path) -> tuple[dict[str, str], int]:
    """Write a log as FuxiCTR reads it; return the files by split, and how many rows there are."""
    output.mkdir(parents=True)
    lines = source.read_bytes().replace(b"\t", b",").splitlines(keepends=True)
    head = (",".join(["label", *NUMERIC, *CATEGORICAL]) + "\n").encode()
    first, last = round(0.8 * len(lines)), round(0.9 * len(lines))
    cuts = {"train": lines[:first], "valid": lines[first:last], "test": lines[last:]}
    for split, some in cuts.items():
        (output / f"{split}.csv").write_bytes(b"".join([head, *some]))
    return {split: str(output / f"{split}.csv") for split in cuts}, len(lines)


def prepared(files: dict[str, str], output: Path, min_count: int) -> float:
    """Let FuxiCTR prepare them; return the seconds that it took."""
    logging.disable(logging.WARNING)
    # Ray waits half a minute for its own processes, which is little on a busy machine.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    import ray
    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.preprocess import build_dataset

    columns: list[dict[str, Any]] = [
        {
            "name": NUMERIC,
            "active": True,
            "dtype": "float",
            "type": "categorical",
            "preprocess": "convert_to_bucket",
            "fill_na": 0,
        },
        {
            "name": CATEGORICAL,
            "active": True,
            "dtype": "str",
            "type": "categorical",
        },
    ]
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    start = time.perf_counter()
    processor = CustomizedFeatureProcessor(
        feature_cols=columns,
        label_col={"name": "label", "dtype": "float"},
        dataset_id="criteo",
        data_root=str(output),
    )
    build_dataset(
        processor,
        train_data=files["train"],
        valid_data=files["valid"],
        test_data=files["test"],
        min_categr_count=min_count,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
