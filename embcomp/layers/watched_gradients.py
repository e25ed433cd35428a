"""How long the gradients of looked-up rows were: what an id matters, for routes that give rows to ids.

A method's `combine` sees the rows of a step and, in its backward pass, their gradients; its `route` asks for
them between two steps, over all ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from typing_extensions import override

from embcomp.layers.host_values import on_device
from embcomp.layers.lookup_context import LookupContext


@dataclass(frozen=True, kw_only=True)
class SeenIds:
    """The ids of some steps, over all ranks, key after key, and what they matter.

    Attributes:
        counts: how many there are of each key.
        keys: (N,) int64 the key of each.
        ids: (N,) int64.
        scores: (N,) float32 lengths of their gradients, 1 on average for each key.
    """

    counts: list[int]
    keys: Tensor
    ids: Tensor
    scores: Tensor


@dataclass
class GradientWatch:
    """What was seen since it was last asked; the same object in a route and in its `WatchedRows`.

    Backward passes tell it, each by itself: what of a forward pass is still to come waits in that pass's graph.

    Attributes:
        told: of each key, (N,) int64 ids and the (N,) float32 lengths of their gradients, as they came.
    """

    told: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"told": {}}  # a copy begins with the next step

    def tell(self, key: int, ids: Tensor, gradients: Tensor) -> None:
        """Take in what a backward pass found.

        Args:
            key: whose rows they are.
            ids: (N,) int64.
            gradients: (N, D); what is not finite counts nothing, as optimizers skip such steps.
        """
        lengths = gradients.detach().float().norm(dim=1)
        lengths = torch.where(lengths.isfinite(), lengths, 0.0)
        self.told.setdefault(key, []).append((ids, lengths))

    def take(
        self, holder: nn.Module, wanted: Sequence[bool], device: torch.device
    ) -> SeenIds | None:
        """What was seen, which is then forgotten; None where nothing was.

        Args:
            holder: the collection that holds the rows; where it is sharded, all ranks call it.
            wanted: for each key, whether it matters.
            device: of the ids.
        """
        told, self.told = self.told, {}
        parts = [_joined(told.get(key, [])) for key in range(len(wanted))]
        if is_on_ranks(holder):
            parts = _over_ranks(parts, device)
        counts = [len(ids) if is_wanted else 0 for (ids, _), is_wanted in zip(parts, wanted)]
        if not any(counts):
            return None
        parts = [part for part, count in zip(parts, counts) if count]
        ids = torch.cat([own for own, _ in parts])
        norms = torch.cat([own for _, own in parts])
        own = on_device(counts, ids.device)
        keys = torch.arange(len(counts), device=ids.device).repeat_interleave(
            own, output_size=ids.shape[0]
        )
        sums = norms.new_zeros(len(counts)).index_add_(0, keys, norms)
        scores = norms * (own / sums.clamp(min=1e-30))[keys]
        return SeenIds(counts=counts, keys=keys, ids=ids, scores=scores)


class WatchedRows(nn.Module):
    """Hands rows on as they are, and tells in training how long their gradients were.

    Args:
        watch: that is told.
        dims: for each (table, feature), the width of its rows.
    """

    def __init__(self, watch: GradientWatch, dims: Sequence[int]) -> None:
        super().__init__()
        self._watch = watch
        self._dims = list(dims)

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        if not self._watches([rows]):
            return rows
        rows, ids = rows.view_as(rows), [own.detach() for own in looked_up.each_ids()]

        def tell(gradient: Tensor) -> None:
            for key, part in enumerate(gradient.split(self._dims, dim=1)):
                self._watch.tell(key, ids[key], part[: ids[key].shape[0]])

        rows.register_hook(tell)
        return rows

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        if not self._watches(parts):
            return list(parts)
        ids = looked_up.each_ids()
        return [self._watched(key, part, ids[key].detach()) for key, part in enumerate(parts)]

    def _watched(self, key: int, part: Tensor, ids: Tensor) -> Tensor:
        def tell(gradient: Tensor) -> None:
            self._watch.tell(key, ids, gradient)

        part = part.view_as(part)
        if part.requires_grad:
            part.register_hook(tell)
        return part

    def _watches(self, parts: Sequence[Tensor]) -> bool:
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return learns and any(part.requires_grad for part in parts)


def is_on_ranks(holder: nn.Module) -> bool:
    """Whether rows are held by several ranks, which must then write the same."""
    return isinstance(holder, ShardedEmbeddingBagCollection) and dist.get_world_size() > 1


def sent_by_first(values: Tensor) -> Tensor:
    """What the first rank has of something that ranks might round apart; all ranks call it."""
    on = values if dist.get_backend() == "nccl" else values.cpu()
    dist.broadcast(on, src=0)
    return on.to(values.device)


def _joined(told: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The ids of a key and the lengths of their gradients, over several passes."""
    if not told:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    ids, lengths = zip(*told)
    return torch.cat(ids), torch.cat(lengths)


def _over_ranks(
    parts: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What all ranks have of each key, rank after rank; the same on all of them."""
    on = device if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor([len(ids) for ids, _ in parts], device=on)
    ranks = dist.get_world_size()
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(gathered, own)
    counts = torch.stack(gathered).tolist()  # the host waits here for the sizes of what comes
    most = max(sum(each) for each in counts)
    sent = torch.zeros(2, most, dtype=torch.int64, device=on)
    if len(parts) and (total := sum(counts[dist.get_rank()])):
        sent[0, :total] = torch.cat([ids.to(on) for ids, _ in parts])
        sent[1, :total] = torch.cat([norms.to(on) for _, norms in parts]).double().view(torch.int64)
    came = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(came, sent)
    by_rank = [
        list(zip(ids[: sum(each)].split(each), norms[: sum(each)].split(each)))
        for (ids, norms), each in zip(came, counts)
    ]
    return [
        (
            torch.cat([each[key][0] for each in by_rank]).to(device),
            torch.cat([each[key][1] for each in by_rank]).view(torch.float64).float().to(device),
        )
        for key in range(len(parts))
    ]
