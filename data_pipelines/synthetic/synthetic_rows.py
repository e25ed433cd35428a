"""The rows of a generated log: long-tailed values, skewed counts, empty fields, new values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcomp.data_pipelines.synthetic.click_model import MISSING, RawRows
from embcomp.errors import ConfigError

CRITEO_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Distinct values of C1 to C26 in the Criteo Kaggle log."""

# Shares of empty fields, about those of the Criteo Kaggle log.
_ABSENT = (0.45, 0.0, 0.21, 0.22, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.22)
_MISSING = (
    0.0, 0.0, 0.03, 0.03, 0.0, 0.12, 0.0, 0.0, 0.0, 0.0, 0.0, 0.03, 0.0, 0.0, 0.0, 0.03, 0.0, 0.0,
    0.44, 0.44, 0.03, 0.76, 0.0, 0.03, 0.44, 0.44,
)  # fmt: skip
# Location and spread of the log of each integer field.
_LOG_MEAN = (0.8, 2.0, 2.0, 1.6, 7.0, 3.2, 1.6, 2.0, 3.8, 0.3, 0.7, 0.2, 1.7)
_LOG_STD = (1.1, 1.8, 1.4, 0.9, 2.4, 1.8, 1.4, 0.9, 1.4, 0.5, 0.8, 0.6, 1.1)
_SIGNED = 1  # I2 starts at -1

CHUNK_ROWS = 65_536
"""Rows drawn together from one random stream; a part of the format of "same seed, same bytes"."""

_SAMPLE_CHUNK = 2**32  # a chunk that no log reaches: what the click model is scaled on


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What to generate.

    Args:
        rows: lines of the log.
        scale: what Criteo's cardinalities are multiplied with.
        min_cardinality: fields are not scaled below this, nor above their real cardinality.
        exponent: of the Zipf law that values follow: the k-th most frequent one has probability
            proportional to (k + shift) ** -exponent.
        shift: flattens the head of that law.
        damping: the more values a field has, the less each says: effects are proportional to
            cardinality ** -damping.
        num_pairs: pairs of fields that interact.
        first_order: standard deviation of the logit that single values give.
        interaction: standard deviation that pairs of fields give.
        numeric: standard deviation that the integer fields give.
        click_rate: share of clicks.
        drift: how far the effects of values turn into independent ones over the log, in [0, 1].
        renewal: share of the values of large fields (over 10,000 values in Criteo) that are
            replaced by new ones, at a moment of their own, by the end of the log.
        ranks: of the interactions of C1 with C2, C3 with C4, and so on, 0 for none; in place of
            `num_pairs` drawn ones, if any are given. The variance of each goes with its rank, so
            how much these fields matter, and how wide their embeddings need to be, is known.
        seed: same settings and seed, same bytes.
    """

    rows: int = 300_000
    scale: float = 0.001
    min_cardinality: int = 30
    exponent: float = 1.3
    shift: float = 2.0
    damping: float = 0.1
    num_pairs: int = 3
    first_order: float = 1.0
    interaction: float = 0.2
    numeric: float = 1.1
    click_rate: float = 0.256
    drift: float = 0.0
    renewal: float = 0.0
    ranks: tuple[int, ...] = ()
    seed: int = 2021

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("rows", self.rows, 1, 2**40),
            ("scale", self.scale, 0.0, 10.0),
            ("min_cardinality", self.min_cardinality, 1, 2**31),
            ("exponent", self.exponent, 0.0, 10.0),
            ("shift", self.shift, 0.0, 1e9),
            ("damping", self.damping, 0.0, 1.0),
            ("num_pairs", self.num_pairs, 0, 325),
            ("first_order", self.first_order, 0.0, 100.0),
            ("interaction", self.interaction, 0.0, 100.0),
            ("numeric", self.numeric, 0.0, 100.0),
            ("click_rate", self.click_rate, 1e-4, 1 - 1e-4),
            ("drift", self.drift, 0.0, 1.0),
            ("renewal", self.renewal, 0.0, 1.0),
            ("seed", self.seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")
        if len(self.ranks) > len(CRITEO_CARDINALITIES) // 2 or any(r < 0 for r in self.ranks):
            raise ConfigError(
                f"ranks must be at least 0, for up to 13 pairs of fields, got {list(self.ranks)}"
            )

    @property
    def cardinalities(self) -> list[int]:
        """Values that each field has at any one time."""
        return [
            min(real, max(self.min_cardinality, round(real * self.scale)))
            for real in CRITEO_CARDINALITIES
        ]


class SyntheticRows:
    """Draws the rows of a log, chunk by chunk, each from a random stream of its own."""

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config
        self._cardinalities = config.cardinalities
        rng = np.random.default_rng([config.seed, 2])
        self._renewals = rng.integers(0, 2**63, size=len(self._cardinalities), dtype=np.uint64)

    def sample(self) -> RawRows:
        """Return rows from all over the log that are not in it."""
        return self.chunk(_SAMPLE_CHUNK)[0]

    def chunk(self, number: int) -> tuple[RawRows, NDArray[np.float64]]:
        """Return chunk `number` of the log, and the (n,) uniform draws that decide its labels.

        Chunks are always drawn whole, so that a longer log begins with the rows of a shorter one.
        """
        config, size = self._config, CHUNK_ROWS
        rng = np.random.Generator(np.random.PCG64([config.seed, 3, number]))
        first = number * CHUNK_ROWS
        if number == _SAMPLE_CHUNK:
            time = np.arange(size) / size
        else:
            time = np.arange(first, first + size) / config.rows
        counts = np.empty((len(_LOG_MEAN), size), dtype=np.int64)
        absent = np.empty(counts.shape, dtype=bool)
        for i, (mean, std) in enumerate(zip(_LOG_MEAN, _LOG_STD)):
            drawn = np.exp(np.minimum(mean + std * rng.standard_normal(size), 15.0))
            counts[i] = drawn.astype(np.int64) - (i == _SIGNED)
            absent[i] = rng.random(size) < _ABSENT[i]
        values = np.empty((len(self._cardinalities), size), dtype=np.int64)
        for f, cardinality in enumerate(self._cardinalities):
            ranks = self._zipf(rng.random(size), cardinality)
            values[f] = self._renew(f, ranks, time)
            if _MISSING[f]:
                values[f][rng.random(size) < _MISSING[f]] = MISSING
        rows = RawRows(values=values, counts=counts, absent=absent, time=time)
        return rows, rng.random(size)

    def _zipf(self, uniform: NDArray[np.float64], cardinality: int) -> NDArray[np.int64]:
        """Ranks in [0, cardinality) by inverting the integral of the (shifted) Zipf law."""
        low, high = self._config.shift + 0.5, self._config.shift + 0.5 + cardinality
        power = 1.0 - self._config.exponent
        if abs(power) < 1e-6:
            points = low * (high / low) ** uniform
        else:
            points = (low**power + uniform * (high**power - low**power)) ** (1.0 / power)
        return np.minimum((points - low).astype(np.int64), cardinality - 1)

    def _renew(
        self, field: int, ranks: NDArray[np.int64], time: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Replace values past their moment of renewal by new ones."""
        if not self._config.renewal or CRITEO_CARDINALITIES[field] <= 10_000:
            return ranks
        bits = (ranks.astype(np.uint64) ^ self._renewals[field]) * np.uint64(0x9E3779B97F4A7C15)
        moment = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 / self._config.renewal
        return ranks + self._cardinalities[field] * (time >= moment)
