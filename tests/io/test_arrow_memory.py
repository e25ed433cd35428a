"""Arrow's allocator under a limit: nothing is reserved that is not needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
for name in sys.argv[1:]:
    resource.setrlimit(getattr(resource, name), (1 << 40,) * 2)
import embcomp
import pyarrow as pa
import pyarrow.parquet as pq
sink = pa.BufferOutputStream()
pq.write_table(pa.table({"a": range(1000)}), sink)
kept = pq.read_table(pa.BufferReader(sink.getvalue()))
data = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
print(pa.default_memory_pool().backend_name, int(data.split()[1]) >> 10)
"""


@pytest.mark.parametrize("limits", [["RLIMIT_DATA"], ["RLIMIT_AS"], []])
def test_arrow_reserves_nothing_where_memory_is_limited(limits):
    words = [sys.executable, "-c", CHILD, *limits]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    if limits:
        assert said[0] == "system" and int(said[1]) < 512
    else:
        assert said[0] != "system"
