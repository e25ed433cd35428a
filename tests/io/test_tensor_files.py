"""Finding the tensors of a file takes no memory that a process is limited in."""

from __future__ import annotations

import json
import subprocess
import sys

SIZE = 1 << 30

SCRIPT = f"""
import resource, sys
from pathlib import Path
from embcomp.io.tensor_files import tensors_of_file
tensors_of_file(Path(sys.argv[1]))  # its imports are done
resource.setrlimit(resource.RLIMIT_DATA, ({SIZE // 2}, {SIZE // 2}))
print(tensors_of_file(Path(sys.argv[2]))["rows"].nbytes)
"""


def test_a_file_larger_than_the_limit_on_memory_is_read(tmp_path):
    files = [tmp_path / "small.safetensors", tmp_path / "large.safetensors"]
    for file, size in zip(files, [4, SIZE]):
        header = {"rows": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + size)  # a file with a hole: no bytes on disk
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, files)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.split() == [str(SIZE)], ran.stderr
