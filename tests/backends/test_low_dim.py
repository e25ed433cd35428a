"""Narrow rows, and tables without pruned rows: ids find their rows, bytes pay, forms keep answers."""

from __future__ import annotations

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp import CompressedEmbeddingBagCollection, ConfigError, Full, LowDim
from embcomp.backends.low_dim import low_dim_form, pruned_bytes
from embcomp.collection.group_states import GroupState
from embcomp.layers.pruned_route import count_bits, pack, unpack
from embcomp.tables.specs import TableSpec
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import Declared, batch_of, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES


def table(name, rows, dim=8):
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=(name.replace("t", "f"),)
    )


def collection_of(tables, plan, **options):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection([t.bag() for t in tables], plan, **options).eval()


def test_bits_are_counted_in_every_int64():
    words = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 0x123456789ABCDEF0, -2])
    bits = [(word % 2**64).bit_count() for word in words.tolist()]
    assert count_bits(words).tolist() == bits


@pytest.mark.parametrize("rows", [1, 63, 64, 255, 256, 257, 1000])
def test_packing_is_undone_by_unpacking(rows):
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.4
    words, counts = pack(mask)
    assert torch.equal(unpack(words, rows), mask)
    blocks = range(0, rows, 256)
    assert counts.tolist() == [int(mask[:block].sum()) for block in blocks]


@pytest.mark.parametrize("ragged", [False, True])
def test_kept_ids_go_to_their_rank_and_pruned_ids_to_the_shared_row(ragged):
    random = torch.Generator().manual_seed(1)
    tables = plain_tables(8, rows=(700, 300, 520))
    masks = {"t0": torch.rand(700, generator=random) < 0.3, "t2": torch.arange(520) % 7 == 3}
    specs = collection_of(tables, Full()).plan.tables
    weights = {t.name: torch.zeros(t.rows, 8) for t in tables}
    form = low_dim_form(specs, weights, masks, {})
    collection = collection_of(tables, form.config)
    collection.load_states([GroupState(tables=specs, form=form)])
    batch = {f"f{n}": [[i] for i in range(300)] for n in range(3)}
    if ragged:
        batch["f1"] = [[], *([[7, 8]] * 299)]
    routed = collection.route(batch_of(batch))[0].to_dict()
    for name in ("t0", "t2"):
        mask, rows = masks[name], routed[f"{name}/f{name[1]}#0"].values()
        rank = mask.cumsum(0) - 1
        wanted = torch.where(mask, rank, int(mask.sum()))[:300]
        assert torch.equal(rows, wanted)
    assert routed["t1/f1#0"].values().tolist() == [i for bag in batch["f1"] for i in bag]


def test_ids_beyond_float_precision_find_their_rows():
    rows = 2**24 + 3000
    tables = [Declared(name="t0", rows=rows, dim=1, features=("f0",))]
    collection = collection_of(tables, LowDim(kept={"t0": rows - 1000}), device=torch.device("cpu"))
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2**23 : 2**23 + 1000] = False
    words, counts = pack(mask)
    route = collection.route.routes["low_dim"]
    route.words.copy_(words)
    route.counts.copy_(counts)
    route.filled.fill_(1)
    ids = list(range(2**24 - 4, 2**24 + 5)) + [rows - 1, 2**23 + 5]
    routed = collection.route(batch_of({"f0": [[i] for i in ids]}))[0].values().tolist()
    assert routed == [i - 1000 for i in ids[:-1]] + [rows - 1000]


def test_bits_that_are_read_into_a_route_in_use_are_followed():
    tables = plain_tables(8, rows=(600,))
    collection = collection_of(tables, LowDim(kept={"t0": 300}))
    batch = batch_of({"f0": [[i] for i in range(600)]})
    collection.route(batch)
    mask = torch.arange(600) % 2 == 1
    words, counts = pack(mask)
    route = collection.route.routes["low_dim"]
    route.words.copy_(words)
    route.counts.copy_(counts)
    routed = collection.route(batch)[0].values()
    assert torch.equal(routed, torch.where(mask, mask.cumsum(0) - 1, 300))


def test_first_ids_are_kept_until_a_method_says_which():
    tables = plain_tables(8)
    config = LowDim(kept={"t0": 20, "t1": 40, "t2": 0})
    embeddings = embed_ids(collection_of(tables, config), tables)
    assert len(torch.unique(embeddings["f0"][:20], dim=0)) == 20
    assert len(torch.unique(embeddings["f0"][20:], dim=0)) == 1
    assert len(torch.unique(embeddings["f2"], dim=0)) == 1


def test_pruned_forms_answer_as_masked_tables_do():
    random = torch.Generator().manual_seed(2)
    tables = plain_tables(8, rows=(600, 900, 3))
    specs = collection_of(tables, Full()).plan.tables
    weights = {t.name: torch.randn(t.rows, 8, generator=random) for t in tables}
    masks = {t.name: torch.rand(t.rows, generator=random) < 0.5 for t in tables}
    masks["t2"] = torch.tensor([True, False, True])
    widths = {"t0": 3, "t1": 8, "t2": 5}
    form = low_dim_form(specs, weights, masks, widths)
    # Three ids take a block of 256 in the directory, so that dropping a row would not pay.
    assert set(form.config.kept) == {"t0", "t1"}
    collection = collection_of(tables, form.config)
    collection.load_states([GroupState(tables=specs, form=form)])
    for name, rows in embed_ids(collection, tables).items():
        wanted = weights[f"t{name[1]}"] * masks[f"t{name[1]}"].unsqueeze(1)
        wanted[:, widths[f"t{name[1]}"] :] = 0
        assert torch.equal(rows, wanted)
    held = sum(pruned_bytes(spec, int(masks[spec.name].sum()), widths[spec.name]) for spec in specs)
    assert held == collection.footprint.serve_bytes


def test_the_shared_row_starts_at_zero_and_learns():
    tables = plain_tables(8, rows=(600, 90, 75))
    specs = collection_of(tables, Full()).plan.tables
    weights = {t.name: torch.ones(t.rows, 8) for t in tables}
    form = low_dim_form(specs, weights, {"t0": torch.arange(600) < 9}, {})
    collection = collection_of(tables, form.config).train()
    collection.load_states([GroupState(tables=specs, form=form)])
    rows = collection.rows.embedding_bags["t0"].weight
    assert rows.shape == (10, 8)
    assert not rows[9].any()
    collection(batch_of({"f0": [[500]], "f1": [[1]], "f2": [[1]]})).values().sum().backward()
    assert rows.grad[9].all() and not rows.grad[:9].any()


def test_budget_gives_the_largest_width_on_the_grid():
    specs = [table("t0", 100, 16), table("t1", 50, 8)]
    for grid, width in ((1, 7), (4, 4)):
        config = LowDim(multiple_of=grid).fit_budget(specs, 100 * 4 * 7 + 50 * 4 * 7)
        assert config.width == width
    assert LowDim(widths={"t1": 2}).fit_budget(specs, 100 * 4 * 9 + 50 * 4 * 2).width == 9


def test_tables_that_are_not_narrowed_stay_full():
    configs = [
        EmbeddingBagConfig(name="a", num_embeddings=9, embedding_dim=4, feature_names=["a"]),
        EmbeddingBagConfig(name="b", num_embeddings=9, embedding_dim=8, feature_names=["b"]),
    ]
    plan = CompressedEmbeddingBagCollection(configs, LowDim(width=4)).plan
    assert plan.methods["a"] == Full()
    assert plan.footprint.serve_bytes == 2 * 9 * 4 * 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"widths": {"t0": 2.5}}, "widths of table 't0' must be an integer of at least 1, got 2.5"),
        ({"kept": {"t1": -1}}, "kept of table 't1' must be an integer of at least 0, got -1"),
        ({"multiple_of": 0}, "multiple_of must be"),
    ],
)
def test_impossible_sizes_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        LowDim(**settings)


def test_misspelt_tables_are_refused_and_an_open_size_too():
    tables = plain_tables(8)
    with pytest.raises(ConfigError, match="widths names t9, which this method does not hold"):
        collection_of(tables, LowDim(width=2, widths={"t9": 4}))
    with pytest.raises(ConfigError, match="size is open; give one of width, budget"):
        collection_of(tables, LowDim())


def test_kept_rows_survive_a_meta_build():
    tables = plain_tables(8)
    case = CASES["low_dim_kept"]
    built = collection_of(tables, case.config, device=torch.device("meta"))
    route = built.route.to_empty(device="cpu")
    for buffer in route.buffers():
        buffer.zero_()  # as DistributedModelParallel leaves them
    batch = random_batch(tables, seed=3)
    wanted = collection_of(tables, case.config).route(batch)[0].values()
    assert torch.equal(route(batch)[0].values(), wanted)
