"""One training step: plain on CPU, overlapped with the next batches' transfers on CUDA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from typing_extensions import override

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.training.distributed.process import Process
from embcomp.training.optim.lazy_decay import LazyDecay
from embcomp.training.optim.optimizers import Optimizers, Phase
from embcomp.training.optim.precision import Precision


class Updates:
    """What surrounds forward and backward: learning rates, decay, clipping, the optimizers.

    It looks like an optimizer, because TorchRec's pipelines call it as one.

    Attributes:
        step_number: set by the loop before each step.
        reductions: how often the plateau rule has acted; set by the loop.
        phase: what kind of step comes; set by the loop.

    Args:
        optimizers: the optimizers.
        decay: lazy decay of fused rows, if any.
    """

    def __init__(self, optimizers: Optimizers, decay: LazyDecay | None) -> None:
        self._optimizers = optimizers
        self._decay = decay
        self.step_number = 0
        self.reductions = 0
        self.phase: Phase = "train"

    def zero_grad(self) -> None:
        """Before the forward pass."""
        rate = self._optimizers.start_step(self.step_number, self.reductions, self.phase)
        if self._decay is not None and self.phase == "train":
            self._decay.start_step(rate)

    def step(self) -> None:
        """After the backward pass."""
        self._optimizers.finish_step(self.phase)


class Steps(ABC):
    """Runs steps on the batches of one epoch."""

    @abstractmethod
    def run(self, batches: Iterator[Batch]) -> Tensor:
        """Train on the next batch and return its loss (); StopIteration after the last."""

    @abstractmethod
    def pause(self) -> None:
        """Make the model callable from outside, for an evaluation between two steps."""


class PlainSteps(Steps):
    """Forward, backward and update, one after another.

    Args:
        sharded: the model.
        updates: the optimizers.
        process: the process group.
        autocast: makes a new context of mixed precision.
    """

    def __init__(
        self,
        sharded: DistributedModelParallel,
        updates: Updates,
        process: Process,
        autocast: Precision,
    ) -> None:
        self._sharded, self._updates = sharded, updates
        self._process, self._autocast = process, autocast

    @override
    def run(self, batches: Iterator[Batch]) -> Tensor:
        batch = next(batches).to(self._process.device, non_blocking=True)
        self._updates.zero_grad()
        loss = self._backward(batch)
        self._updates.step()
        return loss

    @override
    def pause(self) -> None:
        pass

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of a batch that is on the device; returns its loss ()."""
        with self._autocast():
            loss, _ = self._sharded(batch)
        loss.backward()
        return loss.detach()


class PipelinedSteps(Steps):
    """Copies and distributes the next batches while the model works on this one.

    Args:
        sharded: the model.
        updates: the optimizers.
        process: the process group.
        autocast: makes a new context of mixed precision.
    """

    def __init__(
        self,
        sharded: DistributedModelParallel,
        updates: Updates,
        process: Process,
        autocast: Precision,
    ) -> None:
        self._autocast = autocast
        self.pipeline = TrainPipelineSparseDist(
            sharded,
            updates,
            process.device,
            execute_all_batches=True,
            pipeline_postproc=True,
        )

    @override
    def run(self, batches: Iterator[Batch]) -> Tensor:
        with self._autocast():
            loss, _ = self.pipeline.progress(batches)
        return loss

    @override
    def pause(self) -> None:
        self.pipeline.detach()
