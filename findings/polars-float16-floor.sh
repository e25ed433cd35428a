#!/usr/bin/env bash
# floor() of a Float16 column gives its values back unchanged.
#
# polars 2.1.0, Python 3.11.
#
# Of Float32, floor gives whole numbers. Of Float16 it gives the values as they are, without an error, so that
# `x == x.floor()`, the usual test for whole numbers, is true of 0.1; round(0) does round.
#
# Seen: Float16 [0.0999755859375, 2.5] Float32 [0.0, 2.0] round [0.0, 2.0]
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet polars==2.1.0
"$folder/venv/bin/python" - <<'PY'
import sys
import polars as pl

values = [0.1, 2.5]
half = pl.Series(values, dtype=pl.Float16)
half_floor = half.floor().cast(pl.Float32).to_list()
single_floor = pl.Series(values, dtype=pl.Float32).floor().to_list()
rounded = half.round(0).cast(pl.Float32).to_list()
print("Float16", half_floor, "Float32", single_floor, "round", rounded)
unchanged = half_floor == half.cast(pl.Float32).to_list()
sys.exit(0 if unchanged and single_floor == [0.0, 2.0] else 1)
PY
