"""A place for an artefact that answers while the next one takes over.

A call takes what is there when it begins and ends with it, so each answer is of one artefact. The
other one is loaded, checked and tried beside it, and takes over by one assignment, which no caller
can see half of. The old one is freed with the last call that it answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from embcomp.errors import ArtefactError
from embcomp.serving.artefact_config import CONFIG_FILE, ArtefactConfig
from embcomp.serving.artefact_loading import Serving, load
from embcomp.serving.modules import ServingModel


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """An artefact that was loaded.

    Attributes:
        path: its folder.
        digest: of its description, and so of all of it.
        serving: what answers.
    """

    path: Path
    digest: str
    serving: Serving


class ServingSlot:
    """Answers from an artefact, and takes the next one under load.

    Any number of threads may call and swap at once. Swaps come one after another.

    Args:
        path: the first artefact's folder.
        device: as for `embcomp.load`.
        rows: as for `embcomp.load`.
        verify: as for `embcomp.load`.
        mmap: as for `embcomp.load`. A folder that was swapped out may go when the last call that it
            answers has ended: remove it, and never write into it.
        trial: called with each loaded artefact before it takes over; where it raises, the artefact
            does not. A look-up of a typical batch here also reads what the first one would wait for.

    Raises:
        ArtefactError: as `embcomp.load`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        rows: Literal["auto", "fused", "fbgemm", "torch"] = "auto",
        verify: bool = True,
        mmap: bool = False,
        trial: Callable[[Serving], object] | None = None,
    ) -> None:
        self._load = lambda folder: load(folder, device=device, rows=rows, verify=verify, mmap=mmap)
        self._trial = trial
        self._swapping = threading.Lock()
        self._occupant = self._prepare(Path(path))

    def __call__(self, *inputs: Any) -> Any:
        """Answer as the artefact does that is here now: a model's or a collection's call."""
        return self._occupant.serving(*inputs)

    @property
    def occupant(self) -> Occupant:
        """What is here now. Whoever makes several calls that belong together holds on to it."""
        return self._occupant

    def swap(self, path: str | Path) -> Occupant:
        """Load another artefact and let it take over, which calls in flight do not notice.

        Args:
            path: its folder.

        Returns:
            What takes over.

        Raises:
            ArtefactError: it is missing, damaged, or takes or gives other things than the one that
                is here, which then goes on.
        """
        with self._swapping:
            new, old = self._prepare(Path(path)), self._occupant
            came, wanted = _interface(new.serving), _interface(old.serving)
            for name, value in wanted.items():
                if came.get(name) != value:
                    raise ArtefactError(
                        f"{new.path} cannot take over from {old.path}, which goes on: {name} of the "
                        f"new one are {came.get(name)}, of the old one {value}. Callers of one slot "
                        "expect one kind of answer; use a slot of its own"
                    )
            self._occupant = new
            return new

    def _prepare(self, path: Path) -> Occupant:
        digest = ArtefactConfig.read(path).digest
        serving = self._load(path)
        if ArtefactConfig.read(path).digest != digest:
            raise ArtefactError(f"{path / CONFIG_FILE} changed while it was read; load it again")
        if self._trial is not None:
            with torch.inference_mode():
                self._trial(serving)
        return Occupant(path=path, digest=digest, serving=serving)


def _interface(serving: Serving) -> dict[str, Any]:
    """What callers give and get."""
    if isinstance(serving, ServingModel):
        return {
            "kinds": "model",
            "features": serving.feature_names,
            "numeric features": serving.num_dense,
        }
    record = serving.record
    return {
        "kinds": f"{record.kind}{' and weighted' if record.is_weighted else ''} tables",
        "features": serving.feature_names,
        "outputs": {
            table.name: (table.embedding_dim, table.feature_names) for table in record.tables
        },
    }
