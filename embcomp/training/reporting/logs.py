"""Records of a run: metrics.jsonl, timing.jsonl and, when installed, TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

from embcomp.io.json_values import without_nan
from embcomp.training.run_folder import RunFolder


class RunLogs:
    """The records of one run; writes on the first rank only.

    metrics.jsonl holds no times, so that the same run writes the same bytes; those go to
    timing.jsonl. A resumed run cuts both back to where its checkpoint was made.

    Args:
        folder: the run.
        enabled: whether this rank writes.
        step: where the run begins or goes on.
        sizes: bytes of both files at that step.
        stage: the stage that records name; empty where a run has one only.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        enabled: bool,
        step: int,
        sizes: Mapping[str, int],
        stage: str = "",
    ) -> None:
        self._enabled = enabled
        self._stage = {"stage": stage} if stage else {}
        self._files = {"metrics": folder.metrics, "timing": folder.timing}
        self._board: SummaryWriter | None = None
        if enabled:
            for name, path in self._files.items():
                _cut(path, sizes.get(name, 0))
            self._board = _open_board(folder.tensorboard / stage, step)

    def sizes(self) -> dict[str, int]:
        """Bytes written so far, on the first rank."""
        if not self._enabled:
            return {}
        return {name: path.stat().st_size for name, path in self._files.items()}

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl.

        Args:
            kind: `train`, or the split that was evaluated.
            step: steps done.
            values: numbers, or mappings from feature to number.
        """
        self._append("metrics", {**self._stage, "kind": kind, "step": step, **values})
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{key}", value, step)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Append to timing.jsonl."""
        self._append("timing", {**self._stage, "step": step, **values})
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(f"timing/{key}", value, step)

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self._enabled:
            with self._files[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(record)) + "\n")


def _cut(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, min(size, path.stat().st_size))


def _open_board(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    # Events after a checkpoint that a run resumes from are hidden, not shown twice.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
