"""How large a delta is for the share of rows that training moved.

    python benchmarks/delta_size.py [--rows 50000] [--shares 0.01 0.05 0.2 1]

Three full tables of width 16 are saved, some of their rows drawn by chance move by noise of a tenth of
their size, and the next artefact is compared with the first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from result_table import ResultTable
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp import CompressedEmbeddingBagCollection, Full, save
from embcomp.serving.deltas.delta_making import make_delta
from embcomp.tables.row_types import ROW_TYPES
from embcomp.training.distributed.quiet import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000, help="of each of the three tables")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.2, 1.0])
    args = parser.parse_args()
    table = ResultTable(
        f"deltas of three tables of {args.rows:,} rows of 16 weights",
        ("moved", "rows", "artefact", "delta", "share"),
        names=("rows",),
    )
    for share in args.shares:
        for row_type in ROW_TYPES:
            new, delta = measured(args.rows, share, row_type)
            table.add(f"{share:.0%}", row_type, f"{new:,}", f"{delta:,}", f"{delta / new:.1%}")
    table.show()


def measured(rows: int, share: float, row_type: str) -> tuple[int, int]:
    """Bytes of the new artefact and of the delta."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{n}", num_embeddings=rows, embedding_dim=16, feature_names=[f"f{n}"]
        )
        for n in range(3)
    ]
    collection = CompressedEmbeddingBagCollection(tables, Full()).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(collection, folder / "old", row_type=row_type)
        with torch.no_grad():
            for weight in collection.parameters():
                moved = torch.rand(len(weight)) < share
                noise = torch.randn(int(moved.sum()), weight.shape[1])
                weight[moved] += 0.1 * weight.std() * noise
        save(collection, folder / "new", row_type=row_type)
        found = make_delta(folder / "old", folder / "new", folder / "delta")
        return found.new_bytes, found.bytes


if __name__ == "__main__":
    with quiet_libraries():
        main()
