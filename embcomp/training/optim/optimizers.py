"""What updates rows and dense parameters, and their learning rates over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embcomp.backends.stages import Stage
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.config.train_config import (
    DenseOptimizerConfig,
    PlateauConfig,
    RowOptimizerConfig,
    RunConfig,
)
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.layers.row_rmsprop import RowWiseRmspropAr, fused_type
from embcomp.planning.planner import row_collections
from embcomp.training.optim.fused_steps import RowStates, tell_step
from embcomp.training.optim.lazy_decay import fused_kernels

Parameters = Iterable[Tensor]

_ROWS_PATH = ".embedding_bags."


def _row_optimizer_kind(
    config: RowOptimizerConfig,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {}),
        "adagrad": (torch.optim.Adagrad, {"eps": config.eps}),
        "rowwise_adagrad": (RowWiseAdagrad, {"eps": config.eps}),
        "adam": (torch.optim.Adam, {"eps": config.eps, "betas": config.betas}),
    }
    if config.name == "rowwise_rmsprop_ar":
        return RowWiseRmspropAr, _rmsprop_settings(config)
    kind, options = kinds[config.name]
    return kind, {"lr": config.learning_rate, **options}


def _rmsprop_settings(config: RowOptimizerConfig) -> dict[str, Any]:
    """What FBGEMM's kernel is made with; TorchRec passes it on."""
    return {
        "optimizer": fused_type(),
        "lr": config.learning_rate,
        "eps": config.eps,
        "ar_alpha": config.ar_alpha,
        "ema_beta": config.ema_beta,
        "min_shrinkage": config.min_shrinkage,
    }


def attach_fused_optimizer(
    model: nn.Module, config: RowOptimizerConfig, device: torch.device
) -> None:
    """Ask TorchRec to update the rows of an unsharded model inside the backward pass."""
    if config.name == "adam" and device.type == "cpu":
        raise ConfigError(
            "train.row_optimizer: fused adam exists on CUDA only; on CPU use name: "
            "rowwise_adagrad, adagrad or sgd, or mode: dense, which runs torch's Adam over whole "
            "tables (small tables only)"
        )
    kind, options = _row_optimizer_kind(config)
    for _, collection in row_collections(model):
        apply_optimizer_in_backward(kind, collection.parameters(), options)


def check_packed_rows(model: nn.Module, config: RowOptimizerConfig, *, fused: bool) -> None:
    """Raise a ConfigError where rows that a method packs and updates itself are to be trained as floats are.

    Args:
        model: not sharded yet.
        config: the row optimizer.
        fused: whether rows are updated in the backward pass.
    """
    packed = [
        table.name
        for module in model.modules()
        if isinstance(module, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        for table in module.physical_tables
        if table.is_packed
    ]
    if not packed:
        return
    wrong = ""
    if not fused:
        wrong = "mode: dense or sharding: data_parallel; they need mode: fused and tables that are sharded"
    elif config.name not in ("sgd", "rowwise_adagrad"):
        wrong = f"name: {config.name}; they take sgd or rowwise_adagrad, which keep at most one number for a row"
    elif config.weight_decay:
        wrong = f"weight_decay: {config.weight_decay}, which would multiply what integers lie in; leave it 0"
    if wrong:
        raise ConfigError(
            f"train.row_optimizer: rows of {listed(packed)} are stored integers (int8, int16, alpt), but it has {wrong}"
        )


Phase = Literal["train", "search"]
"""A step on training rows, or one on search-validation rows in which the structure alone learns."""


@dataclass(frozen=True, kw_only=True)
class StructureLearner:
    """What updates the parameters of one method's own modules.

    Attributes:
        prefix: what their names begin with.
        make: makes their optimizer; None leaves them to the dense optimizer.
    """

    prefix: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer | None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class Learners:
    """What learns in a stage, and what updates the parameters of methods' own modules.

    Attributes:
        stage: the stage; by default everything learns all the time.
        structures: of the methods whose stage it is; none where no method is trained in stages.
        waiting: what the names of parameters begin with that rest, as their methods' turn is to come.
    """

    stage: Stage = field(default_factory=lambda: Stage(name="train"))
    structures: Sequence[StructureLearner] = ()
    waiting: Sequence[str] = ()


class Optimizers:
    """The optimizers of a sharded model as one, their states complete before the first step.

    Attributes:
        combined: TorchRec's view of them, for checkpoints.
        rows: row parameters that an ordinary optimizer updates; none where rows are fused.
        dense: every other parameter.
        structure: those of them that belong to the methods whose stage it is.

    Args:
        sharded: the model.
        config: the loop's settings.
        learners: what learns.
    """

    def __init__(
        self, sharded: DistributedModelParallel, config: RunConfig, learners: Learners | None = None
    ) -> None:
        learners = learners or Learners()
        named = dict(in_backward_optimizer_filter(sharded.named_parameters()))
        rows = {name: weight for name, weight in named.items() if _ROWS_PATH in name}
        dense = {name: weight for name, weight in named.items() if name not in rows}
        structures = [_named_under(each.prefix, dense) for each in learners.structures]
        structure = {name: weight for own in structures for name, weight in own.items()}
        waiting = {n: w for each in learners.waiting for n, w in _named_under(each, dense).items()}
        self.rows = list(rows.values())
        self.dense = list(dense.values())
        self.structure = list(structure.values())
        self._waiting = list(waiting.values())
        learning = {*dense} - structure.keys() - waiting.keys()
        self._network = [weight for name, weight in dense.items() if name in learning]
        self._stage = learners.stage
        self._config = config
        fused = RowStates(sharded.fused_optimizer)
        self._kernels = list(fused_kernels(sharded))
        self._steps_before = 0
        self._row_optimizers: list[KeyedOptimizer] = [fused]
        parts: list[tuple[str, KeyedOptimizer]] = [("fused", fused)]
        if rows and self._stage.rows:
            kind, options = _row_optimizer_kind(config.row_optimizer)
            self._row_optimizers.append(KeyedOptimizerWrapper(rows, lambda p: kind(p, **options)))
            parts.append(("rows", self._row_optimizers[-1]))
        self._structure_optimizers: list[tuple[KeyedOptimizer, list[float]]] = []
        for each, own in zip(learners.structures, structures):
            made = each.make(list(own.values())) if own else None
            if made is None:
                continue
            optimizer = KeyedOptimizerWrapper(own, lambda _, made=made: made)
            rates = [group["lr"] for group in made.param_groups]
            self._structure_optimizers.append((optimizer, rates))
            parts.append(("structure", optimizer))
            dense = {name: weight for name, weight in dense.items() if name not in own}
        # What never learns has no optimizer: its state would never exist, and checkpoints need it.
        at_rest = {id(weight) for weight in self._never_learning()}
        dense = {name: weight for name, weight in dense.items() if id(weight) not in at_rest}
        self._dense_optimizer: KeyedOptimizer | None = None
        if dense:
            self._dense_optimizer = KeyedOptimizerWrapper(
                dense, lambda p: _dense_optimizer(p, config.dense_optimizer)
            )
            parts.append(("dense", self._dense_optimizer))
        for _, optimizer in parts:
            if isinstance(optimizer, KeyedOptimizerWrapper):
                _fill_state(optimizer)
        self.combined = CombinedOptimizer(parts)

    def start_step(self, step: int, reductions: int, phase: Phase = "train") -> float:
        """Clear gradients and set the learning rates; fused kernels take theirs here.

        Args:
            step: number of the step, from 0.
            reductions: how often the plateau rule has reduced the learning rates.
            phase: what kind of step it is.

        Returns:
            The rows' learning rate.
        """
        config = self._config
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        warmup *= self._stage.learning_rate
        row_rate = warmup * reduced(config.row_optimizer.learning_rate, reductions, config.plateau)
        dense_rate = warmup * reduced(
            config.dense_optimizer.learning_rate, reductions, config.plateau
        )
        for optimizer in self._row_optimizers:
            _set_learning_rate(optimizer, row_rate)
        if phase == "train" and self._stage.rows:
            self._decay_whole_tables(row_rate)
        if self._dense_optimizer is not None:
            _set_learning_rate(self._dense_optimizer, dense_rate)
        factor = config.plateau.factor**reductions if config.plateau else 1.0
        for optimizer, rates in self._structure_optimizers:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        self.combined.zero_grad()
        tell_step(self._kernels, self._steps_before + step)
        return row_rate

    def finish_step(self, phase: Phase = "train") -> None:
        """Regularises, clips and updates everything that was not updated in the backward pass."""
        rows, clip = self._config.row_optimizer, self._config.clip_norm
        resting = self._resting(phase)
        for weight in resting:
            weight.grad = None
        if rows.l2:
            for weight in self.rows:  # the gradient of 0.5 * l2 * ||E||^2, on every row
                if weight.grad is not None:
                    weight.grad.add_(weight.detach(), alpha=rows.l2)
        if clip is not None:
            clipped = self.dense + self.rows if rows.mode == "dense" else self.dense
            torch.nn.utils.clip_grad_norm_(clipped, clip)
        self.combined.step()

    def row_states(self) -> list[dict[str, Any]]:
        """What the optimizer of each of `rows` keeps, and its learning rate as `lr`."""
        optimizer = self._row_optimizers[-1]
        rate = optimizer.param_groups[0]["lr"]
        return [{"lr": rate, **optimizer.state[weight]} for weight in self.rows]

    def _never_learning(self) -> list[nn.Parameter]:
        """Dense parameters that rest in every step of the stage."""
        stage = self._stage
        resting = [*self._waiting, *([] if stage.network else self._network)]
        if not (stage.structure or stage.alternate):
            resting += self.structure
        return resting

    def _resting(self, phase: Phase) -> list[Tensor]:
        """Parameters that do not learn in a step, though a gradient reaches them."""
        stage = self._stage
        if phase == "search":
            return [*self.rows, *self._network, *self._waiting]
        resting: list[Tensor] = [*self._waiting, *([] if stage.rows else self.rows)]
        if not stage.network:
            resting += self._network
        if stage.alternate or not stage.structure:
            resting += self.structure
        return resting

    @torch.no_grad()
    def _decay_whole_tables(self, learning_rate: float) -> None:
        """Decoupled decay of rows that are not fused; `LazyDecay` does it for those that are."""
        for weight in self.rows:
            weight.mul_(1 - learning_rate * self._config.row_optimizer.weight_decay)

    def begin_after(self, steps: int) -> None:
        """Says how many steps an earlier run made, from whose optimizers' states this one goes on."""
        self._steps_before = steps


def _named_under(prefix: str, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in weights.items() if name.startswith(prefix)}


_AT_REST = ("lr", "weight_decay")  # without them a step on zero gradients moves no parameter


def _fill_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Make the state that torch's optimizers make in their first step, as of no step.

    A checkpoint may be made before any step, and one that lacks a state cannot be gone on from.
    """
    groups = list(optimizer.param_groups)
    kept = [{key: group[key] for key in _AT_REST if key in group} for group in groups]
    for group, settings in zip(groups, kept):
        group.update(dict.fromkeys(settings, 0.0))
    optimizer.init_state()
    for group, settings in zip(groups, kept):
        group.update(settings)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
    for weight in optimizer.params.values():
        weight.grad = None


def reduced(rate: float, reductions: int, plateau: PlateauConfig | None) -> float:
    """A learning rate after so many reductions; never below the floor unless it began there."""
    if plateau is None or not reductions:
        return rate
    for _ in range(reductions):
        rate = max(rate * plateau.factor, min(plateau.min_learning_rate, rate))
    return rate


def _set_learning_rate(optimizer: KeyedOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _dense_optimizer(parameters: Parameters, config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    match config.name:
        case "adam":
            return torch.optim.Adam(
                parameters, lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay
            )
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate, eps=config.eps, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=rate, momentum=config.momentum, weight_decay=decay
            )
