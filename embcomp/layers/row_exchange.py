"""Questions about rows that other ranks hold, answered where the rows are.

What is as long as a vocabulary (codes, bitmaps) may lie in chunks on the ranks of a group. A route then
sends each id to the rank that holds it, which answers with a few bytes: what an all-to-all of TorchRec does
with rows, done with what leads to them. All ranks of the group take part in every exchange, those without a
question as well; how many questions each has may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from embcomp.layers.constant_tensors import Constant

Answer = Callable[[Tensor], Tensor]
"""From the places (n,) of rows on this rank to what is known of them, (n,) or (n, w)."""


class RowExchange:
    """Asks the ranks of a group.

    Args:
        group: of which this process is a rank. NCCL takes tensors on its devices, gloo those on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: object) -> RowExchange:
        return self  # a copy of a model is of the same ranks

    def ask(self, owners: Tensor, places: Tensor, answer: Answer) -> Tensor:
        """What the owners of rows answer.

        Args:
            owners: (N,) int64 the rank that each question is for, by its number in the group.
            places: (N,) int64 the row's place there.
            answer: answers the questions that came to this rank; the same function on all ranks.

        Returns:
            (N,) or (N, w), in the order of the questions.
        """
        order = owners.argsort()
        sent = owners.bincount(minlength=self.ranks)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=self.group)
        # As TorchRec's input_dist does, the host waits here for the sizes of what comes.
        sizes, wanted = came.tolist(), sent.tolist()
        asked = self._exchanged(places[order].unsqueeze(1), sizes, wanted)
        own = answer(asked.squeeze(1))
        back = self._exchanged(own if own.dim() == 2 else own.unsqueeze(1), wanted, sizes)
        found = torch.empty_like(back)
        found[order] = back
        found = found.view(own.dtype)
        return found if own.dim() == 2 else found.squeeze(1)

    def _exchanged(self, rows: Tensor, came: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Rows (n, w) of any type from all ranks: (sum of `came`, w) of the same, or their bytes."""
        own = rows.contiguous()
        if own.dtype != torch.int64:  # NCCL knows few types of integers
            row_bytes = own.shape[1] * own.itemsize
            own = own.flatten().view(torch.uint8).view(len(own), row_bytes)
        found = own.new_empty(sum(came), own.shape[1])
        dist.all_to_all_single(found, own, list(came), list(sent), group=self.group)
        return found


class RowPlaces:
    """Where the rows of tables are that look-ups name: on which rank, and at which place.

    Args:
        exchange: asks the ranks.
        chunks: for each (table, feature), how many of its table's rows a rank holds, rank after rank; 0
            where each rank holds all of them.
        starts: for each, the place of the first of these rows among all that a rank holds.
        steps: for each, the places that a row takes.
    """

    def __init__(
        self,
        exchange: RowExchange,
        chunks: Sequence[int],
        starts: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> None:
        self._exchange = exchange
        self._chunks, self._starts = Constant(chunks), Constant(starts)
        self._steps = Constant(steps or [1] * len(chunks))

    def ask(self, instances: Tensor, rows: Tensor, answer: Answer) -> Tensor:
        """What is known of rows.

        Args:
            instances: (N,) int64 the (table, feature) of each row.
            rows: (N,) int64 their numbers in their tables.
            answer: what this rank knows of the rows at its places.

        Returns:
            (N,) or (N, w) of the answer's type.
        """
        chunks, starts, steps = (
            constant.on(rows.device)[instances]
            for constant in (self._chunks, self._starts, self._steps)
        )
        owners = rows.div(chunks.clamp(min=1), rounding_mode="floor")
        local = torch.where(chunks > 0, rows - owners * chunks, rows)
        owners = torch.where(chunks > 0, owners, self._exchange.rank)
        return self._exchange.ask(owners, starts + local * steps, answer)
