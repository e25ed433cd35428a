"""The planted truth of generated logs: from a row's values to its click probability.

The logit is the sum of a first-order effect of every categorical value, of products of low-rank
latent vectors for some pairs of fields, and of a linear effect of every count's log1p. A value's
first latent is its first-order effect (what draws clicks by itself also changes what other values
draw: Tukey's non-additivity), the others are independent of it. Effects and latents are standard
normal scores that a hash draws from (seed, field, value), so a vocabulary of any size takes no
memory and values that appear later have theirs from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MISSING = -1
"""The value of a categorical field that is empty; it has effects as any other."""

RANK = 2
"""Width of the latent vectors of pairs that are drawn."""

_SCORE_BITS = 12
_SCORES_PER_HASH = 5
# MurmurHash3's finaliser: another family than the one that compressed tables place ids with, so
# that no method meets its own hash in the data.
_MULTIPLY = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_SHIFT = np.uint64(33)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for factor in _MULTIPLY:
        z = (z ^ (z >> _SHIFT)) * factor
    return z ^ (z >> _SHIFT)


def _normal_scores() -> NDArray[np.float32]:
    count, normal = 1 << _SCORE_BITS, NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Rows before they become text.

    Attributes:
        values: (F, n) int64 values of the categorical fields, `MISSING` where empty.
        counts: (I, n) int64 values of the integer fields.
        absent: (I, n) bool, where an integer field is empty; it then acts as a count of 0, which
            is how prepared data has it.
        time: (n,) float64 in [0, 1), how far through the log each row is.
    """

    values: NDArray[np.int64]
    counts: NDArray[np.int64]
    absent: NDArray[np.bool_]
    time: NDArray[np.float64]

    def first(self, size: int) -> RawRows:
        """Return the first `size` rows."""
        return RawRows(
            values=self.values[:, :size],
            counts=self.counts[:, :size],
            absent=self.absent[:, :size],
            time=self.time[:size],
        )


class ClickModel:
    """The click probability of each row.

    Args:
        sample: rows on which the parts of the logit are scaled and centred.
        seed: draws all effects.
        weights: (F,) relative sizes of the fields' first-order effects.
        num_pairs: pairs of fields that interact.
        strengths: standard deviations of the logit's first-order, pair and integer parts.
        click_rate: mean probability on the sample.
        drift: how far first-order effects turn into independent ones from the first row to the
            last, in [0, 1].
        ranks: widths of the latent vectors of the first two fields, of the next two, and so on;
            in place of pairs that are drawn, if any are given.
    """

    def __init__(
        self,
        *,
        sample: RawRows,
        seed: int,
        weights: Sequence[float],
        num_pairs: int,
        strengths: Sequence[float],
        click_rate: float,
        drift: float,
        ranks: Sequence[int] = (),
    ) -> None:
        rng = np.random.default_rng([seed, 1])
        num_fields, num_counts = len(sample.values), len(sample.counts)
        self._scores = _normal_scores()
        self._salts = _mix(rng.integers(0, 2**63, size=num_fields, dtype=np.uint64))
        every_pair = [(f, g) for g in range(num_fields) for f in range(g)]
        chosen = rng.permutation(len(every_pair))[:num_pairs]
        self._pairs = [(*every_pair[i], RANK) for i in sorted(chosen)]
        if ranks:
            self._pairs = [(2 * p, 2 * p + 1, rank) for p, rank in enumerate(ranks) if rank]
        self._weights = np.asarray(weights, dtype=np.float32)
        self._slopes = rng.normal(size=num_counts)
        self._angle = drift * np.pi / 2
        logs = _logs(sample)
        self._log_mean = logs.mean(axis=1, keepdims=True)
        self._log_std = logs.std(axis=1, keepdims=True) + 1e-9
        parts = self._parts(sample)
        self._centres = parts.mean(axis=1)
        self._scales = np.asarray(strengths) / (parts.std(axis=1) + 1e-9)
        self._bias = 0.0
        self._bias = _bias_for(self.logit(sample), click_rate)

    def logit(self, rows: RawRows) -> NDArray[np.float64]:
        """Return the (n,) true logits."""
        parts = self._parts(rows) - self._centres[:, None]
        return self._scales @ parts + self._bias

    def probability(self, rows: RawRows) -> NDArray[np.float64]:
        """Return the (n,) true click probabilities."""
        return 1.0 / (1.0 + np.exp(-self.logit(rows)))

    def _parts(self, rows: RawRows) -> NDArray[np.float64]:
        """The first-order, pair and integer parts of the logit, (3, n), before scaling."""
        fields, size = rows.values.shape
        first, pairs = np.zeros(size), np.zeros(size)
        latents: dict[int, NDArray[np.float32]] = {}
        ranks = {field: rank for f, g, rank in self._pairs for field in (f, g)}
        turn = self._angle * rows.time
        for field in range(fields):
            bits = _mix(rows.values[field].astype(np.uint64) ^ self._salts[field])
            effect = self._score(bits, 0)
            if self._angle:
                other = self._score(_mix(bits), 0)
                effect = effect * np.cos(turn) + other * np.sin(turn)
            first += self._weights[field] * effect
            if field in ranks:
                latents[field] = self._latents(bits, ranks[field])
        for f, g, _ in self._pairs:
            pairs += np.einsum("kn,kn->n", latents[f], latents[g])
        standard = (_logs(rows) - self._log_mean) / self._log_std
        return np.stack([first, pairs, self._slopes @ standard])

    def _latents(self, bits: NDArray[np.uint64], rank: int) -> NDArray[np.float32]:
        """The (rank, n) latent vectors of hashed values."""
        found = []
        for k in range(rank):
            place = k % _SCORES_PER_HASH
            bits = _mix(bits) if k and not place else bits
            found.append(self._score(bits, place))
        return np.stack(found)

    def _score(self, bits: NDArray[np.uint64], place: int) -> NDArray[np.float32]:
        shifted = bits >> np.uint64(place * _SCORE_BITS)
        return self._scores[shifted & np.uint64((1 << _SCORE_BITS) - 1)]


def _logs(rows: RawRows) -> NDArray[np.float64]:
    return np.log1p(np.where(rows.absent, 0, np.maximum(rows.counts, 0)))


def _bias_for(logits: NDArray[np.float64], click_rate: float) -> float:
    """The shift of the logits that gives a mean probability of `click_rate`, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        rate = float((1.0 / (1.0 + np.exp(-(logits + middle)))).mean())
        low, high = (middle, high) if rate < click_rate else (low, middle)
    return (low + high) / 2
