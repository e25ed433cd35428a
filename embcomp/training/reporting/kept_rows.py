"""Which share of rows passes a method's learnt thresholds, of tables that are spread over ranks."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.layers.held_pieces import local_pieces
from embcomp.layers.learned_buffers import Penalised
from embcomp.training.checkpoint import model_state

_ROWS_AT_ONCE = 1 << 16


@torch.no_grad()
def kept_rows(
    sharded: nn.Module,
    tables: CompressedEmbeddingBagCollection,
    device: torch.device,
    resting: Collection[str] = (),
) -> float | None:
    """The share of rows that pass now; None where no method stops any, or columns are split.

    Args:
        sharded: the model that trains.
        tables: its collection.
        device: of the process group's tensors.
        resting: logical tables that are not asked, as their methods' turn is to come.
    """
    gates = [part for part in tables.combine.modules() if isinstance(part, Penalised)]
    asleep = {
        physical.name
        for group in tables.groups
        for physical in group.backend.physical_tables
        if not set(resting).isdisjoint(group.looked_up_in(physical))
    }
    widths = {t.name: t.embedding_dim for t in tables.physical_tables if t.name not in asleep}
    passed = total = 0
    split = asks = False
    for key, weight in model_state(sharded).items():
        name = key.removesuffix(".weight").rpartition(".embedding_bags.")[2]
        if name not in widths or not key.endswith(".weight"):
            continue
        for piece, (_, column) in local_pieces(weight):
            split = split or bool(column) or piece.shape[1] < widths[name]
            for rows in piece.split(_ROWS_AT_ONCE):
                for gate in gates:
                    found = gate.keeps_row(name, rows[:, : widths[name]])
                    if found is not None:
                        asks = True
                        passed += int(found.sum())
                        total += len(found)
    sums = torch.tensor([passed, total, int(split), int(asks)], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    passed, total, is_split, asked = sums.tolist()
    return passed / total if asked and total and not is_split else None
