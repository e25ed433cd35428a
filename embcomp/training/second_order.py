"""Search steps whose gradient looks through the rows' step before them.

Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.3. A structure's
effect on the loss of search rows has two parts: what it does to the weights as they are, and what it
did to them through the step on training rows. For a step `w' = w - s(g)` with `g` the gradient of
the training loss, the second is minus the derivative, by the structure, of `<g, u>`, where `u` is
the search loss's gradient at `w'` taken back through `s`; it is a difference of two gradients on
the training batch, at `w + e u` and `w - e u`.

DARTS unrolls a step of plain SGD, throws it away and makes it again after the structure's. Here the
step that was made is the one that is looked through, by whatever optimizer made it, so that nothing is
computed twice. Rows alone are unrolled, and only by an optimizer over whole tables, as fused kernels
keep no gradients; every rank then holds all rows and, averaged, the same gradients of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from typing_extensions import override

from embcomp.config.train_config import RowOptimizerConfig, TrainConfig
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.errors import ConfigError
from embcomp.training.build import loss_of
from embcomp.training.distributed.process import Process
from embcomp.training.optim.optimizers import Optimizers
from embcomp.training.optim.precision import Precision
from embcomp.training.steps import PlainSteps, Updates

_REACH = 1e-2  # the largest move of a weight in a difference, as a share of the largest weight


def check_unrolled(method: str, config: TrainConfig) -> None:
    """Raise before training when the rows' steps cannot be looked through.

    Args:
        method: the method that asks for it.
        config: the run.
    """
    if config.train.row_optimizer.mode == "fused" and config.train.sharding != "data_parallel":
        raise ConfigError(
            f"{method}: second_order looks through the rows' training steps, and fused row "
            "optimizers keep no gradients of them; set train.row_optimizer.mode: dense (small "
            "tables only) or second_order: false"
        )
    if config.train.clip_norm is not None:
        raise ConfigError(
            f"{method}: second_order does not look through clipped steps; leave train.clip_norm "
            "out or set second_order: false"
        )


class UnrolledSteps(PlainSteps):
    """Steps on training and search rows in turn.

    Args:
        sharded: the model.
        updates: what surrounds a step.
        process: the process group.
        autocast: makes a new context of mixed precision.
        optimizers: the model's optimizers.
        config: what updates the rows.
    """

    def __init__(
        self,
        sharded: DistributedModelParallel,
        updates: Updates,
        process: Process,
        autocast: Precision,
        optimizers: Optimizers,
        config: RowOptimizerConfig,
    ) -> None:
        super().__init__(sharded, updates, process, autocast)
        self._optimizers, self._config = optimizers, config

    @override
    def run(self, batches: Iterator[Batch]) -> Tensor:
        batch = next(batches).to(self._process.device, non_blocking=True)
        self._updates.zero_grad()
        if self._updates.phase == "search":
            loss = self._backward(batch)
            self._look_through()
            self._updates.step()
            return loss
        self._batch, self._scale = batch, loss_of(self._sharded).scale
        self._random = _RandomNumbers(self._process.device)
        self._before = [weight.detach().clone() for weight in self._optimizers.rows]
        loss = self._backward(batch)
        self._updates.step()
        self._gradients = [_gradient(weight).clone() for weight in self._optimizers.rows]
        return loss

    @torch.no_grad()
    def _look_through(self) -> None:
        """Add to the structure's gradients what came through the training step."""
        rows, structure = self._optimizers.rows, self._optimizers.structure
        states = self._optimizers.row_states()
        moves = [
            through_step(self._config, state, gradient, _gradient(weight))
            for weight, state, gradient in zip(rows, states, self._gradients)
        ]
        farthest, largest = _largest(moves), _largest(self._before)
        if farthest == 0:
            return
        reach = _REACH * (largest or 1.0) / farthest
        direct = [_gradient(weight).clone() for weight in structure]
        after = [weight.detach().clone() for weight in rows]
        sides = [self._gradients_at(moves, side * reach) for side in (1, -1)]
        for weight, value in zip(rows, after):
            weight.copy_(value)
        for weight, own, above, below in zip(structure, direct, *sides):
            weight.grad = own - (above - below) / (2 * reach)

    def _gradients_at(self, moves: list[Tensor], reach: float) -> list[Tensor]:
        """The structure's gradients on the training batch, beside where its step began."""
        for weight, before, move in zip(self._optimizers.rows, self._before, moves):
            weight.copy_(before.add(move, alpha=reach))
        self._optimizers.combined.zero_grad()
        loss = loss_of(self._sharded)
        scale, loss.scale = loss.scale, self._scale
        with torch.enable_grad(), self._random.again():
            self._sharded(self._batch)[0].backward()  # never in mixed precision: a small difference
        loss.scale = scale
        return [_gradient(weight).clone() for weight in self._optimizers.structure]


def through_step(
    config: RowOptimizerConfig,
    state: Mapping[str, Any],
    gradient: Tensor,
    vector: Tensor,
) -> Tensor:
    """A vector times the derivative of a row optimizer's step by its gradient.

    Args:
        config: the optimizer.
        state: what it knows of the weight after the step, and its learning rate as `lr`.
        gradient: of the step, in the shape of the weight.
        vector: in the same shape.

    Returns:
        In the same shape; 0 where the gradient is, as in rows that were not looked up.
    """
    match config.name:
        case "sgd":
            found = vector
        case "adagrad" | "rowwise_adagrad":
            root = state["sum"].sqrt()
            product = gradient * vector
            if config.name == "rowwise_adagrad":
                product = product.mean(dim=1, keepdim=True)
            slope = gradient * product / (root * (root + config.eps) ** 2)
            found = vector / (root + config.eps) - slope
        case "adam":
            first, second = config.betas
            steps = float(state["step"])
            whole, square = 1 - first**steps, 1 - second**steps
            root = (state["exp_avg_sq"] / square).sqrt()
            slope = state["exp_avg"] / whole * (1 - second) / square * gradient
            slope /= root * (root + config.eps) ** 2
            found = vector * ((1 - first) / whole / (root + config.eps) - slope)
    moved = torch.where(gradient == 0, 0.0, found)
    return moved * float(state["lr"])


class _RandomNumbers:
    """Random numbers as they are drawn from now on, to be drawn again: dropout must not differ."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw them within the context, after which others go on where they were."""
        with torch.random.fork_rng([self._device] if self._cuda is not None else []):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()


def _largest(tensors: list[Tensor]) -> float:
    """The largest absolute value."""
    return max((float(tensor.abs().amax()) for tensor in tensors if tensor.numel()), default=0.0)
