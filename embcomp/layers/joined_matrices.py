"""Matrices of many tables as one tensor, so that a product does not take an operation for each of them.

That pays where starting an operation costs more than what it does, and where nothing learns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.derived_tensors import Derived
from embcomp.layers.host_values import reads_wait


class JoinsTables(nn.Module):
    """Makes embeddings of rows with parameters of many tables, for all of them at once once they are served.

    Attributes:
        is_served: whether the parameters stay what they are. Those of a collection may be written to past
            their versions (`parameter.data.mul_(...)`, as averages of weights do), which no copy would follow.
    """

    is_served: bool = False

    def joins(self, rows: Tensor) -> bool:
        """Whether what tables do with rows is done at once.

        Args:
            rows: of any shape.
        """
        return (
            self.is_served
            and reads_wait(rows.device)
            and not torch.compiler.is_compiling()
            and not any(each.requires_grad for each in self.parameters())
        )


class StackedParameters:
    """Parameters of one shape as one tensor, whose parts they become: no second copy is held."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_whole": None}  # parameters that are copied or moved are parts of it no more

    @torch.no_grad()
    def of(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """(parameters, *shape) of them."""
        whole = self._whole
        if whole is None or any(
            each.data_ptr() != part.data_ptr() for each, part in zip(parameters, whole)
        ):
            whole = torch.stack([each.detach() for each in parameters])
            for each, part in zip(parameters, whole):
                each.data = part
            self._whole = whole
        return whole


class JoinedColumns:
    """Columns of many embeddings, each run of them through a matrix, or cut or filled up with zeros.

    Args:
        came: columns of each run.
        wanted: columns of each embedding.
    """

    def __init__(self, came: Sequence[int], wanted: Sequence[int]) -> None:
        self._came, self._wanted = list(came), list(wanted)
        self._blocks = Derived()
        self._apart = _runs(came, [max(came, default=0)] * len(came))
        self._fitted = _runs(came, wanted)
        self._cut = _runs([max(wanted, default=0)] * len(wanted), wanted)

    def __call__(self, rows: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
        """Make embeddings.

        Args:
            rows: (R, sum of came).
            matrices: (came, wanted) for each run; None where it is taken as it is.

        Returns:
            (R, sum of wanted).
        """
        if all(matrix is None for matrix in matrices):
            return _picked(rows, self._fitted)
        apart = _picked(rows, self._apart).unflatten(1, (len(self._came), -1))
        given = [matrix for matrix in matrices if matrix is not None]
        blocks = self._blocks.of(given, lambda: self._around(matrices))
        made = torch.bmm(apart.transpose(0, 1), blocks)  # (runs, R, widest)
        return _picked(made.transpose(0, 1).reshape(rows.shape[0], -1), self._cut)

    def _around(self, matrices: Sequence[Tensor | None]) -> Tensor:
        """(runs, most columns that come, most that are wanted), zeros around each matrix."""
        like = next(each for each in matrices if each is not None)
        blocks = like.new_zeros(len(matrices), max(self._came), max(self._wanted))
        for block, own, wanted in zip(blocks, matrices, self._wanted):
            if own is None:
                block[:, :wanted].fill_diagonal_(1.0)
            else:
                block[: own.shape[0], : own.shape[1]] = own
        return blocks


def _runs(came: Sequence[int], wanted: Sequence[int]) -> Constant | None:
    """For each wanted column the one that comes, or the one behind all; None where all are in place."""
    if list(came) == list(wanted):
        return None
    total, columns, first = sum(came), [], 0
    for own, width in zip(came, wanted):
        columns += [first + n if n < own else total for n in range(width)]
        first += own
    return Constant(columns)


def _picked(rows: Tensor, columns: Constant | None) -> Tensor:
    """(R, wanted) of (R, came) columns and one of zeros behind them."""
    if columns is None:
        return rows
    return F.pad(rows, (0, 1)).index_select(1, columns.on(rows.device))
