"""What is known of every id of a table, in files: made on one rank, mapped by all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcomp.io.mapped_arrays import zeros_in_file
from embcomp.layers.block_work import Statistics, Work


def mapped_numbers(
    name: str,
    sizes: Mapping[str, int],
    fill: Callable[[str, NDArray[np.int64]], Statistics],
    folder: Path,
    work: Work,
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """A number for each id of each table, mapped from files, and what came out beside.

    Args:
        name: of the step, which no other of the work has; of letters and hyphens.
        sizes: by table, how many ids it has.
        fill: writes the numbers of a table into zeros, on one of the ranks.
        folder: the work's, where the files are.
        work: does it.
    """
    places = {table: folder / name / f"{n}.numbers" for n, table in enumerate(sizes)}

    def write(table: str) -> Statistics:
        with places[table].open("w+b") as file:
            numbers = zeros_in_file(file, sizes[table], f"what is known of ids of {table!r}")
        found = fill(table, numbers)
        assert isinstance(numbers, np.memmap)
        numbers.flush()  # where ranks of other hosts read it
        return found

    found = dict(zip(sizes, work.map(name, write, list(sizes))))
    # Shared with the file: a private mapping counts as this process's own memory, though it is read only.
    mapped = {
        table: torch.from_file(str(path), shared=True, size=sizes[table], dtype=torch.int64)
        for table, path in places.items()
    }
    return mapped, found
