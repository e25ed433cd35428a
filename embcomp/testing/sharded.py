"""Checks that only mean something on several ranks: sharded training equals unsharded training.

The functions here run on every rank of a `WorkerPool`'s process group.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embcomp.backends.integer_rows.integer_cells import IntegerInit, cells_of, unpacked
from embcomp.collection.collection import (
    AnyPlan,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.layers.named_parts import stored_tensors
from embcomp.tables.specs import splits_by_rows
from embcomp.testing.cases import expect
from embcomp.testing.check_data import Declared, Shape, awkward_tables, joined, random_batch
from embcomp.testing.scorer import PooledHead, Scorer, UnpooledHead

Sharding = Literal["table_wise", "row_wise", "column_wise", "data_parallel", "mixed"]
Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad"]

SHARDERS: list[ModuleSharder[nn.Module]] = [EmbeddingBagCollectionSharder()]
# The large eps keeps rounding errors of tiny gradients from being blown up to whole steps.
_OPTIMIZERS: dict[Optimizer, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-3}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-3}),
}
# Adagrad divides by what it has summed: of a gradient that nearly cancels it keeps the rounding.
_TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 3e-5}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, how it is sharded and how it is trained.

    Args:
        plan: methods of the tables.
        sharding: split of the physical tables; `mixed` deals out the others in turn. Stored integers are
            split table-wise where it is by columns or not at all.
        optimizer: of the rows; dense parameters get its counterpart. Stored integers have `rowwise_adagrad`
            in place of `adagrad`.
        pooled: whether the collection pools.
        weighted: whether ids carry weights; pooled collections only.
        shape: how many ids the bags hold.
        dims: widths of the three tables; equal for an unpooled collection.
        batch_size: rows on each rank.
    """

    plan: AnyPlan
    sharding: Sharding = "table_wise"
    optimizer: Optimizer = "adagrad"
    pooled: bool = True
    weighted: bool = False
    shape: Shape = "ragged"
    dims: tuple[int, int, int] = (16, 8, 10)
    batch_size: int = 5

    @property
    def tables(self) -> list[Declared]:
        """Features shared by tables, sums and means."""
        return awkward_tables(self.dims)

    def model(self, *, seed: int, device: torch.device | None = None) -> Scorer:
        """A scorer over the collection; same seed, same weights."""
        torch.manual_seed(seed)
        if self.pooled:
            bags = [table.bag() for table in self.tables]
            collection = CompressedEmbeddingBagCollection(
                bags, self.plan, is_weighted=self.weighted, device=device
            )
            width = sum(table.dim * len(table.features) for table in self.tables)
            return Scorer(collection, PooledHead(width, device=device))
        rows = [table.unpooled() for table in self.tables]
        return Scorer(
            CompressedEmbeddingCollection(rows, self.plan, device=device),
            UnpooledHead(self.dims[0], device=device),
        )

    def batch(self, step: int, rank: int) -> Batch:
        """One rank's share of a step; numbers of ids differ between ranks."""
        seed = 100 * step + rank
        # The second rank once gets a batch without a single id.
        shape: Shape = "empty" if (step, rank, self.shape) == (1, 1, "ragged") else self.shape
        features = random_batch(
            self.tables, seed=seed, batch_size=self.batch_size, shape=shape, weighted=self.weighted
        )
        labels = torch.randint(0, 2, (self.batch_size,), generator=_seeded(seed)).float()
        return Batch(dense=torch.zeros(self.batch_size, 1), sparse=features, labels=labels)

    def global_batch(self, step: int) -> Batch:
        """What all ranks see together."""
        parts = [self.batch(step, rank) for rank in range(dist.get_world_size())]
        return Batch(
            dense=torch.cat([part.dense for part in parts]),
            sparse=joined([part.sparse for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
        )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shard(
    setup: Setup, model: Scorer, *, weights: Mapping[str, Tensor] | None = None
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Wrap a model as training does: rows fused with their optimizer, the rest beside it.

    Args:
        setup: the split and the optimizers.
        model: its weights are drawn anew by TorchRec.
        weights: equal on all ranks; loaded afterwards.
    """
    optimizer, settings = _row_optimizer(setup, model)
    for inner in model.tables.inner_collections():
        _apply_optimizer_in_backward(optimizer, inner.parameters(), dict(settings))
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.distributed_c10d._get_default_group()),
        device=torch.device("cpu"),
        plan=sharding_plan(model, setup.sharding),
        sharders=SHARDERS,
    )
    if weights is not None:
        sharded.load_state_dict(OrderedDict((k, v.clone()) for k, v in weights.items()))
    dense, dense_settings = _dense_optimizer(setup.optimizer)
    rest = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: dense(parameters, **dense_settings),
    )
    return sharded, CombinedOptimizer([("fused", sharded.fused_optimizer), ("dense", rest)])


def _dense_optimizer(rows: Optimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return _OPTIMIZERS["adagrad" if rows == "rowwise_adagrad" else rows]


def sharding_plan(model: nn.Module, sharding: Sharding) -> ShardingPlan:
    """A hand-made plan for every inner collection of a model."""
    world_size = dist.get_world_size()
    packed = packed_tables(model) if isinstance(model, Scorer) else {}
    plans = {}
    for path, module in model.named_modules():
        if type(module) is EmbeddingBagCollection:
            splits = {
                config.name: _split(
                    sharding, n, config, world_size, is_packed=config.name in packed
                )
                for n, config in enumerate(module.embedding_bag_configs())
            }
            plans[path] = construct_module_sharding_plan(
                module,
                per_param_sharding=splits,
                sharder=EmbeddingBagCollectionSharder(),
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
    return ShardingPlan(plans)


def _split(
    sharding: Sharding, n: int, table: EmbeddingBagConfig, world_size: int, *, is_packed: bool
) -> ParameterShardingGenerator:
    if sharding == "mixed":
        turn: list[Sharding] = ["row_wise", "table_wise", "column_wise", "data_parallel"]
        sharding = turn[n % 4]
    if is_packed and sharding != "row_wise":
        sharding = "table_wise"  # stored integers are whole rows of their one owner
    if sharding == "row_wise" and splits_by_rows(table.num_embeddings, world_size):
        return row_wise()
    if sharding == "data_parallel":
        return data_parallel()
    if sharding == "column_wise":
        # Fused kernels want each part a multiple of 4 wide; what does not split stays whole.
        width = table.embedding_dim
        parts = max(p for p in range(1, world_size + 1) if width % (4 * p) == 0)
        return column_wise(ranks=[(n + p) % world_size for p in range(parts)])
    return table_wise(rank=n % world_size)


def reference_optimizer(setup: Setup, model: Scorer) -> torch.optim.Optimizer | CombinedOptimizer:
    """Ordinary optimizers for an unsharded model, equal to what `shard` attaches."""
    rows, settings = _row_optimizer(setup, model)
    dense, dense_settings = _dense_optimizer(setup.optimizer)
    packed = packed_tables(model)
    named = dict(model.named_parameters())
    for name in [name for name in named if name.split(".")[-2] in packed]:
        # A method that updates rows itself asks the optimizer that they were given how.
        _apply_optimizer_in_backward(rows, [named.pop(name)], dict(settings))
    own = {name: p for name, p in named.items() if _is_fused(setup, name, model)}
    rest = {name: p for name, p in named.items() if name not in own}
    groups = [("dense", KeyedOptimizerWrapper(rest, lambda p: dense(p, **dense_settings)))]
    if own:
        groups.append(("rows", KeyedOptimizerWrapper(own, lambda p: rows(p, **settings))))
    return CombinedOptimizer(groups)


def packed_tables(model: Scorer) -> dict[str, IntegerInit]:
    """Physical tables whose rows are stored integers, which their method updates itself."""
    tables = getattr(model.tables, "physical_tables", [])  # TorchRec's own have none
    return {t.name: t.init_fn for t in tables if isinstance(t.init_fn, IntegerInit)}


def _row_optimizer(
    setup: Setup, model: Scorer
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What the setup asks for; stored integers cannot have Adagrad's sums, but a sum a row."""
    is_adagrad = setup.optimizer == "adagrad" and packed_tables(model)
    return _OPTIMIZERS["rowwise_adagrad" if is_adagrad else setup.optimizer]


def _is_fused(setup: Setup, name: str, model: Scorer) -> bool:
    """Whether a parameter's rows are updated in the backward pass: not if data-parallel."""
    if setup.sharding != "mixed":
        return ".embedding_bags." in name and setup.sharding != "data_parallel"
    for path, module in model.named_modules():
        if type(module) is EmbeddingBagCollection and name.startswith(path + "."):
            tables = [config.name for config in module.embedding_bag_configs()]
            return tables.index(name.split(".")[-2]) % 4 != 3
    return False


def train_step(model: nn.Module, optimizer: Any, batch: Batch) -> float:
    """One step; the loss before it, on this rank's rows."""
    optimizer.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def mean_over_ranks(value: float) -> float:
    """The mean over ranks of equally many rows."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def expect_equal_weights(
    sharded: Mapping[str, Any],
    whole: Mapping[str, Tensor],
    packed: Mapping[str, IntegerInit] | None = None,
) -> None:
    """Every local shard equals its part of the unsharded weights.

    Args:
        sharded: a sharded model's state.
        whole: the unsharded one's.
        packed: of stored integers, which the last bit of a sum of gradients may round to their neighbours.
    """
    expect(set(sharded) == set(whole), f"names differ: {set(sharded) ^ set(whole)}")
    for name, weight in sharded.items():
        if not hasattr(weight, "local_shards"):
            torch.testing.assert_close(weight.detach(), whole[name], **_TOLERANCE, msg=_at(name))
            continue
        for part in weight.local_shards():
            (row, column), (rows, columns) = (
                part.metadata.shard_offsets,
                part.metadata.shard_sizes,
            )
            wanted = whole[name][row : row + rows, column : column + columns]
            stored = (packed or {}).get(name.split(".")[-2])
            if stored is not None:
                _expect_equal_integers(part.tensor.detach(), wanted, stored, name)
                continue
            torch.testing.assert_close(
                part.tensor.detach(), wanted, **_TOLERANCE, msg=_at(f"{name}[{row}:, {column}:]")
            )


def _expect_equal_integers(found: Tensor, wanted: Tensor, stored: IntegerInit, name: str) -> None:
    columns = cells_of(stored.dim, stored.bits) + 1
    one, other = (unpacked(rows[:, :columns], stored.dim, stored.bits) for rows in (found, wanted))
    torch.testing.assert_close(one[1], other[1], **_TOLERANCE, msg=_at(f"{name}: steps"))
    apart = (one[0] - other[0]).abs() * one[1]
    floats = _TOLERANCE["atol"] + _TOLERANCE["rtol"] * (one[0] * one[1]).abs()
    within = (apart <= floats) | (apart < 1.5 * one[1])
    expect(bool(within.all()), f"{name}: weights are {apart.max()} apart, more than a step")


def _at(name: str) -> Any:
    return lambda text: f"{name}: {text}"


def check_sharded_equals_unsharded(setup: Setup, steps: int = 3) -> None:
    """Losses and weights over some steps equal those of one process with the whole batch."""
    reference = setup.model(seed=1)
    weights = copy.deepcopy(reference.state_dict())
    sharded, optimizer = shard(setup, setup.model(seed=100 + dist.get_rank()), weights=weights)
    expect_equal_weights(sharded.state_dict(), weights)
    whole = reference_optimizer(setup, reference)
    for step in range(steps):
        loss = train_step(sharded, optimizer, setup.batch(step, dist.get_rank()))
        wanted = train_step(reference, whole, setup.global_batch(step))
        found = mean_over_ranks(loss)
        expect(abs(found - wanted) < 2e-6, f"step {step}: loss {found}, unsharded {wanted}")
    sharded.module.tables.settle()
    expect_equal_weights(sharded.state_dict(), reference.state_dict(), packed_tables(reference))
    learnt = stored_tensors(reference, dict(reference.named_parameters()))
    still = [name for name, tensor in learnt.items() if torch.equal(tensor, weights[name])]
    expect(not still, f"did not train: {still}")


def check_meta_build(setup: Setup) -> None:
    """Built on `meta` with seeds of their own, ranks get finite weights that differ by row.

    And they route ids alike: the route's constants come from the config, not from a seed.
    """
    model = setup.model(seed=dist.get_rank(), device=torch.device("meta"))
    torch.manual_seed(dist.get_rank())
    sharded, _ = shard(setup, model)
    for name, weight in sharded.state_dict().items():
        shards = weight.local_shards() if hasattr(weight, "local_shards") else None
        tensors = [weight] if shards is None else [part.tensor for part in shards]
        for tensor in tensors:
            if not tensor.is_floating_point():
                continue  # codes and maps
            expect(bool(tensor.isfinite().all()), f"{name} is not finite")
            if tensor.is_floating_point():  # learnt buffers may hold any integer
                is_packed = name.split(".")[-2] in packed_tables(model)
                expect(is_packed or bool(tensor.abs().max() < 10), f"{name} was not initialised")
            if len(tensor) > 1 and ".embedding_bags." in name:
                expect(len(torch.unique(tensor, dim=0)) == len(tensor), f"{name} repeats rows")
    routed = sharded.module.tables.route(setup.batch(0, 0).sparse)
    for part in routed[:2]:
        if part is not None:
            ids = [torch.empty_like(part.values()) for _ in range(dist.get_world_size())]
            dist.all_gather(ids, part.values())
            expect(all(torch.equal(ids[0], other) for other in ids), "ranks route differently")
