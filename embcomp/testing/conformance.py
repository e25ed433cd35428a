"""Checks that every compression method passes, in one process.

Each takes a case and raises AssertionError; `check_backend` runs them all. What only shows on
several ranks is in `embcomp.testing.sharded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import safetensors.torch
import torch
import yaml
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embcomp.backends import BACKENDS
from embcomp.errors import ConfigError
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.row_sources import as_rows
from embcomp.tables.footprint import count_bytes
from embcomp.testing.cases import (
    BackendCase,
    Collection,
    embed_ids,
    expect,
    learning,
    output_keys,
    pooled,
    unpooled,
)
from embcomp.testing.check_data import awkward_tables, batch_of, plain_tables, random_batch

WIDTHS = (1, 2, 3, 6, 10, 16)


def check_output_has_the_declared_keys_and_widths(case: BackendCase) -> None:
    """For every width, and bags of any length, also where all are empty."""
    for dim in WIDTHS:
        tables = awkward_tables((dim, 2 * dim, dim))
        collection = pooled(case, tables)
        for shape in ("single", "ragged", "empty", "full_bags"):
            batch = random_batch(tables, seed=dim, shape=shape)
            out = collection(batch)
            expect(list(out.keys()) == list(output_keys(tables)), f"keys {out.keys()}")
            expect(out.length_per_key() == [dim, dim, 2 * dim, dim], f"{out.length_per_key()}")
            expect(out.values().shape == (6, 5 * dim), f"shape {tuple(out.values().shape)}")
            if shape == "empty":
                expect(not out.values().any(), "an empty bag must give zeros")


def check_bytes_are_predicted_exactly(case: BackendCase) -> None:
    """Predicted = counted on the module = saved; and in training, predicted = parameters."""
    for tables in (*(plain_tables(dim) for dim in WIDTHS), awkward_tables()):
        collection = pooled(case, tables)
        predicted = collection.footprint
        tensors = collection.serving_tensors()
        counted = count_bytes(tensors)
        if case.config.learns_size:
            expect(
                counted <= predicted.serve_bytes, f"{counted} > {predicted.serve_bytes} promised"
            )
            predicted_serving = collection.compact().footprint.serve_bytes
        else:
            predicted_serving = predicted.serve_bytes
        expect(predicted_serving == counted, f"{predicted_serving} != counted {counted}")
        saved = safetensors.torch.save(tensors)
        data = len(saved) - 8 - int.from_bytes(saved[:8], "little")
        expect(predicted_serving == data, f"{predicted_serving} != saved {data}")
        trained = count_bytes(collection.state_dict())
        expect(
            predicted.train_weight_bytes == trained,
            f"training: {predicted.train_weight_bytes} predicted, {trained} in the state dict",
        )


def check_every_parameter_gets_a_gradient(case: BackendCase) -> None:
    """Pooled and unpooled; also where no bag holds anything, as DDP wants them all each step."""
    tables = plain_tables(10)
    collection = learning(pooled(case, tables))
    full = random_batch(tables, seed=1, batch_size=200, shape="full_bags")
    single = random_batch(tables, seed=1, batch_size=200, shape="single")
    for batch in (full, single, random_batch(tables, seed=1, shape="empty")):
        collection.zero_grad()
        loss = collection(batch).values().pow(2).sum()
        penalty = collection.penalty()
        (loss if penalty is None else loss + penalty).backward()
        _expect_gradients(collection, nonzero=batch is full)
    rows = learning(unpooled(case, tables))
    loss = torch.stack([jagged.values().pow(2).sum() for jagged in rows(full).values()]).sum()
    penalty = rows.penalty()
    (loss if penalty is None else loss + penalty).backward()
    _expect_gradients(rows, nonzero=True)


def _expect_gradients(module: Collection, *, nonzero: bool) -> None:
    packed = {table.name for table in module.physical_tables if table.is_packed}
    parameters = dict(module.named_parameters())
    expect(bool(parameters), "no parameters")
    for name, parameter in parameters.items():
        if name.split(".")[-2] in packed:
            expect(parameter.grad is None, f"{name} is updated by its method, and by a gradient")
            continue
        expect(parameter.grad is not None, f"{name} has no gradient")
        if nonzero:
            assert parameter.grad is not None
            expect(bool(parameter.grad.any()), f"{name} has a gradient of zeros")


def check_compact_gives_the_same_answers(case: BackendCase) -> None:
    """For every id alone and for ragged bags, and what it leaves is compact already."""
    for dims in ((10, 6, 3), (16, 16, 16)):
        tables = awkward_tables(dims)
        collection = pooled(case, tables)
        compacted = collection.compact()
        expect(compacted.compact() is compacted, "compacting twice changes something")
        there = embed_ids(compacted, tables)
        for key, rows in embed_ids(collection, tables).items():
            torch.testing.assert_close(there[key], rows, rtol=1e-5, atol=1e-6)
        batch = random_batch(tables, seed=8, shape="ragged")
        torch.testing.assert_close(
            compacted(batch).values(), collection(batch).values(), rtol=1e-5, atol=1e-6
        )
    rows = unpooled(case, awkward_tables((8, 8, 8)))
    batch = random_batch(awkward_tables((8, 8, 8)), seed=9, shape="ragged")
    found = rows.compact()(batch)
    for key, jagged in rows(batch).items():
        torch.testing.assert_close(found[key].values(), jagged.values(), rtol=1e-5, atol=1e-6)


def check_state_dict_round_trip(case: BackendCase) -> None:
    """The weights alone, loaded into a collection of another seed, give the same answers."""
    tables = awkward_tables((10, 6, 3))
    batch = random_batch(tables, seed=2)
    one, other = pooled(case, tables, seed=1), pooled(case, tables, seed=2)
    before = one(batch).values()
    expect(not torch.equal(before, other(batch).values()), "another seed, the same weights")
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(batch).values(), before, rtol=0, atol=0)


def check_the_same_seed_gives_the_same_rows(case: BackendCase) -> None:
    """Weights follow the seed; where ids go does not depend on it, nor on what came before."""
    tables = awkward_tables()
    batch = random_batch(tables, seed=3)
    one, same, other = (pooled(case, tables, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one(batch).values(), same(batch).values(), rtol=0, atol=0)
    for index in (0, 1):
        here, there = one.route(batch)[index], other.route(batch)[index]
        if here is not None:
            expect(torch.equal(here.values(), there.values()), "the route depends on the RNG")


def check_ids_have_rows_of_their_own(case: BackendCase) -> None:
    """All ids differ where the method promises so; else most of them do."""
    tables = plain_tables(10)
    for key, rows in embed_ids(pooled(case, tables), tables).items():
        distinct = len(torch.unique(rows, dim=0))
        least = len(rows) if case.injective else len(rows) // 4
        expect(distinct >= least, f"{key}: {len(rows)} ids, only {distinct} embeddings")


def check_initial_scale(case: BackendCase) -> None:
    """Embeddings start around zero with the deviation that the case names."""
    tables = plain_tables(16, rows=(400, 500))
    for seed in range(3):
        for key, rows in embed_ids(pooled(case, tables, seed=seed), tables).items():
            rows = torch.unique(rows, dim=0)  # ids that share a row would weigh it by their number
            mean, std = rows.mean().item(), rows.std().item()
            expect(abs(mean) < case.init_std / 3, f"{key}: mean {mean} against std {std}")
            expect(
                0.75 < std / case.init_std < 1.25,
                f"{key}: standard deviation {std}, promised {case.init_std}",
            )


def check_int32_and_int64_ids_agree(case: BackendCase) -> None:
    """Bit for bit, pooled and unpooled."""
    tables = awkward_tables((8, 8, 8))
    for shape in ("single", "ragged"):
        narrow, wide = (
            random_batch(tables, seed=4, shape=shape, dtype=dtype)
            for dtype in (torch.int32, torch.int64)
        )
        narrow = KeyedJaggedTensor(
            keys=wide.keys(), values=wide.values().int(), lengths=wide.lengths()
        )
        one = pooled(case, tables)
        torch.testing.assert_close(one(narrow).values(), one(wide).values(), rtol=0, atol=0)
        rows = unpooled(case, tables)
        there = rows(wide)
        for key, jagged in rows(narrow).items():
            torch.testing.assert_close(jagged.values(), there[key].values(), rtol=0, atol=0)


def check_bags_are_pooled_rows(case: BackendCase) -> None:
    """A bag's embedding is the sum or mean of its ids' embeddings, weighted where asked."""
    for dims in ((8, 4, 16), (3, 10, 1)):
        tables = awkward_tables(dims)
        for weighted in (False, True):
            collection = pooled(case, tables, is_weighted=weighted)
            single = embed_ids(collection, tables)
            for shape in ("single", "ragged", "full_bags"):
                batch = random_batch(
                    tables,
                    seed=5,
                    shape=shape,
                    weighted=weighted,
                )
                out, bags = collection(batch).to_dict(), batch.to_dict()
                for key, (table, feature) in output_keys(tables).items():
                    if key in single:
                        wanted = _pool(single[key], bags[feature], mean=table.mean)
                        torch.testing.assert_close(out[key], wanted, rtol=1e-5, atol=1e-6)


def _pool(rows: Tensor, bags: JaggedTensor, *, mean: bool) -> Tensor:
    pooled_rows = []
    weights = bags.weights_or_none()
    for start, end in zip(bags.offsets().tolist(), bags.offsets().tolist()[1:]):
        found = rows[bags.values()[start:end].long()]
        if weights is not None:
            found = found * weights[start:end].unsqueeze(1)
        pooled_rows.append(found.sum(0) / (max(end - start, 1) if mean else 1))
    return torch.stack(pooled_rows)


def check_unpooled_equals_pooled_rows(case: BackendCase) -> None:
    """One embedding per id, in the bags' order, with the ids alongside when asked for."""
    tables = awkward_tables((10, 10, 10))
    single = embed_ids(pooled(case, tables), tables)
    collection = unpooled(case, tables, need_indices=True)
    collection.load_state_dict(
        {
            name: dict(collection.state_dict())[name].copy_(weight)
            for name, weight in zip(
                collection.state_dict(), pooled(case, tables).state_dict().values()
            )
        }
    )
    for shape in ("single", "ragged", "empty"):
        batch = random_batch(tables, seed=6, shape=shape)
        out, bags = collection(batch), batch.to_dict()
        expect(list(out) == list(output_keys(tables)), f"keys {list(out)}")
        for key, (_, feature) in output_keys(tables).items():
            expect(torch.equal(out[key].lengths(), bags[feature].lengths()), f"{key}: lengths")
            expect(torch.equal(out[key].weights(), bags[feature].values()), f"{key}: indices")
            if key in single:
                wanted = single[key][bags[feature].values()]
                torch.testing.assert_close(out[key].values(), wanted, rtol=1e-6, atol=1e-7)


def check_features_of_one_table_share_its_rows(case: BackendCase) -> None:
    """And a feature in two tables has an embedding of its own in each."""
    tables = awkward_tables((8, 8, 8))
    out = pooled(case, tables)(batch_of({"f0": [[7]], "f1": [[7]], "f2": [[7]]})).to_dict()
    expect(torch.equal(out["f0"], out["f1@t0"]), "two features of a table, two embeddings")
    expect(not torch.equal(out["f1@t0"], out["f1@t2"]), "two tables, one embedding")


def check_order_of_the_batch_does_not_matter(case: BackendCase) -> None:
    """Keys may come in another order in each batch, and with others that no table wants."""
    tables = awkward_tables()
    collection = pooled(case, tables)
    batch = random_batch(tables, seed=7)
    wanted = collection(batch).values()
    for order in ([2, 0, 1], [1, 2, 0], [0, 1, 2]):
        torch.testing.assert_close(collection(batch.permute(order)).values(), wanted)
    more = {"other": batch["f0"]} | batch.to_dict()
    torch.testing.assert_close(
        collection(KeyedJaggedTensor.from_jt_dict(more)).values(), wanted, rtol=0, atol=0
    )


def check_ids_out_of_range(case: BackendCase) -> None:
    """Hashed where the method says so; else refused by a ValueError with feature and id."""
    tables = awkward_tables((8, 8, 8))
    collection, rows = pooled(case, tables), unpooled(case, tables)
    for bad in (-1, 90, -(2**63), 2**63 - 1, 2**31, 2**24 + 1):
        for others in ([[1]], [[1, 2]]):
            batch = batch_of({"f0": others, "f1": [[3]], "f2": [[bad]]})
            for lookup in (collection, rows):
                _expect_refused(case, lookup, batch, bad)


def _expect_refused(
    case: BackendCase, lookup: torch.nn.Module, batch: KeyedJaggedTensor, bad: int
) -> None:
    if case.takes_any_id:
        found = lookup(batch)["f2"]
        values = found if isinstance(found, Tensor) else found.values()
        expect(bool(values.isfinite().all()) and bool(values.any()), f"id {bad}: no row")
        return
    try:
        lookup(batch)
    except ValueError as error:
        expect("'f2'" in str(error) and str(bad) in str(error), f"unclear: {error}")
    else:
        raise AssertionError(f"id {bad} is outside the table and was not refused")


def check_ids_above_float_precision(case: BackendCase) -> None:
    """Neighbouring ids beyond 2**24 and 2**53 go to rows of their own, all within the tables."""
    rows = 2**53 + 2**10
    tables = plain_tables(6, rows=(rows, rows + 1))
    collection = pooled(case, tables, device=torch.device("meta"))
    if list(collection.route.buffers()):
        return  # ids are positions in learnt buffers, which no machine holds at this length
    sizes = {key: t.num_embeddings for t in collection.physical_tables for key in t.keys}
    if set(sizes.values()) == {1}:
        _expect_computed_apart(case, rows)
        return
    for start in (2**24 - 8, 2**31 - 8, 2**53 - 8, rows - 16):
        ids = list(range(start, start + 16))
        for ragged in (False, True):
            other = [[start], *([[]] * 15)] if ragged else [[id_] for id_ in ids]
            batch = batch_of({"f0": [[id_] for id_ in ids], "f1": other})
            pooled_part, unpooled_part, _ = collection.route(batch)
            routed = pooled_part if pooled_part is not None else unpooled_part
            own = []
            for key, jagged in routed.to_dict().items():
                values = jagged.values()
                inside = bool((values >= 0).all()) and bool((values < sizes[key]).all())
                expect(inside, f"{key}: rows outside the table")
                if "/f0#" in key:
                    own.append(_rows_of_bags(jagged))
            distinct = len(torch.unique(torch.cat(own, dim=1), dim=0))
            least = len(ids) if case.injective else 4
            expect(distinct >= least, f"ids from {start}: {distinct} rows for {len(ids)} ids")


def _expect_computed_apart(case: BackendCase, rows: int) -> None:
    """The same of a method whose ids have all one row, and embeddings that are computed."""
    collection = pooled(case, plain_tables(6, rows=(rows, rows + 1)))
    for start in (2**24 - 8, 2**31 - 8, 2**53 - 8, rows - 16):
        ids = range(start, start + 16)
        batch = batch_of({"f0": [[id_] for id_ in ids], "f1": [[id_] for id_ in ids]})
        for key, found in collection(batch).to_dict().items():
            distinct = len(torch.unique(found, dim=0))
            expect(distinct == len(ids), f"{key}: ids from {start}: {distinct} embeddings")


def _rows_of_bags(bags: JaggedTensor) -> Tensor:
    """(bags, most ids in one), -1 where a bag is shorter."""
    lengths = bags.lengths().long()
    places = torch.arange(int(lengths.max().clamp(min=1))).expand(len(lengths), -1)
    return torch.full(places.shape, -1).masked_scatter(places < lengths[:, None], bags.values())


def check_route_owns_no_parameters(case: BackendCase) -> None:
    """And buffers are learnt ones only, or pipelining and `meta` builds break in silence."""
    for collection in (pooled(case, awkward_tables()), unpooled(case, plain_tables())):
        expect(not list(collection.route.parameters()), "the route has parameters")
        for part in (collection.route, collection.combine):
            for name, module in part.named_modules():
                if list(module.buffers(recurse=False)):
                    learnt = isinstance(module, LearnedBuffers)
                    expect(learnt, f"{name} has buffers that a meta build would zero")


def check_parameters_can_be_reset(case: BackendCase) -> None:
    """Whatever owns parameters in the combine has `reset_parameters`, for `meta` builds."""
    collection = pooled(case, plain_tables(10))
    for name, module in collection.combine.named_modules():
        if list(module.parameters(recurse=False)):
            expect(hasattr(module, "reset_parameters"), f"combine.{name} has no reset_parameters")


def check_config_survives_yaml(case: BackendCase) -> None:
    """A config is its name and plain values."""
    text = yaml.safe_dump(dataclasses.asdict(case.config))
    again = BACKENDS[case.config.name](**yaml.safe_load(text))
    expect(again == case.config, f"{again} != {case.config}")


def check_tables_stored_apart_add_up(case: BackendCase) -> None:
    """What a method says of storing tables together is what its footprints say."""
    for tables in (plain_tables(16), awkward_tables()):
        for config, group in pooled(case, tables, device=torch.device("meta")).plan.groups:
            expect(not config.stores_together(group[:1]), "one table is stored with itself")
            if not config.stores_together(group):
                alone = [config.for_tables([t]).footprint([t]).serve_bytes for t in group]
                whole = config.footprint(group).serve_bytes
                expect(sum(alone) == whole, f"stored apart, {alone} do not add up to {whole}")


def check_rows_are_where_the_method_says(case: BackendCase) -> None:
    """Where a method tells the row of each id, and its columns, embeddings are these rows."""
    tables = plain_tables(10)
    collection = pooled(case, tables).compact()
    found = {
        table.name: embedded
        for (table, _), embedded in zip(
            output_keys(tables).values(), embed_ids(collection, tables).values()
        )
    }
    for state in collection.states():
        method = state.form.config
        columns = {table.name: method.columns(table) for table in state.tables}
        stored = {t.name: t for t in method.physical_tables(state.tables)}
        for table in state.tables:
            width = columns[table.name]
            if width is not None and not method.is_pruned(table):
                shape = (stored[table.name].num_embeddings, stored[table.name].embedding_dim)
                wanted = (table.num_embeddings, width)
                expect(shape == wanted, f"{table.name}: {wanted} promised, {shape} stored")
        try:
            places = method.rows_by_id(state.tables, state.form)
        except ConfigError:
            continue
        for table in state.tables:
            own = as_rows(places[table.name]).whole()
            rows = state.form.rows(table.name).whole()[own]
            missing = table.embedding_dim - rows.shape[1]
            padded = torch.nn.functional.pad(rows, (0, missing))
            expect(torch.equal(padded, found[table.name]), f"{table.name}: not these rows")


def check_budgets(case: BackendCase) -> None:
    """A budget is met or refused with the floor; the floor itself can be reached."""
    specs = pooled(case, plain_tables(10), device=torch.device("meta")).plan.tables
    full = sum(spec.full_bytes for spec in specs)
    floor = case.config.smallest(specs).footprint(specs).serve_bytes
    at_floor = case.config.fit_budget(specs, floor).footprint(specs).serve_bytes
    expect(at_floor == floor, f"the floor is {floor}, its budget gives {at_floor}")
    before = 0
    for share in range(1, 21):
        budget = full * share // 20
        if budget >= floor:
            size = case.config.fit_budget(specs, budget).footprint(specs).serve_bytes
            expect(before <= size <= budget, f"budget {budget}: {size} after {before}")
            before = size
    try:
        case.config.fit_budget(specs, floor - 1)
    except ValueError as error:
        expect(f"{floor:,}" in str(error), f"the floor {floor:,} is not in: {error}")
    else:
        raise AssertionError("a budget below the floor was accepted")


CHECKS: dict[str, Callable[[BackendCase], None]] = {
    name.removeprefix("check_"): check
    for name, check in sorted(globals().items())
    if name.startswith("check_")
}
"""Every check of this module, by name."""


def check_backend(case: BackendCase) -> None:
    """Run every check that needs one process."""
    for check in CHECKS.values():
        check(case)
