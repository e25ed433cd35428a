#!/usr/bin/env bash
# Opening a safetensors file for torch charges the process with the whole file, read or not.
#
# safetensors 0.8.0, torch 2.13.0 (CPU), Python 3.11, Linux.
#
# `safe_open` is lazy: one opens a file of any size and reads the names, or one tensor. With framework "numpy" the
# file is mapped to be read. With "pt" it is mapped by torch as a private mapping that may be written to, which Linux
# counts as data of the process in full (VmData). Where data is limited (RLIMIT_DATA, `ulimit -d`, as batch systems and
# tests of memory set it), a file larger than the limit cannot be opened at all, even where nothing but its list
# of names is wanted: not for lack of memory, as no page of it is ever touched.
#
# Seen, a file of 1 GiB under a limit of 512 MiB:
#   numpy: opens, names ['rows'], VmData grows by less than 64 MiB
#   pt: RuntimeError, without the limit VmData grows by 1024 MiB
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps torch==2.13.0 safetensors==0.8.0
"$folder/venv/bin/pip" install --quiet filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools<82' numpy
cat > "$folder/check.py" <<'PY'
import json
import resource
import sys

import safetensors
import torch  # noqa: F401, imported before anything is limited

framework, file, limited = sys.argv[1:]
SIZE = 1 << 30


def write(path):
    header = json.dumps({"rows": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + SIZE)  # zeros that take no disk


def data_mib():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(line.split()[1]) >> 10


write(file)
if limited == "limited":
    resource.setrlimit(resource.RLIMIT_DATA, (SIZE // 2, SIZE // 2))
before = data_mib()
try:
    with safetensors.safe_open(file, framework) as opened:
        names, grown = sorted(opened.keys()), data_mib() - before
except (RuntimeError, OSError, MemoryError) as error:
    print(type(error).__name__)
else:
    print(f"opens {names} " + ("less than 64 MiB" if grown < 64 else f"{grown} MiB"))
PY
run() { "$folder/venv/bin/python" -W ignore "$folder/check.py" "$1" "$folder/large.safetensors" "$2"; }
seen="numpy limited: $(run numpy limited)
pt limited: $(run pt limited)
pt free: $(run pt free)"
echo "$seen"
expected="numpy limited: opens ['rows'] less than 64 MiB
pt limited: RuntimeError
pt free: opens ['rows'] 1024 MiB"
[ "$seen" = "$expected" ]
