"""Rows of integers: exact in what holds them, right on average when they are rounded, refused where they cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad

from embcomp import (
    ALPT,
    CompressedEmbeddingBagCollection,
    ConfigError,
    Full,
    Int8,
    Int16,
    compress_,
    load,
    save,
)
from embcomp.backends.integer_rows.integer_cells import (
    LIMITS,
    IntegerInit,
    nearest,
    packed,
    unpacked,
    weights_of,
)
from embcomp.backends.integer_rows.integer_updates import UpdateRule, rounding_draws
from embcomp.config.train_config import RowOptimizerConfig
from embcomp.tables.specs import TableSpec, UniformInit
from embcomp.testing.cases import BackendCase, pooled
from embcomp.testing.check_data import plain_tables, random_batch
from embcomp.testing.planted import plant
from embcomp.training.optim.optimizers import check_packed_rows
from tests.helpers.learned_cases import TRAIN, Clicks, auc

TABLES = plain_tables(16, rows=(200, 300))
METHODS = (Int8(), Int16(), ALPT(bits=8))


def collection_of(method, kind=torch.optim.SGD, seed=0, **settings):
    collection = pooled(BackendCase(config=method), TABLES, seed=seed)
    return with_optimizer(collection, kind, **({"lr": 0.5} | settings))


def with_optimizer(collection, kind, **settings):
    for inner in collection.inner_collections():
        _apply_optimizer_in_backward(kind, inner.parameters(), settings)
    return collection.train()


def step(collection, seed=1):
    batch = random_batch(TABLES, seed=seed, batch_size=60, shape="ragged")
    out = collection.train()(batch).values()
    (out - torch.linspace(-1, 1, out.shape[1])).square().sum(1).mean().backward()


def weights(collection):
    batch = random_batch(TABLES, seed=99, batch_size=400, shape="single")
    return collection.eval()(batch).values().detach()


@pytest.mark.parametrize("bits", [8, 16])
def test_every_integer_passes_through_a_bag_to_the_bit(bits):
    limit = LIMITS[bits]
    integers = torch.randint(-limit, limit + 1, (3000, 7), dtype=torch.int32)
    integers[:4] = torch.tensor([limit, -limit, 0, -1], dtype=torch.int32)[:, None]
    steps = torch.rand(3000) + 1e-9
    stored = packed(integers, steps, bits)
    bag = torch.nn.EmbeddingBag.from_pretrained(stored, mode="sum")
    ids = torch.arange(3000)
    for weight in (None, torch.ones(3000)):
        found, found_steps = unpacked(bag(ids, ids, per_sample_weights=weight), 7, bits)
        assert torch.equal(found, integers) and torch.equal(found_steps[:, 0], steps)
    exponents = (stored.view(torch.int32) >> 23) & 255
    assert int(exponents.min()) > 0 and int(exponents.max()) < 255
    assert not weights_of(torch.zeros(2, 5), 7, bits).any()  # what only pads


def test_bytes_are_those_of_integers_in_training_too():
    for method, row in ((Int8(), 16 + 4), (Int16(), 2 * 16 + 4), (ALPT(bits=16), 2 * 16 + 4)):
        footprint = collection_of(method).footprint
        assert footprint.serve_bytes == 500 * row
        assert footprint.train_weight_bytes == 500 * (-(-row // 16) * 16) + 2 * 8  # rows padded
    tables = [TableSpec(name="t", num_embeddings=9, embedding_dim=16, feature_names=("f",))]
    assert ALPT.fit_budget(ALPT(), tables, "60%").bits == 16
    assert ALPT.fit_budget(ALPT(), tables, "40%").bits == 8
    assert [Int8().keeps_full(t) for t in narrow()] == [True, True, False]


def narrow():
    return [
        TableSpec(name="t", num_embeddings=9, embedding_dim=dim, feature_names=("f",))
        for dim in (1, 2, 3)
    ]


def test_updates_below_a_step_count_on_average_and_depend_on_nothing_else():
    """A twentieth of a step, twenty times: rounded to the nearest, nothing would ever move."""
    rule = UpdateRule(bits=8, steps="fixed")
    rows = packed(torch.zeros(4000, 8, dtype=torch.int32), torch.full((4000,), 0.1), 8)
    ids, gradients = torch.arange(4000), torch.full((4000, 8), 0.05)
    for n in range(1, 21):
        draws = rounding_draws(ids, 8, 77, torch.tensor(n))
        rows = rule.updated(rows, gradients, torch.full((4000, 1), 0.1), draws)
    integers, _ = unpacked(rows, 8, 8)
    assert integers.float().mean() == pytest.approx(-1.0, abs=0.03)
    assert integers.unique().numel() > 3
    some = torch.tensor([7, 3999])
    again = rounding_draws(some, 8, 77, torch.tensor(20))
    assert torch.equal(again, draws[some])
    assert not torch.equal(again, rounding_draws(some, 8, 77, torch.tensor(19)))
    assert not torch.equal(again, rounding_draws(some, 8, 78, torch.tensor(20)))


@pytest.mark.parametrize("steps", ["fixed", "range", "learnt"])
def test_rows_that_nothing_pulls_at_stay_as_they_are(steps):
    stored = nearest(torch.randn(500, 6), 8)
    rule = UpdateRule(bits=8, steps=steps, step_rate=1.0)
    after = rule.updated(stored, torch.zeros(500, 6), torch.ones(500, 1), torch.rand(500, 6))
    assert torch.equal(after, stored)


def test_a_step_follows_the_largest_weight_with_room_and_shrinks_late():
    rule = UpdateRule(bits=8, steps="range")
    stored = nearest(torch.tensor([[1.0, -0.5], [1.0, 0.1]]), 8)
    _, before = unpacked(stored, 2, 8)
    ones, halves = torch.ones(2, 1), torch.full((2, 2), 0.5)
    grown = rule.updated(stored, torch.tensor([[-1.0, 0.0], [0.5, 0.0]]), ones, halves)
    integers, steps = unpacked(grown, 2, 8)
    assert steps[0] == pytest.approx(float(2 / 126 * 1.125), rel=1e-5)
    assert torch.equal(steps[1], before[1])  # half of the range is no reason
    assert int(integers[0, 0]) == 112
    assert integers[0, 0] * steps[0] == pytest.approx(2.0, rel=1e-5)
    small = rule.updated(stored, torch.tensor([[0.9, -0.4], [0.9, 0.0]]), ones, halves)
    _, steps = unpacked(small, 2, 8)
    assert (steps < before / 3).all()


def test_a_learnt_step_moves_by_the_gradient_of_the_paper():
    """`round(u) - u` inside the range and the range's end outside, against the row's gradient."""
    rule = UpdateRule(bits=8, steps="learnt", step_rate=0.01)
    integers = torch.tensor([[126, 5, -7], [3, 5, -7]], dtype=torch.int32)
    stored = packed(integers, torch.tensor([0.1, 0.1]), 8)
    gradients = torch.tensor([[-0.4, 0.02, 0.0], [0.03, 0.0, -0.02]])
    rates = torch.tensor([[0.5], [0.5]])
    after = rule.updated(stored, gradients, rates, torch.zeros(2, 3))
    _, steps = unpacked(after, 3, 8)
    scale = 0.01 * 0.5 / (3 * 126) ** 0.5
    inside = 0.5 * 0.02 / 0.1  # how far a weight is from its integer, in steps
    first = scale * (-0.4 * 126 + 0.02 * inside)
    second = scale * (0.03 * 0.15 + 0.02 * 0.1)
    assert float(steps[0]) == pytest.approx(0.1 - max(first, -0.01), rel=1e-5)
    assert float(steps[1]) == pytest.approx(0.1 - second, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, RowWiseAdagrad])
def test_fine_integers_learn_as_full_rows_do(kind):
    fine, full = collection_of(Int16(step=1e-4), kind), collection_of(Full(), kind)
    with torch.no_grad():  # from the same rows
        for table in TABLES:
            rows = full.rows.embedding_bags[table.name].weight
            fine.unpooled_rows.embedding_bags[table.name].weight[:, :9] = nearest(rows, 16, 1e-4)
    for each in (fine, full):
        for n in range(6):
            step(each, seed=n)
    torch.testing.assert_close(weights(fine), weights(full), rtol=0, atol=1.5e-3)
    assert (weights(full) - weights(collection_of(Full()))).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_state_goes_on_to_the_bit_and_an_artefact_answers_so(method, tmp_path):
    collection = collection_of(method, RowWiseAdagrad)
    before = weights(collection)
    for n in range(3):
        step(collection, seed=n)
    after = weights(collection)  # an evaluation sees the last step
    assert not torch.equal(after, before)
    save(collection, tmp_path / "a", row_type="int8")  # which stored integers are already
    served = load(tmp_path / "a")
    assert torch.equal(weights(served), after)
    assert served.footprint.serve_bytes == collection.footprint.serve_bytes
    again = collection_of(method, seed=5)
    again.load_state_dict(copy.deepcopy(collection.state_dict()))
    plain = collection_of(method)
    plain.load_state_dict(copy.deepcopy(collection.state_dict()))
    for each in (again, plain):
        step(each, seed=9)
    assert torch.equal(weights(again), weights(plain))
    assert not torch.equal(weights(again), after)


def test_trained_full_tables_become_integers_within_half_a_step():
    full = pooled(BackendCase(config=Full()), TABLES)
    wanted = weights(full)
    model = torch.nn.Sequential(full)
    compress_(model, Int8())
    found = weights(model[0])
    assert 0 < float((found - wanted).abs().max()) <= 0.1 / 126 / 2 + 1e-7


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match="nothing says how fast rows of table 't0' learn"):
        lonely = pooled(BackendCase(config=Int8()), TABLES)
        step(lonely)
        lonely.state_dict()
    with pytest.raises(
        ConfigError, match="alpt: rows of table 't0' have the row optimizer Adagrad"
    ):
        step(collection_of(ALPT(bits=8), torch.optim.Adagrad))
    with pytest.raises(ConfigError, match="without momentum or weight decay"):
        step(collection_of(Int8(), torch.optim.SGD, momentum=0.9))
    with pytest.raises(ConfigError, match="int8: table 't0' has data_type .*FP16"):
        half = TABLES[0].bag()
        half.data_type = DataType.FP16
        CompressedEmbeddingBagCollection([half], Int8())
    with pytest.raises(ConfigError, match="cannot be split by columns"):
        IntegerInit(draw=UniformInit(-1, 1), dim=16, bits=8)(torch.empty(3, 4))


@pytest.mark.parametrize(
    ("settings", "fused", "wrong"),
    [
        ({"name": "adagrad"}, True, "name: adagrad"),
        ({"weight_decay": 0.1}, True, "weight_decay: 0.1"),
        ({"mode": "dense"}, False, "mode: dense"),
    ],
)
def test_training_refuses_what_would_treat_cells_as_weights(settings, fused, wrong):
    model = torch.nn.Sequential(pooled(BackendCase(config=Int8()), TABLES))
    config = RowOptimizerConfig(**settings)
    with pytest.raises(ConfigError, match=f"rows of t0, t1 are stored integers .*{wrong}"):
        check_packed_rows(model, config, fused=fused)
    check_packed_rows(
        torch.nn.Sequential(pooled(BackendCase(config=Full()), TABLES)), config, fused=fused
    )


def planted_auc(method, planted):
    torch.manual_seed(0)
    model = Clicks(planted, method, 8)
    with_optimizer(model.tables, RowWiseAdagrad, lr=0.1)
    optimizer = torch.optim.Adam(model.linear.parameters(), lr=0.01)
    random, order = torch.Generator().manual_seed(0), torch.arange(TRAIN.stop)
    for _ in range(2):
        for batch in order[torch.randperm(len(order), generator=random)].split(250):
            scores = model.train()(planted.features(batch))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                scores, planted.labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return auc(model, planted)


def test_learnt_steps_beat_one_step_for_all_at_equal_bytes_and_reach_full_rows():
    """Interactions want fine weights, which public code's step of 0.01, 30 times the first ones, is too long for."""
    planted = plant(num_values=(400, 400, 2000), rank=6, seed=1)
    scores = {
        name: planted_auc(method, planted)
        for name, method in (
            ("full", Full()),
            ("alpt", ALPT(bits=8)),
            ("range", Int8()),
            ("one step", Int8(step=0.05)),
        )
    }
    assert scores["alpt"] > scores["one step"] + 0.01, scores
    assert scores["alpt"] >= scores["range"] - 0.005, scores
    assert scores["alpt"] > scores["full"] - 0.01, scores


def moved_by(collection, learn):
    before = weights(collection)
    learn(collection)
    collection.settle()
    return (weights(collection) - before).abs()


def pulled_twice(collection):
    """Both of a step's losses pull at every embedding, by one backward pass each."""
    out = collection(random_batch(TABLES, seed=99, batch_size=400, shape="single")).values()
    out[:, :16].sum().backward(retain_graph=True)
    (2 * out[:, 16:]).sum().backward()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_backward_pass_counts_in_either_mode(method, training):
    def learn(own):
        pulled_twice(own.train(training))

    found, wanted = (moved_by(collection_of(each, lr=0.01), learn) for each in (method, Full()))
    assert float(wanted.min()) > 0.005
    # The steps of `alpt` grow by and by, so that what is beyond the largest integer waits.
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0.25, atol=0.001)


def test_a_second_pass_over_an_old_graph_counts_only_itself():
    collection = collection_of(Int16(), lr=0.1)
    batch = random_batch(TABLES, seed=99, batch_size=1, shape="single")
    out = collection(batch).values()
    moved = []
    for _ in range(2):
        before = collection.eval()(batch).values().detach()
        out.sum().backward(retain_graph=True)
        collection.settle()
        moved.append(before - collection(batch).values().detach())
    torch.testing.assert_close(moved[0], torch.full_like(moved[0], 0.1), rtol=0, atol=1e-3)
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_compressed_integers_rest_while_the_rest_trains(method):
    model = torch.nn.Sequential(
        CompressedEmbeddingBagCollection([table.bag() for table in TABLES], Full())
    )
    compress_(model, method)
    collection = with_optimizer(model[0], torch.optim.SGD, lr=0.1)
    before = weights(collection)
    out = collection.train()(random_batch(TABLES, seed=1)).values()
    scale = torch.ones(out.shape[1], requires_grad=True)
    (out * scale).sum().backward()
    collection.settle()
    assert scale.grad.any() and torch.equal(weights(collection), before)
