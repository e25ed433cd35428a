"""Several labels on one set of tables: the network by its formula, and the loss by its weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchrec.distributed.types import LazyNoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embcomp
from embcomp import CompressedEmbeddingBagCollection, Unified
from embcomp.errors import ConfigError
from embcomp.models import MMoE, ModelConfig, MultiTaskLoss
from embcomp.models.mmoe import GatedExperts
from tests.helpers.model_cases import DIM, NAMES, build, make_batch, make_kjt, make_tables
from tests.models.test_models_sharded import train_sharded, train_whole

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_tasks.py"
SIZES = {"num_tasks": 3, "num_experts": 4, "expert_units": (6, 5), "tower_units": (3,)}


def mmoe(num_dense=2, *, unpooled=False, names=NAMES, **settings):
    torch.manual_seed(0)
    tables = make_tables(DIM, unpooled=unpooled, names=names)
    return MMoE(
        tables, feature_names=NAMES, embedding_dim=DIM, num_dense=num_dense, **(SIZES | settings)
    )


def layers(module):
    return [each for each in module if isinstance(each, nn.Linear)]


def test_logits_are_those_of_the_papers_equations():
    model, batch = mmoe(), make_batch()
    found = model(batch.dense, batch.sparse)
    x = model.fields(batch.dense, model.tables(batch.sparse)).flatten(1).double().detach()
    gates = model.experts.gates.weight.double().view(3, 4, -1)
    for row in range(len(x)):
        seen = []
        for expert in model.experts.experts:
            hidden = x[row]
            for layer in layers(expert):
                hidden = (layer.weight.double() @ hidden + layer.bias.double()).relu()
            seen.append(hidden)
        for task in range(3):
            scores = gates[task] @ x[row]
            mixed = sum(share * one for share, one in zip(scores.exp() / scores.exp().sum(), seen))
            first, last = layers(model.towers.towers[task])
            hidden = (first.weight.double() @ mixed + first.bias.double()).relu()
            logit = last.weight.double() @ hidden + last.bias.double()
            torch.testing.assert_close(found[row, task].double(), logit[0], rtol=1e-5, atol=1e-6)


def test_parameters_are_those_of_experts_gates_and_towers():
    width, model = 5 * DIM, mmoe()
    tables = sum(p.numel() for p in model.tables.parameters())
    experts = 4 * ((width + 1) * 6 + (6 + 1) * 5)
    towers = 3 * ((5 + 1) * 3 + 3 + 1)
    numeric = 2 * DIM
    total = tables + experts + width * 3 * 4 + towers + numeric
    assert sum(p.numel() for p in model.parameters()) == total


def test_one_expert_is_the_shared_bottom():
    model, batch = mmoe(num_experts=1), make_batch()
    x = model.fields(batch.dense, model.tables(batch.sparse)).flatten(1)
    bottom = model.experts.experts[0](x)
    wanted = torch.cat([tower(bottom) for tower in model.towers.towers], dim=1)
    torch.testing.assert_close(model(batch.dense, batch.sparse), wanted)


def test_shares_of_a_task_sum_to_one_and_differ_between_tasks():
    gated = GatedExperts(7, 3, 4, (5,), batch_norm=False, dropout=0)
    shares = gated.shares(torch.randn(6, 7))
    assert shares.shape == (6, 3, 4)
    torch.testing.assert_close(shares.sum(2), torch.ones(6, 3))
    assert not torch.allclose(shares[:, 0], shares[:, 1])


@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_any_order_of_tables_and_an_awaitable_give_the_same_logits(unpooled):
    batch = make_batch()
    wanted = mmoe(unpooled=unpooled)(batch.dense, batch.sparse)
    moved = mmoe(unpooled=unpooled, names=("tag", "user", "item"))
    keys = make_kjt(batch.bags, ("item", "tag", "user"))
    torch.testing.assert_close(moved(batch.dense, keys), wanted)

    class Lazy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, sparse):
            return LazyNoWait(self.inner(sparse))

    moved.tables = Lazy(moved.tables)
    torch.testing.assert_close(moved(batch.dense, keys), wanted)


def test_no_numeric_features_are_needed():
    batch = make_batch(num_dense=0)
    assert mmoe(num_dense=0)(batch.dense, batch.sparse).shape == (6, 3)


class Around(nn.Module):
    """Makes the features of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, dense, values, lengths):
        features = KeyedJaggedTensor(keys=list(NAMES), values=values, lengths=lengths)
        return self.model(dense, features)


@pytest.mark.slow
def test_a_module_around_it_is_exported():
    batch = make_batch()
    model = mmoe()
    configs = model.tables.embedding_bag_configs()
    model.tables = CompressedEmbeddingBagCollection(configs, Unified(num_buckets=20))
    around, sparse = Around(model).eval(), make_kjt(batch.bags, NAMES)
    inputs = (batch.dense, sparse.values(), sparse.lengths())
    program = torch.export.export(around, inputs, strict=False).module()
    torch.testing.assert_close(program(*inputs), around(*inputs))


def test_every_module_of_a_meta_build_can_be_drawn_anew():
    with torch.device("meta"):
        model = mmoe()
    model._modules.pop("tables")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_units": ()}, "expert_units: expected one width or more"),
        ({"expert_units": (0,)}, "expert_units=.*widths of at least 1"),
        ({"tower_units": (0,)}, "tower_units=.*widths of at least 1"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        mmoe(**settings)


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_what_rows_know():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.4, 1.5]])
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [torch.nan, torch.nan]])
    first = F.binary_cross_entropy_with_logits(logits[:2, 0], labels[:2, 0], reduction="sum") / 3
    second = F.binary_cross_entropy_with_logits(logits[1, 1], labels[1, 1]) / 3
    loss = MultiTaskLoss((0.5, 4))
    torch.testing.assert_close(loss.each(logits, labels), torch.stack([first, second]))
    torch.testing.assert_close(loss(logits, labels), 0.5 * first + 4 * second)


def test_parts_of_a_batch_have_the_loss_of_the_whole_whatever_they_know():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 2), torch.randint(0, 2, (8, 2)).float()
    labels[:5, 1] = torch.nan  # nothing in the first half
    loss = MultiTaskLoss((1, 2))
    halves = [loss(logits[part], labels[part]) for part in (slice(4), slice(4, None))]
    torch.testing.assert_close(sum(halves) / 2, loss(logits, labels))
    nothing = loss(logits[:0], labels[:0])
    assert nothing == 0


def test_labels_that_nobody_knows_and_tasks_of_no_weight_pull_at_nothing():
    model, batch = mmoe(num_tasks=2), make_batch()
    labels = torch.ones(6, 2)
    labels[:, 1] = torch.nan
    for loss, own in ((MultiTaskLoss((1, 1)), labels), (MultiTaskLoss((1, 0)), torch.ones(6, 2))):
        model.zero_grad()
        loss(model(batch.dense, batch.sparse), own).backward()
        used, unused = model.towers.towers
        assert all(bool(p.grad.abs().sum() > 0) for p in used.parameters())
        assert not any(bool(p.grad.abs().any()) for p in unused.parameters())


@pytest.mark.parametrize(
    "weights", [(), (0, 0), (1, -1), (1, float("nan")), (float("inf"),), ("a", 1), None]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match="weights: expected a finite number of at least 0"):
        MultiTaskLoss(weights)


def test_labels_are_zeros_and_ones_of_any_type_and_nothing_else():
    logits, loss = torch.randn(5, 2), MultiTaskLoss([1.0, 2.0])
    labels = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
    wanted = loss(logits, labels.float())
    assert torch.equal(loss(logits, labels), wanted) and torch.equal(
        loss(logits, labels.bool()), wanted
    )
    for odd in (2.0, -0.5, torch.inf):
        spoilt = labels.float()
        spoilt[3, 1] = odd
        with pytest.raises(ValueError, match=f"row 3 has {odd:g} for task 1"):
            loss(logits, spoilt)


def test_a_logit_whose_label_nobody_knows_does_not_matter():
    logits = torch.tensor([[0.5, torch.inf], [0.1, -1.0]], requires_grad=True)
    labels = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    loss = MultiTaskLoss([1.0, 1.0])(logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad[0, 1] == 0


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 2\), got \(4, 2\) and \(4,\)"):
        MultiTaskLoss((1, 1))(torch.zeros(4, 2), torch.zeros(4))


# --- sharded, and on compressed tables ---------------------------------------------------------------


class Summed(MMoE):
    """All logits of a row as one number, for a check that wants one."""

    def forward(self, dense, sparse):
        return super().forward(dense, sparse).sum(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummedConfig(ModelConfig):
    """Builds it."""

    def _build(self, inputs, tables, first_order):
        return Summed(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            **SIZES,
        )


@pytest.mark.slow
def test_sharded_and_pipelined_training_equals_the_whole_model(workers):
    config = SummedConfig()
    assert build(config).experts.gates.out_features == 12
    losses, logits = train_whole(config)
    for rank, found in enumerate(workers.run(2, train_sharded, config)):
        pipelined, sharded_losses, sharded_logits = found
        assert pipelined == 1
        torch.testing.assert_close(sharded_losses, losses[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sharded_logits, logits[rank], rtol=1e-4, atol=1e-5)


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("two_tasks", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_tasks"] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["two_tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["unified", "low_dim"])
def test_a_label_that_few_rows_know_gains_by_one_that_all_know(example, method, seed, tmp_path):
    log = example.Log.generated(24_000, seed)
    train, test = log.part(slice(20_000)), log.part(slice(20_000, None))
    scores = {}
    for weights in ((0, 1), (1, 5)):
        torch.manual_seed(seed)
        collection = example.tables(method, "20%")
        model = example.trained(collection, train, weights, epochs=3, seed=seed)
        scores[weights] = example.aucs(model, test)
    assert scores[1, 5]["purchase"] > scores[0, 1]["purchase"] + 0.03
    assert scores[1, 5]["click"] > 0.65
    # The tables as an artefact, in the place of those that were trained.
    wanted = model(test.dense, test.features())
    embcomp.save(collection, tmp_path / "artefact")
    model.tables = embcomp.load(tmp_path / "artefact")
    torch.testing.assert_close(model(test.dense, test.features()), wanted)


def test_the_example_is_a_command(example, capsys):
    assert example.main(["--rows", "600", "--budget", "30%"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["clicks alone", "purchases alone", "both"]
    assert example.main(["--rows", "600", "--weights", "0,0"]) == 1
    assert "weights: expected a finite number" in capsys.readouterr().err
