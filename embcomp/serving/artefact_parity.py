"""Whether a saved collection answers as the collection itself, on ids sampled over all its tables.

Most methods' serving forms answer as what was trained. Some do not: a width or a row that a budget
cuts away when the form is made. So nothing is taken on trust. The collection is compared with its
compacted form, and that with the artefact read back; only rounding to the row types asked for may
lie between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.groups import table_features
from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import ParityError

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection

_IDS = 1024  # of each feature
_LONGEST = 3  # ids of a bag
_TOLERANCE = {DataType.FP16: 2e-3}
"""What sums in another order may come to, as a share of the largest weight; 1e-5 in float32."""


@torch.no_grad()
def check_answers(
    collection: Collection, compacted: Collection, serving: nn.Module, row_types: Mapping[str, str]
) -> dict[str, float]:
    """Compare a collection, its serving form and the artefact of that.

    Args:
        collection: what is saved.
        compacted: its serving form; perhaps the same.
        serving: the artefact, read back on the CPU.
        row_types: how each physical table is stored.

    Returns:
        For each table, how far a weight of the artefact's answers is from the collection's at most.

    Raises:
        ParityError: they differ by more than the rounding of rows.
    """
    batches = sampled_batches(collection.plan, is_weighted=_is_weighted(collection))
    wanted, cut = _answers(collection, batches), None
    if compacted is not collection:
        cut = _answers(compacted, batches)
        _refuse(collection.plan, _differing(collection.plan, wanted, cut), _CUT)
    found = _answers(serving, batches)
    exact = {
        table.name
        for group in compacted.groups
        if all(row_types[t.name] == "fp32" for t in group.backend.physical_tables)
        for table in group.tables
    }
    odd = _differing(collection.plan, wanted if cut is None else cut, found)
    finite = _errors(collection.plan, found, found)
    odd = {
        name: error
        for name, error in odd.items()
        if name in exact or finite[name] != 0  # NaN is far from itself
    }
    _refuse(collection.plan, odd, _REPORT)
    return _errors(collection.plan, wanted, found)


_CUT = (
    "its serving form is another than what it answers from now, as its budget cuts rows or columns "
    "when that form is made. Nothing was written. To see what is cut and save that: "
    "embcomp.save(collection.compact(), ...)"
)
_REPORT = "nothing was written. Please report this"


def _refuse(plan: ResolvedPlan, odd: Mapping[str, float], why: str) -> None:
    if odd:
        worst = max(odd, key=lambda name: odd[name])
        more = f", and {len(odd) - 1} more tables differ" if len(odd) > 1 else ""
        raise ParityError(
            f"the artefact would not answer as the collection: a weight of table {worst!r} "
            f"({plan.methods[worst].name}) differs by {odd[worst]:.2g}{more}; {why}"
        )


def sampled_batches(plan: ResolvedPlan, *, is_weighted: bool) -> list[KeyedJaggedTensor]:
    """A batch of single ids and one of bags of up to three, of every table's whole range of ids.

    Args:
        plan: the tables.
        is_weighted: whether ids carry weights.
    """
    draw = torch.Generator().manual_seed(0)
    sizes: dict[str, int] = {}
    for table in plan.tables:
        for name in table.feature_names:
            sizes[name] = min(sizes.get(name, table.num_embeddings), table.num_embeddings)
    ids = {name: _sampled_ids(size, draw) for name, size in sizes.items()}
    batches = []
    for longest in (1, _LONGEST):
        low = 1 if longest == 1 else 0
        lengths = torch.randint(low, longest + 1, (len(ids), _IDS // longest), generator=draw)
        values = torch.cat([own[: int(n)] for own, n in zip(ids.values(), lengths.sum(dim=1))])
        weights = torch.rand(len(values), generator=draw) + 0.5 if is_weighted else None
        batches.append(
            KeyedJaggedTensor(
                keys=list(ids), values=values, lengths=lengths.flatten(), weights=weights
            )
        )
    return batches


def _sampled_ids(size: int, draw: torch.Generator) -> Tensor:
    """(1024,) ids: the first, the last, evenly spread and random ones; all, where there are few."""
    quarter = _IDS // 4
    ids = torch.cat(
        (
            torch.arange(quarter) % size,
            size - 1 - torch.arange(quarter) % size,
            torch.linspace(0, size - 1, quarter, dtype=torch.float64).long(),
            torch.randint(0, size, (quarter,), generator=draw),
        )
    )
    return ids[torch.randperm(len(ids), generator=draw)]


def _is_weighted(collection: Collection) -> bool:
    return isinstance(collection, CompressedEmbeddingBagCollection) and collection.is_weighted()


def _answers(module: nn.Module, batches: list[KeyedJaggedTensor]) -> dict[str, Tensor]:
    """By output key, all embeddings of all batches: (N, embedding_dim) float32 on the CPU."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    parts: dict[str, list[Tensor]] = {}
    with _evaluating(module):
        for batch in batches:
            found: Any = module(batch.to(device))
            answers = found.to_dict() if isinstance(found, KeyedTensor) else found
            for key, answer in answers.items():
                values = answer if isinstance(answer, Tensor) else answer.values()
                parts.setdefault(key, []).append(values.float().cpu())
    return {key: torch.cat(own) for key, own in parts.items()}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _errors(
    plan: ResolvedPlan, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, float]:
    """By table, the largest difference of a weight; NaN where one is no number."""
    errors: dict[str, Tensor] = {}
    for instance in table_features(plan.tables):
        name, own = instance.table.name, (wanted[instance.key] - found[instance.key]).abs()
        largest = own.max() if own.numel() else torch.zeros(())
        errors[name] = torch.maximum(errors.get(name, largest), largest)
    return {name: float(error) for name, error in errors.items()}


def _differing(
    plan: ResolvedPlan, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, float]:
    """The tables whose answers differ by more than rounding, and by how much."""
    errors = _errors(plan, wanted, found)
    scales = _errors(plan, wanted, {key: torch.zeros_like(own) for key, own in wanted.items()})
    allowed = {
        table.name: _TOLERANCE.get(table.data_type, 1e-5) * scales[table.name]
        for table in plan.tables
    }
    return {name: error for name, error in errors.items() if not error <= allowed[name]}
