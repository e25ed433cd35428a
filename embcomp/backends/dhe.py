"""Deep hash embeddings: no table at all, but many hashes of an id, which a small network turns into its embedding.

Kang, Cheng, Yao, Yi, Chen, Hong, Chi, "Learning to Embed Categorical Features without Embedding Tables for
Recommendation", KDD 2021, https://arxiv.org/abs/2010.10784. An id is encoded by `num_hashes` hashes, each a
number in [-1, 1], and a network of each table (`num_layers` hidden layers of `hidden_dim` units) decodes it. All
ids share all weights, no two ids have the same code, and any id has an embedding.

Where we depart from the paper and public code:

- hidden units are rectified, less the mean and over the deviation that this has for a normal input, where the
  paper normalises batches and takes Mish: batch statistics differ with the ids that come twice and with the
  rows that a rank has. So layers keep the scale of their inputs from the start, and another library's measurements
  found rectified units no worse;
- unless it is said, there are as many hashes as hidden units, at least 32 and at most the paper's 1,024: with small
  networks the first layer would take all bytes. Two hidden layers rather than five;
- hashes are salted SplitMix64 (public code on GPUs overflows 32 bits);
- the network sees each id of a batch once, on a CPU;
- the last layer's bias is a physical table of one row, which is what TorchRec holds; all other weights are small dense
  parameters, billed as such, on every rank, trained by the network's optimizer.

What ids make is not a sum of rows, so that ids are decoded one by one before bags are pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi, sqrt
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend
from embcomp.backends.hashed_rows import HashedRows
from embcomp.io.constraints import Ge, Le
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.host_values import reads_wait
from embcomp.layers.joined_matrices import JoinsTables, StackedParameters
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import part_name
from embcomp.layers.routing import renamed
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

_LEAST_HASHES, _MOST_HASHES = 32, 1024
_LEVELS = 1 << 24  # of a hash: as many as float32 tells apart
_WIDEST = 1 << 16
_MOST_INPUTS = 1 << 25  # hashes of all tables that are held at once, 8 bytes each
# Of a rectified standard normal number.
_RECTIFIED_MEAN = 1 / sqrt(2 * pi)
_RECTIFIED_STD = sqrt(0.5 - 0.5 / pi)


@dataclass(frozen=True, kw_only=True)
class DHE(HashedRows):
    """Embeddings computed from hashes. Any id has one.

    Args:
        hidden_dim: units of a hidden layer. A table that such a network does not shrink stays full.
        num_layers: hidden layers.
        num_hashes: of an id; None for as many as hidden units, at least 32 and at most 1,024.
        seed: salts the hashes.
    """

    hidden_dim: Annotated[int | None, Ge(1), Le(_WIDEST)] = None
    num_layers: Annotated[int, Ge(1), Le(16)] = 2
    num_hashes: Annotated[int | None, Ge(1), Le(_WIDEST)] = None
    seed: int = 2021

    name: ClassVar[str] = "dhe"
    hashes_small: ClassVar[bool] = False
    size_fields: ClassVar[tuple[str, ...]] = ("hidden_dim",)

    def layer_widths(self, table: TableSpec) -> list[int]:
        """Widths from the hashes to the embedding."""
        hidden = self.hidden_dim or 1
        hashes = self.num_hashes or min(max(hidden, _LEAST_HASHES), _MOST_HASHES)
        return [hashes, *[hidden] * self.num_layers, table.embedding_dim]

    def _network_bytes(self, table: TableSpec) -> int:
        widths = self.layer_widths(table)
        return 4 * (sum(came * made for came, made in pairwise(widths)) + sum(widths[1:-1]))

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        bias = table.embedding_dim * table.itemsize
        return self._network_bytes(table) + bias >= table.full_bytes

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=f"{table.name}__bias",
                num_embeddings=1,
                embedding_dim=table.embedding_dim,
                lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
                init_fn=UniformInit(0.0, 0.0),
                data_type=table.data_type,
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        networks = {
            table.name: HashNetwork(
                table.name, self.layer_widths(table), std=table.init_std, seed=self.seed
            )
            for table in tables
        }
        owners = [table for table in tables for _ in table.feature_names]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=OneRowRoute(keys),
            combine=DecodedHashes(
                networks, [(table.name, table.embedding_dim) for table in owners]
            ),
            needs_unpooled_rows=True,
            needs_context=True,
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.network",
                    role="projection",
                    rows=self._network_bytes(table) // 4,
                    columns=1,
                    itemsize=4,
                    train_columns=1,
                    lookup=False,
                )
                for table in tables
            )
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(hidden: int) -> bool:
            return self.with_size(hidden_dim=hidden).footprint(tables).serve_bytes <= budget

        hidden = largest_int(fits, 1, _WIDEST)
        return None if hidden is None else self.with_size(hidden_dim=hidden)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(hidden_dim=1)


class OneRowRoute(nn.Module):
    """Sends every id to the only row that there is.

    Args:
        keys: names of the look-ups.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__()
        self._keys = list(keys)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return renamed(features, self._keys, torch.zeros_like(features.values()))


class DecodedHashes(JoinsTables):
    """Adds to the row that comes what the network of its table makes of the id.

    Args:
        networks: by table.
        pairs: for each (table, feature), the table and its width.
    """

    def __init__(self, networks: dict[str, HashNetwork], pairs: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self._pairs = list(pairs)
        self.networks = nn.ModuleDict(
            {part_name("table", name): network for name, network in networks.items()}
        )
        owners = [name for name, _ in pairs]
        count = len(owners) // len(networks)
        alike = owners == [name for name in networks for _ in range(count)]
        is_one_shape = len({dim for _, dim in pairs}) == 1
        self._joined = JoinedNetworks() if alike and is_one_shape else None

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        # (R, sum of dims) -> (R, sum of dims)
        if self._joined is not None and self.joins(rows):
            return rows + self._joined(self._own(), looked_up.ids()).to(rows.dtype)
        parts = rows.split([dim for _, dim in self._pairs], dim=1)
        return torch.cat(self._decoded(parts, looked_up.ids().unbind(1)), dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return self._decoded(parts, looked_up.each_ids())

    def _own(self) -> list[HashNetwork]:
        return [own for own in self.networks.values() if isinstance(own, HashNetwork)]

    def _decoded(self, parts: Sequence[Tensor], ids: Sequence[Tensor]) -> list[Tensor]:
        return [
            part + self.networks[part_name("table", name)](own).to(part.dtype)
            for part, own, (name, _) in zip(parts, ids, self._pairs)
        ]


class HashNetwork(nn.Module):
    """Hashes of an id, and the layers that make an embedding of them.

    Args:
        table: whose name salts the hashes.
        widths: of the layers, from the hashes to the embedding.
        std: deviation of fresh embeddings.
        seed: salts the hashes.
    """

    def __init__(self, table: str, widths: Sequence[int], *, std: float, seed: int) -> None:
        super().__init__()
        self._std = std
        self.salts = Constant([table_salt(seed, table, place) for place in range(widths[0])])
        self._layers = len(widths) - 1
        for n, (came, made) in enumerate(pairwise(widths)):
            self.register_parameter(f"weight_{n}", nn.Parameter(torch.empty(came, made)))
            if n < self._layers - 1:
                self.register_parameter(f"bias_{n}", nn.Parameter(torch.empty(made)))
        self.reset_parameters()

    def weights(self) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
        """Each layer's matrix, and its vector where it has one."""
        own = dict(self.named_parameters())
        for n in range(self._layers):
            yield own[f"weight_{n}"], own.get(f"bias_{n}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Layers that keep the scale of standard inputs, the last one that of fresh embeddings."""
        for n, (weight, bias) in enumerate(self.weights()):
            if weight.is_meta:
                return
            last = n == self._layers - 1
            weight.normal_()
            weight.mul_((self._std if last else 1.0) / weight.norm(dim=0))
            if bias is not None:
                bias.zero_()

    @override
    def forward(self, ids: Tensor) -> Tensor:  # (N,) int64 -> (N, embedding_dim)
        if reads_wait(ids.device):  # how many are distinct is a value
            return self._decoded(ids)
        distinct, places = ids.unique(return_inverse=True)
        return self._decoded(distinct).index_select(0, places)

    def _decoded(self, ids: Tensor) -> Tensor:
        found = self._encoded(ids)
        for n, (weight, bias) in enumerate(self.weights()):
            if n:
                found = (found.relu() - _RECTIFIED_MEAN) / _RECTIFIED_STD
            found = found @ weight if bias is None else torch.addmm(bias, found, weight)
        return found

    def _encoded(self, ids: Tensor) -> Tensor:
        return encoded(ids.unsqueeze(1), self.salts.on(ids.device))


def encoded(ids: Tensor, salts: Tensor) -> Tensor:
    """Hashes of ids as inputs: float32 of the shape that both broadcast to, of mean 0 and deviation 1."""
    hashes = hash_rows(ids, salts, _LEVELS)
    return (hashes.float() + 0.5) * (2 * sqrt(3) / _LEVELS) - sqrt(3)


class JoinedNetworks:
    """Networks of one shape, evaluated together."""

    def __init__(self) -> None:
        self._stacks: dict[int, tuple[StackedParameters, StackedParameters]] = {}

    def __call__(self, networks: Sequence[HashNetwork], ids: Tensor) -> Tensor:
        """(R, sum of dims) float32.

        Args:
            networks: one for each table.
            ids: (R, keys) int64, as many keys for each table.
        """
        widest = max(weight.shape[0] for weight, _ in networks[0].weights())
        parts = ids.split(max(1, _MOST_INPUTS // (widest * ids.shape[1])))
        found = [self._decoded(networks, part) for part in parts]
        return torch.cat(found) if parts[1:] else found[0]

    def _decoded(self, networks: Sequence[HashNetwork], ids: Tensor) -> Tensor:
        each = ids.t().reshape(len(networks), -1, 1)  # (tables, own keys * R, 1)
        salts = torch.stack([network.salts.on(ids.device) for network in networks])
        found = encoded(each, salts.unsqueeze(1))
        for n, own in enumerate(zip(*(network.weights() for network in networks))):
            if n:
                found = (found.relu() - _RECTIFIED_MEAN) / _RECTIFIED_STD
            weights, biases = self._stacks.setdefault(n, (StackedParameters(), StackedParameters()))
            weight, bias = weights.of([w for w, _ in own]), [b for _, b in own if b is not None]
            if bias:
                found = torch.baddbmm(biases.of(bias).unsqueeze(1), found, weight)
            else:
                found = torch.bmm(found, weight)
        return found.view(*ids.t().shape, -1).transpose(0, 1).flatten(1)
