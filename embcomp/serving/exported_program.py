"""`program.pt2`: a serving module as a torch.export program, which runs where only torch is.

A program has no KeyedJaggedTensor at its border. It takes ids as a rectangle, `ids (B, F) int64`,
or with bags `ids (B, F, L)` and `lengths (B, F)`, where ids beyond a bag's length are ignored.
Every id is looked up by itself and bags are pooled at the end, so that one shape serves each
method: a bag of a linear method costs more here than in FBGEMM's kernel, which sums it on the way.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embcomp.collection.groups import table_features
from embcomp.errors import ArtefactError
from embcomp.serving.artefact_config import PROGRAM_FILE, ArtefactConfig, ProgramRecord
from embcomp.serving.id_lookup import SingleIds
from embcomp.serving.modules import ServingEmbeddingBagCollection, ServingModel


@dataclass(frozen=True)
class Rectangle:
    """A batch without raggedness.

    Args:
        ids: (B, F, L) int64, 0 where a bag is shorter.
        filled: (B, F, L) bool, where there is an id; None when L is 1 and every bag has one.
    """

    ids: Tensor
    filled: Tensor | None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], *, bags: bool) -> Rectangle:
        """The batch that a program is given: `ids` (B, F), or (B, F, L) and `lengths` (B, F) with bags."""
        ids = inputs["ids"]
        if not bags:
            return cls(ids.unsqueeze(2), None)
        slots = torch.arange(ids.shape[2], device=ids.device)
        filled = slots < inputs["lengths"].unsqueeze(2)
        return cls(torch.where(filled, ids, 0), filled)


class RectangleTables(nn.Module):
    """A serving collection for rectangles: the same route, rows and combine, nothing ragged.

    Args:
        serving: a pooled collection that was loaded with `rows="torch"`.
        feature_names: the features in the rectangle's order.
    """

    def __init__(self, serving: ServingEmbeddingBagCollection, feature_names: list[str]) -> None:
        super().__init__()
        if serving.is_weighted():
            raise ArtefactError("weighted tables have no program; serve them with embcomp.load")
        self.single = SingleIds(serving)
        self._groups = serving.groups
        self._sources = [
            [feature_names.index(i.feature) for i in group.instances] for group in self._groups
        ]
        came = [instance for group in self._groups for instance in group.instances]
        wanted = table_features(serving.plan.tables)
        self.keys = [instance.key for instance in wanted]
        self.dims = [instance.table.embedding_dim for instance in wanted]
        self._order = [[i.key for i in came].index(key) for key in self.keys]
        self._came = came

    def forward(self, batch: Rectangle) -> KeyedTensor:
        """Look up and pool: (B, sum of embedding_dims), keys as the collection has them."""
        parts: list[Tensor] = []
        for index, group in enumerate(self._groups):
            values = self.embeddings(index, batch)
            parts += values.split([i.table.embedding_dim for i in group.instances], dim=1)
        if batch.filled is not None:
            parts = self._pooled(parts, batch.filled)
        values = torch.cat([parts[n] for n in self._order], dim=1)
        return KeyedTensor(keys=self.keys, length_per_key=self.dims, values=values)

    def embeddings(self, index: int, batch: Rectangle) -> Tensor:
        """What a method answers for every id: (B * L, sum of its embedding_dims)."""
        return self.single(index, self.ids_of(index, batch))

    def ids_of(self, index: int, batch: Rectangle) -> Tensor:
        """The ids that a method looks up: (its features, B * L)."""
        ids = batch.ids[:, self._sources[index]]  # (B, features, L)
        return ids.permute(1, 0, 2).flatten(1)

    def _pooled(self, parts: list[Tensor], filled: Tensor) -> list[Tensor]:
        batch, _, length = filled.shape
        pooled = []
        for part, instance, source in zip(parts, self._came, self._flat_sources()):
            mask = filled[:, source].unsqueeze(2)  # (B, L, 1)
            total = torch.where(mask, part.view(batch, length, -1), 0.0).sum(dim=1)
            if instance.table.mean_pooling:
                total = total / mask.sum(dim=1).clamp(min=1)
            pooled.append(total)
        return pooled

    def _flat_sources(self) -> list[int]:
        return [source for group in self._sources for source in group]


class Program(nn.Module):
    """What is exported: a model, or a collection alone, behind plain tensors.

    Args:
        serving: a ServingModel or ServingEmbeddingBagCollection, loaded with `rows="torch"`.
        bags: whether features may have several ids, or none.
    """

    def __init__(self, serving: nn.Module, *, bags: bool) -> None:
        super().__init__()
        self.bags = bags
        self.num_dense = 0
        self.network: nn.Module | None = None
        if isinstance(serving, ServingModel):
            self.feature_names = list(serving.feature_names)
            self.num_dense = serving.num_dense
            self.network = _with_rectangles(serving)
        elif isinstance(serving, ServingEmbeddingBagCollection):
            self.feature_names = serving.feature_names
            self.tables = RectangleTables(serving, self.feature_names)
        else:
            raise ArtefactError(
                f"a {type(serving).__name__} has no program; export a model or pooled tables"
            )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Look up, or score.

        Args:
            inputs: `ids` (B, F) or (B, F, L), `lengths` (B, F) with bags, `dense` (B, I)
                where the model has numeric features.

        Returns:
            `logits` (B,), or (B, embedding_dim) for each key of a collection.
        """
        ids = inputs["ids"]
        batch = Rectangle.of(inputs, bags=self.bags)
        if self.network is None:
            return self.tables(batch).to_dict()
        dense = inputs["dense"] if self.num_dense else torch.zeros(ids.shape[0], 0)
        return {"logits": self.network(dense, batch)}

    def example(self, rows: int = 3, length: int = 2) -> dict[str, Tensor]:
        """Inputs of the right shapes."""
        shape = (rows, len(self.feature_names))
        inputs = {"ids": torch.zeros((*shape, length) if self.bags else shape, dtype=torch.int64)}
        if self.bags:
            inputs["lengths"] = torch.ones(shape, dtype=torch.int64)
        if self.num_dense:
            inputs["dense"] = torch.zeros(rows, self.num_dense)
        return inputs

    def record(self) -> ProgramRecord:
        """Inputs and outputs for people."""
        names = ", ".join(self.feature_names)
        inputs = {
            "ids": f"(B, {len(self.feature_names)}{', L' if self.bags else ''}) int64: {names}"
        }
        if self.bags:
            inputs["lengths"] = f"(B, {len(self.feature_names)}) int64: ids that count"
        if self.num_dense:
            inputs["dense"] = f"(B, {self.num_dense}) float32"
        if self.network is not None:
            return ProgramRecord(inputs=inputs, outputs={"logits": "(B,) float32"})
        outputs = {
            key: f"(B, {dim}) float32" for key, dim in zip(self.tables.keys, self.tables.dims)
        }
        return ProgramRecord(inputs=inputs, outputs=outputs)


def _with_rectangles(serving: ServingModel) -> nn.Module:
    """The model's network around rectangle tables; the serving model keeps its own."""
    network = copy.copy(serving.network)
    network._modules = dict(network._modules)
    for name, child in serving.network.named_children():
        if isinstance(child, ServingEmbeddingBagCollection):
            network.add_module(name, RectangleTables(child, serving.feature_names))
    return network


def export_program(program: Program) -> torch.export.ExportedProgram:
    """Trace a program; the batch size, and the length of bags, stay open.

    Raises:
        ArtefactError: a method's operations cannot be traced, or are not torch's own.
    """
    example = program.example()
    return export_module(program, (example,), (open_sizes(example),))


def open_sizes(example: Mapping[str, Tensor]) -> dict[str, Any]:
    """For each input of a program, which of its sizes stay open."""
    sizes: dict[str, Any] = {name: {0: torch.export.Dim.DYNAMIC} for name in example}
    if "ids" in example and example["ids"].dim() == 3:
        sizes["ids"][2] = torch.export.Dim.DYNAMIC
    return sizes


def export_module(
    module: nn.Module, example: tuple[Any, ...], sizes: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Trace a module.

    Args:
        module: the module.
        example: its arguments.
        sizes: for each tensor in them, which of its sizes stay open.

    Raises:
        ArtefactError: a method's operations cannot be traced, or are not torch's own.
    """
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=sizes, strict=False)
    foreign = {
        str(node.target)
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
    }
    if foreign:
        raise ArtefactError(f"the program would need more than torch: {', '.join(sorted(foreign))}")
    return exported


def write_program(program: Program, folder: Path, config: ArtefactConfig) -> ArtefactConfig:
    """Write `program.pt2` into an artefact's folder; its description also goes inside.

    Returns:
        The description with the program's inputs and outputs.
    """
    described = config.model_copy(update={"program": program.record()})
    exported = export_program(program)
    exported.example_inputs = None  # it would be pickled
    inside = {"embcomp.json": json.dumps(described.model_dump(mode="json"))}
    packed = io.BytesIO()  # on a disk that is full, torch's own writer ends the process
    torch.export.save(exported, packed, extra_files=inside)
    (folder / PROGRAM_FILE).write_bytes(packed.getbuffer())
    return described


def program_inputs(program: Program, dense: Tensor, sparse: KeyedJaggedTensor) -> dict[str, Tensor]:
    """A batch as a program takes it.

    Args:
        program: which features it takes, and whether bags.
        dense: (B, I) values.
        sparse: the ids; bags of exactly one where the program takes no bags.
    """
    bags = sparse.to_dict()
    batch = sparse.stride()
    picked = [bags[name] for name in program.feature_names]
    if not program.bags:
        inputs = {"ids": torch.stack([jagged.values().long() for jagged in picked], dim=1)}
    else:
        lengths = torch.stack([jagged.lengths().long() for jagged in picked], dim=1)
        longest = max(1, int(lengths.max()))
        ids = torch.zeros(batch, len(picked), longest, dtype=torch.int64)
        slots = torch.arange(longest)
        for n, jagged in enumerate(picked):
            ids[:, n][slots < lengths[:, n : n + 1]] = jagged.values().long()
        inputs = {"ids": ids, "lengths": lengths}
    if program.num_dense:
        inputs["dense"] = dense
    return inputs
