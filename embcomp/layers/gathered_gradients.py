"""What all ranks' looked-up embeddings were pulled to in a step: ids and gradients, the same on every rank.

TorchRec's own backward pass carries gradients to rows as wide as those that were looked up. Where
embeddings are wider than the stored rows, this carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KeyGradients:
    """Of one (table, feature).

    Attributes:
        ids: (N,) int64.
        gradients: (N, D) float32.
    """

    ids: Tensor
    gradients: Tensor


def over_ranks(
    own: Sequence[KeyGradients], widths: Sequence[int], device: torch.device
) -> list[KeyGradients]:
    """What all ranks have of each key, rank after rank; all of them call it.

    Args:
        own: of this rank, key by key.
        widths: D of each key.
        device: where it is wanted.
    """
    on = device if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.tensor([len(each.ids) for each in own], device=on)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    counts: list[list[int]] = torch.stack(
        gathered
    ).tolist()  # the host waits for the sizes of what comes
    sizes = [[count * width for count, width in zip(each, widths)] for each in counts]
    ids = _from_all([each.ids for each in own], counts, torch.int64, on)
    values = _from_all([each.gradients.reshape(-1) for each in own], sizes, torch.float32, on)
    return [
        KeyGradients(
            ids=torch.cat([rank[key] for rank in ids]).to(device),
            gradients=torch.cat([rank[key] for rank in values]).view(-1, width).to(device),
        )
        for key, width in enumerate(widths)
    ]


def _from_all(
    own: Sequence[Tensor], sizes: Sequence[Sequence[int]], dtype: torch.dtype, on: torch.device
) -> list[list[Tensor]]:
    """Flat tensors of all ranks, whose sizes are known: rank by rank, key by key."""
    sent = torch.zeros(max(sum(each) for each in sizes), dtype=dtype, device=on)
    joined = torch.cat([each.to(on, dtype) for each in own])
    sent[: len(joined)] = joined
    came = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(came, sent)
    return [list(flat[: sum(each)].split(list(each))) for flat, each in zip(came, sizes)]
