"""Methods that learn their structure, in memory: a loop, a search context and whole lives, in seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.optim import RowWiseAdagrad

from embcomp import CompressedEmbeddingBagCollection
from embcomp.backends.base import BackendConfig, MethodState, StageInputs
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import ResolvedPlan
from embcomp.layers.block_work import IN_MEMORY
from embcomp.tables.specs import TableSpec, specs_from_configs
from embcomp.testing.planted import Planted
from embcomp.training.reporting import metrics

TRAIN, SEARCH, TEST = slice(0, 11_000), slice(11_000, 13_000), slice(13_000, 15_000)
"""Rows of planted data."""


def shuffled(planted: Planted, seed: int = 0) -> Planted:
    """The same with ids that are not ranked by frequency."""
    random = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(each), generator=random) for each in planted.useful]
    ids = torch.stack([own[planted.ids[:, n]] for n, own in enumerate(order)], dim=1)
    return Planted(ids=ids, labels=planted.labels, useful=planted.useful)


class Clicks(nn.Module):
    """Tables, a weight for each column, and the interaction of two features that was planted."""

    def __init__(self, planted: Planted, config: BackendConfig, dim: int) -> None:
        super().__init__()
        configs = [table.bag() for table in planted.tables(dim)]
        specs = specs_from_configs(configs)
        plan = ResolvedPlan(tuple(specs), dict.fromkeys((s.name for s in specs), config))
        self.tables = CompressedEmbeddingBagCollection(configs, plan)
        self.linear = nn.Linear(len(specs) * dim, 1)
        self.dim = dim
        self.interacts = planted.rank > 0

    @property
    def specs(self) -> list[TableSpec]:
        return list(self.tables.plan.tables)

    @property
    def form(self) -> MethodState:
        (each,) = self.tables.states()
        return MethodState(
            config=each.form.config,
            tensors={name: tensor.clone() for name, tensor in each.form.tensors.items()},
        )

    def load(self, form: MethodState) -> None:
        self.tables.load_states([GroupState(tables=self.specs, form=form)])

    def forward(self, features) -> Tensor:
        columns = self.tables(features).values()
        scores = self.linear(columns).squeeze(1)
        if not self.interacts:
            return scores
        product = columns[:, : self.dim] * columns[:, self.dim : 2 * self.dim]
        return scores + 10 * product.sum(1)


def fit(
    model: Clicks,
    planted: Planted,
    *,
    epochs: int,
    rows: slice = TRAIN,
    rate: float = 0.1,
    decay: float = 0.0,
    structure_rate: float = 0.1,
    structure: Literal["sgd", "adam"] = "sgd",
    plans: bool = False,
) -> None:
    """Train as `embcomp train` does, with whole rows decayed in each step."""
    inside = dict(model.tables.named_parameters())
    tables = [weight for name, weight in inside.items() if "embedding_bags" in name]
    others = [weight for name, weight in inside.items() if "embedding_bags" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        RowWiseAdagrad(tables, lr=rate),
        torch.optim.Adam(model.linear.parameters(), lr=0.01),
    ]
    if others:
        kind = torch.optim.Adam if structure == "adam" else torch.optim.SGD
        optimizers.append(kind(others, lr=structure_rate))
    random = torch.Generator().manual_seed(0)
    model.train()
    if plans:
        model.tables.plan_steps(epochs * -(-(rows.stop - rows.start) // 250))
    for _ in range(epochs):
        order = torch.arange(len(planted.labels))[rows]
        for batch in order[torch.randperm(len(order), generator=random)].split(250):
            with torch.no_grad():
                for weight in tables:
                    weight.mul_(1 - rate * decay)
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(planted.features(batch)), planted.labels[batch]
            )
            penalty = model.tables.penalty()
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss if penalty is None else loss + penalty).backward()
            for optimizer in optimizers:
                optimizer.step()


@torch.no_grad()
def auc(model: Clicks, planted: Planted, rows: slice = TEST) -> float:
    """Area under the ROC curve of some rows."""
    scores = model.eval()(planted.features(rows))
    return metrics.auc(scores.double().numpy(), planted.labels[rows].bool().numpy())


class Memory:
    """A search context over a model in memory."""

    def __init__(self, model: Clicks, planted: Planted) -> None:
        self.model, self.planted = model, planted
        self.form, self.work = model.form, IN_MEMORY
        (self.combine,) = model.tables.combine.get_submodule("combines").children()
        self.counts = planted.counts(TRAIN)
        self.seed = 1
        self.progress: dict[str, Any] | None = None
        self.said: list[str] = []

    def shared(self, name, make):
        return make()

    def evaluate(self, rows: int | None = None) -> float:
        part = slice(SEARCH.start, min(SEARCH.stop, SEARCH.start + (rows or 10**9)))
        return auc(self.model, self.planted, part)

    def load(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.progress)

    def save(self, progress: Mapping[str, Any]) -> None:
        self.progress = copy.deepcopy(dict(progress))

    def say(self, text: str) -> None:
        self.said.append(text)


def begin(
    method: BackendConfig, before: Clicks, planted: Planted, initial: MethodState, found
) -> Clicks:
    """The model in which a method's last stage begins."""
    last = method.stages()[-1]
    past = StageInputs(
        before=before.form,
        initial=lambda: initial,
        counts=planted.counts(TRAIN),
        results={"search": found},
    )
    form = method.start_stage(last, before.specs, past)
    model = Clicks(planted, form.config, before.dim)
    model.load(form)
    model.linear.load_state_dict(before.linear.state_dict())
    return model


def prune_and_train(
    planted: Planted,
    method: BackendConfig,
    dim: int,
    *,
    epochs: tuple[int, int],
    rates: tuple[float, float] = (0.1, 0.1),
) -> Clicks:
    """The life of a method of two stages that prunes elements: the model that is left.

    Args:
        planted: data.
        method: `pep` or `deeplight`.
        dim: columns.
        epochs: of the two stages.
        rates: of their rows.
    """
    torch.manual_seed(0)
    model = Clicks(planted, method, dim)
    initial, network = model.form, copy.deepcopy(model.linear.state_dict())
    fit(model, planted, epochs=epochs[0], rate=rates[0], structure_rate=1.0, plans=True)
    last = method.stages()[-1]
    past = StageInputs(before=model.form, initial=lambda: initial, counts=planted.counts(TRAIN))
    form = method.start_stage(last, model.specs, past)
    after = Clicks(planted, form.config, dim)
    after.load(form)
    after.linear.load_state_dict(network if last.reinit_network else model.linear.state_dict())
    fit(after, planted, epochs=epochs[1], rate=rates[1])
    return after
