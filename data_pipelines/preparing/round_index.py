"""The index that a round of encoding looks values up in, built once for all parts that a process encodes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embcomp.data_pipelines.preparing.encoding import Encoder, Slice
from embcomp.data_pipelines.preparing.features import Features


@dataclass(frozen=True, kw_only=True)
class RoundIndex:
    """What a round looks up: slices of vocabularies.

    Attributes:
        features: of the dataset.
        vocabularies: the files, by categorical feature.
        digests: their SHA-256, which tell a rewritten file from the one before.
        slices: the rows of them.
    """

    features: Features
    vocabularies: tuple[Path, ...]
    digests: tuple[str, ...]
    slices: tuple[Slice, ...]


class _Held:
    """The one encoder that a process keeps between tasks: two would take twice the memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.index: RoundIndex | None = None
        self.encoder: Encoder | None = None


_held = _Held()


def encoder_of(index: RoundIndex) -> Encoder:
    """Return the encoder of a round; the one of the task before, or beside, where it is the same round."""
    with _held.lock:
        if _held.index != index or _held.encoder is None:
            # Whoever still looks up in the one before keeps it alive.
            _held.index = _held.encoder = None
            threads = max(1, min(pl.thread_pool_size(), 8))
            _held.encoder = Encoder(index.features, index.vocabularies, index.slices, threads)
            _held.index = index
        return _held.encoder


def release_encoder() -> None:
    """Let go of the encoder that this process holds, if any."""
    with _held.lock:
        _held.encoder = _held.index = None
