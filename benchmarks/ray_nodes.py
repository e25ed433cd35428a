"""Seconds and bytes of `prepare` on a Ray cluster of 1, 2 and 4 nodes, beside this process alone.

    PYTHONPATH=. python benchmarks/ray_nodes.py [--rows 500000] [--nodes 1,2,4] [--json FILE] [--markdown FILE]

Nodes are processes of this machine on 127.0.0.1, with a core each as far as Ray is told; a head beside them
runs no task. So on two cores four nodes show what more tasks cost, not what more machines gain. Last, the
widest cluster prepares once more, loses a node when two parts are counted, and goes on. All must
write the same bytes; otherwise the exit code is 1. Ray must be installed; run it from the root of a
checkout, as it starts clusters by the tests' helper.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result_table import ResultTable, check_folder

from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.engine import Engine, LocalEngine
from embcomp.data_pipelines.preparing.ray_engine import RayEngine
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from tests.helpers.ray_cluster import Cluster, cluster


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--scale", type=float, default=0.05, help="of Criteo's cardinalities")
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--json", type=Path, help="a file to add results to")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    check_folder(args.markdown)
    table = ResultTable(
        f"prepare, {args.rows:,} generated rows", ["where", "seconds", "bytes", "same"], ["where"]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SyntheticConfig(rows=args.rows, scale=args.scale)
        write_criteo_log(folder / "log.txt", config)
        lines = [measured("this process", folder, LocalEngine())]
        counts = [int(count) for count in args.nodes.split(",")]
        for count in counts:
            with cluster(count) as nodes, RayEngine(nodes.address) as engine:
                lines.append(measured(f"{count} node(s)", folder, engine))
        with cluster(counts[-1]) as nodes, RayEngine(nodes.address) as engine:
            lines.append(
                measured(f"{counts[-1]} nodes, one killed", folder, engine, killing(nodes))
            )
    for line in lines:
        line["same"] = line["sha256"] == lines[0]["sha256"]
        table.add(
            line["where"],
            f"{line['seconds']:.1f}",
            f"{line['bytes']:,}",
            "yes" if line["same"] else "NO",
        )
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "rows": args.rows}) + "\n")
    table.show(args.markdown)
    return 0 if all(line["same"] for line in lines) else 1


def measured(
    where: str, folder: Path, engine: Engine, beside: Callable[[Path], None] | None = None
) -> dict[str, Any]:
    """Prepare once; what that took and wrote.

    Args:
        where: what to call it.
        folder: has the log.
        engine: runs the passes.
        beside: runs in a thread meanwhile; it is given where the counts of parts are sealed.
    """
    out = folder / where.replace(" ", "-").replace(",", "")
    thread = None
    if beside is not None:
        scratch = out.parent / f".{out.name}.partial" / "scratch" / "counts"
        thread = threading.Thread(target=beside, args=(scratch,), daemon=True)
        thread.start()
    begun = time.perf_counter()
    prepare(
        folder / "log.txt",
        out,
        importer="criteo",
        min_count=2,
        blocks_per_part=1,
        name="clicks",
        max_memory="2GiB",
        engine=engine,
    )
    seconds = time.perf_counter() - begun
    if thread is not None:
        thread.join(timeout=60)
        assert not thread.is_alive(), "no node was killed: there are too few parts"
    files = sorted(path for path in out.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    size = sum(path.stat().st_size for path in files)
    return {"where": where, "seconds": seconds, "bytes": size, "sha256": digest.hexdigest()}


def killing(nodes: Cluster) -> Callable[[Path], None]:
    """What kills the last node of a cluster once two parts are counted."""

    def kill(scratch: Path) -> None:
        while len(list(scratch.glob("*.json"))) < 2:
            time.sleep(0.05)
        nodes.kill_node(len(nodes.nodes) - 1)

    return kill


if __name__ == "__main__":
    sys.exit(main())
