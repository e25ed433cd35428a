"""Click data with a known structure: ids that mean nothing, and features that need few columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.testing.check_data import Declared


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Rows of single-valued features, ids ranked by frequency, and what moves their labels.

    Args:
        ids: (rows, features) int64.
        labels: (rows,) float32, 0 or 1.
        useful: for each feature, (num_embeddings,) bool which ids move the label.
        rank: length of the vectors through which the first two features interact; 0 for none.
    """

    ids: Tensor
    labels: Tensor
    useful: tuple[Tensor, ...]
    rank: int = 0

    def tables(self, dim: int) -> list[Declared]:
        """One table of this width for each feature: t0 for f0, and so on."""
        return [
            Declared(name=f"t{n}", rows=len(useful), dim=dim, features=(f"f{n}",))
            for n, useful in enumerate(self.useful)
        ]

    def features(self, rows: Tensor | slice) -> KeyedJaggedTensor:
        """Some rows as a batch."""
        ids = self.ids[rows]
        return KeyedJaggedTensor(
            keys=[f"f{n}" for n in range(ids.shape[1])],
            values=ids.t().reshape(-1),
            lengths=torch.ones(ids.numel(), dtype=torch.int32),
        )

    def counts(self, rows: slice) -> dict[str, Tensor]:
        """For each table, (num_embeddings,) how often each id occurs in some rows."""
        return {
            f"t{n}": torch.bincount(self.ids[rows, n], minlength=len(useful))
            for n, useful in enumerate(self.useful)
        }


def plant(
    *,
    rows: int = 15_000,
    num_values: Sequence[int] = (600, 600, 600, 600),
    useful_share: float = 1.0,
    rank: int = 0,
    seed: int = 0,
) -> Planted:
    """Draw planted data.

    Args:
        rows: how many.
        num_values: ids of each feature, drawn by Zipf's law.
        useful_share: share of each feature's ids, whatever their frequency, that move the label.
        rank: the first two features interact through products of vectors this long and do nothing
            else, so that they need embeddings as wide; 0 for no interaction. Every other feature
            adds a number for each of its ids, for which one column is enough.
        seed: same arguments and seed, same data.
    """
    random = torch.Generator().manual_seed(seed)
    ids, useful, vectors = [], [], []
    score = torch.zeros(rows)
    for n, count in enumerate(num_values):
        weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
        drawn = torch.multinomial(weights, rows, replacement=True, generator=random)
        moves = torch.rand(count, generator=random) < useful_share
        if rank and n < 2:
            vectors.append(torch.randn(count, rank, generator=random)[drawn])
        else:
            signs = torch.randint(0, 2, (count,), generator=random) * 2 - 1
            score += 1.5 * (signs * moves)[drawn]
        ids.append(drawn)
        useful.append(moves)
    if rank:
        score += 2 * (vectors[0] * vectors[1]).sum(1) / rank**0.5
    labels = (torch.rand(rows, generator=random) < torch.sigmoid(score)).float()
    return Planted(ids=torch.stack(ids, dim=1), labels=labels, useful=tuple(useful), rank=rank)
