"""Layers of the models: semantics beyond the formulas, initial scale, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torchrec import JaggedTensor, KeyedTensor

from embcomp.errors import ConfigError
from embcomp.models import (
    AutoInt,
    AutoIntConfig,
    AutoIntPlusConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    FiBiNETConfig,
    FinalMLPConfig,
    FMConfig,
    GDCNConfig,
    MaskNetConfig,
    ModelConfig,
    ModelInputs,
    PNNConfig,
    WideDeepConfig,
    XDeepFMConfig,
)
from embcomp.models.fields import FeatureStack, FieldEmbeddings, FirstOrder, NumericVectors
from embcomp.models.layers import (
    MLP,
    CrossNet,
    FactorizationMachine,
    InteractingLayer,
    LowRankCrossLayer,
    LowRankCrossNet,
    PairwiseDots,
    XavierLinear,
)
from tests.helpers.model_cases import NAMES, make_batch, make_tables


def keyed(keys: list[str], widths: list[int], batch_size: int = 3) -> KeyedTensor:
    values = torch.arange(float(batch_size * sum(widths))).view(batch_size, -1)
    return KeyedTensor(keys=keys, length_per_key=widths, values=values)


def test_stack_picks_by_key_and_notices_when_the_order_changes():
    stack = FeatureStack(["b", "a"], 2)
    for keys in (["a", "b"], ["b", "a"], ["c", "b", "a"], ["a", "b"]):
        pooled = keyed(keys, [2] * len(keys))
        expected = torch.stack([pooled["b"], pooled["a"]], dim=1)
        assert torch.equal(stack(pooled), expected)


def test_stack_names_features_that_the_tables_do_not_return():
    with pytest.raises(ValueError, match=r"nothing for \['a'\], but \['a@t', 'b'\].*feature@table"):
        FeatureStack(["a", "b"], 2)(keyed(["b", "a@t"], [2, 2]))
    with pytest.raises(ValueError, match=r"nothing for \['a'\], but \['b'\]"):
        FeatureStack(["a", "b"], 2)(
            {"b": JaggedTensor(torch.zeros(1, 2), lengths=torch.tensor([1]))}
        )


def test_stack_names_features_of_another_width():
    with pytest.raises(ValueError, match=r"width 2 from the tables, got \{'b': 3\}"):
        FeatureStack(["a", "b"], 2)(keyed(["a", "b"], [2, 3]))
    with pytest.raises(ValueError, match="width 2 from the tables, got 3"):
        FeatureStack(["a"], 2)({"a": JaggedTensor(torch.zeros(1, 3), lengths=torch.tensor([1]))})


def test_stack_refuses_what_is_no_collection_output():
    with pytest.raises(TypeError, match="KeyedTensor or a dict of JaggedTensor, got Tensor"):
        FeatureStack(["a"], 2)(torch.zeros(3, 2))


@pytest.mark.parametrize(("pooling", "expected"), [("sum", 6.0), ("mean", 2.0)])
def test_unpooled_bags_are_pooled_and_empty_ones_are_zero(pooling, expected: float):
    rows = JaggedTensor(
        torch.tensor([[1.0], [2.0], [3.0], [5.0]]),
        lengths=torch.tensor([3, 0, 1], dtype=torch.int32),
    )
    stacked = FeatureStack(["a"], 1, pooling=pooling)({"a": rows})
    assert stacked.flatten().tolist() == [expected, 0.0, 5.0]


def test_unpooled_batch_of_empty_bags_is_zero():
    rows = JaggedTensor(torch.zeros(0, 2), lengths=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(FeatureStack(["a"], 2)({"a": rows}), torch.zeros(3, 1, 2))


def test_fields_are_the_numeric_ones_then_the_features_as_asked():
    fields = FieldEmbeddings(["b", "a"], 2, 2)
    dense = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])
    pooled = keyed(["a", "b"], [2, 2])
    out = fields(dense, pooled)
    assert out.shape == (3, 4, 2)
    assert fields.numeric is not None
    torch.testing.assert_close(out[:, 1], dense[:, 1:] * fields.numeric.weight[1])
    assert torch.equal(out[:, 2], pooled["b"])
    assert torch.equal(out[:, 3], pooled["a"])


def test_order_of_fields_is_kept_by_a_copy_on_another_device():
    stack = FeatureStack(["b", "a"], 2)
    stack(keyed(["a", "b"], [2, 2]))
    moved = keyed(["a", "b"], [2, 2]).to("meta")
    assert stack(moved).device.type == "meta"


def test_linear_layers_and_numeric_vectors_start_xavier_normal():
    torch.manual_seed(0)
    linear = XavierLinear(200, 300)
    assert abs(linear.weight.std().item() - (2 / 500) ** 0.5) < 1e-3
    assert not linear.bias.any()
    vectors = NumericVectors(5_000, 15).weight
    assert abs(vectors.std().item() - (2 / 16) ** 0.5) < 5e-3
    assert FirstOrder(["a"], 0, bias=True).bias == 0
    assert not FirstOrder(["a"], 3, bias=True).numeric.weight.any()
    expert = LowRankCrossLayer(100, 60, 4)
    assert abs(expert.down.std().item() - (2 / 160) ** 0.5) < 3e-3
    assert abs(expert.up.std().item() - (2 / 160) ** 0.5) < 3e-3
    assert abs(expert.core.std().item() - (2 / 120) ** 0.5) < 3e-3


@pytest.mark.parametrize(
    "config",
    [
        FMConfig(),
        DeepFMConfig(),
        XDeepFMConfig(cin_units=(8, 8)),
        PNNConfig(),
        FiBiNETConfig(excitation="sigmoid"),
    ],
    ids=["fm", "deepfm", "xdeepfm", "pnn", "fibinet"],
)
def test_products_of_large_values_do_not_start_as_large_logits(config):
    """Logarithms of counts are as large as ten, and sums of their products a hundred times that."""
    torch.manual_seed(0)
    tables, first_order = (make_tables(width).requires_grad_(False) for width in (16, 1))
    for weight in (*tables.parameters(), *first_order.parameters()):
        weight.zero_()
    inputs = ModelInputs(NAMES, 16, num_dense=13)
    model = config.build(inputs, tables, first_order if config.uses_first_order else None)
    logits = model(torch.full((6, 13), 8.0), make_batch().sparse)
    assert logits.abs().max() < 2


@pytest.mark.parametrize(
    "layer",
    [InteractingLayer(4, 8, 2, dropout=0.5), MLP(4, [8], 8, dropout=0.5)],
    ids=["attention", "mlp"],
)
def test_dropout_acts_in_training_only(layer: nn.Module):
    torch.manual_seed(0)
    fields = torch.randn(2, 5, 4)
    layer.train()
    assert not torch.equal(layer(fields), layer(fields))
    layer.eval()
    assert torch.equal(layer(fields), layer(fields))


def test_attention_dropout_keeps_the_expected_value():
    torch.manual_seed(0)
    layer = InteractingLayer(4, 4, 1, use_residual=False, dropout=0.5)
    with torch.no_grad():
        layer.value.weight.abs_()  # positive outputs, which the ReLU leaves alone
    fields = torch.rand(1, 5, 4)
    layer.eval()
    expected = layer(fields)
    layer.train()
    drawn = layer(fields.expand(4000, -1, -1)).mean(0, keepdim=True)
    torch.testing.assert_close(drawn, expected, rtol=0.05, atol=0.02)


def test_attention_is_unscaled_unless_asked():
    torch.manual_seed(0)
    plain = InteractingLayer(4, 8, 2)
    scaled = InteractingLayer(4, 8, 2, use_scale=True)
    scaled.load_state_dict(plain.state_dict())
    fields = torch.randn(3, 5, 4)
    assert not torch.allclose(plain(fields), scaled(fields))
    with torch.no_grad():
        plain.query.weight.div_(2.0)  # the square root of a head's width
    torch.testing.assert_close(plain(fields), scaled(fields))


def test_residual_is_mapped_only_where_widths_differ():
    assert InteractingLayer(4, 8, 2).residual is not None
    assert InteractingLayer(8, 8, 2).residual is None
    assert InteractingLayer(4, 8, 2, use_residual=False).residual is None
    biases = [name for name, _ in InteractingLayer(4, 8, 2).named_parameters() if "bias" in name]
    assert biases == []


def test_mlp_orders_linear_norm_relu_dropout_and_ends_linear():
    kinds = [type(layer) for layer in MLP(4, [8], 1, batch_norm=True, dropout=0.1)]
    assert kinds == [XavierLinear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, XavierLinear]
    assert [type(layer) for layer in MLP(4, [8])] == [XavierLinear, nn.ReLU]
    assert [type(layer) for layer in MLP(4, [], 1)] == [XavierLinear]


def test_low_rank_crosses_of_full_rank_span_the_input():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    for net in (CrossNet(6, 2), LowRankCrossNet(6, 2, low_rank=3, num_experts=2)):
        out = net(x)
        assert out.shape == x.shape
        assert torch.equal(net(torch.zeros(1, 6)), torch.zeros(1, 6))


def test_pairs_are_counted_once_each():
    torch.manual_seed(0)
    fields = torch.randn(3, 4, 2)
    products = PairwiseDots()(fields)
    expected = [(fields[:, i] * fields[:, j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(products, torch.stack(expected, dim=1))
    torch.testing.assert_close(FactorizationMachine()(fields), products.sum(1))


BAD_SETTINGS = [
    (AutoIntConfig, {"attention_dim": 10, "num_heads": 3}, "attention_dim=10: .* num_heads=3.* 9"),
    (AutoIntConfig, {"attention_dim": 2, "num_heads": 4}, "attention_dim=2: .*num_heads=4.* 4"),
    (AutoIntConfig, {"attention_dim": 0}, "attention_dim=0: expected an integer of at least 1"),
    (AutoIntConfig, {"num_heads": -1}, "num_heads=-1: expected an integer of at least 1"),
    (AutoIntConfig, {"attention_layers": 0}, "attention_layers=0: expected an integer"),
    (AutoIntConfig, {"attention_layers": True}, "attention_layers=True: expected an integer"),
    (AutoIntConfig, {"attention_dropout": 1.0}, r"attention_dropout=1.0: .* \[0, 1\)"),
    (AutoIntConfig, {"dnn_hidden_units": (4, 0)}, r"dnn_hidden_units=\[4, 0\]: .* got 0"),
    (AutoIntPlusConfig, {"dnn_hidden_units": ()}, "at least one hidden layer; AutoInt is"),
    (AutoIntPlusConfig, {"dropout": -0.1}, r"dropout=-0.1: expected a number in \[0, 1\)"),
    (DCNv2Config, {"structure": "both"}, "structure='both': .* 'parallel', 'stacked', 'cross'"),
    (DCNv2Config, {"hidden_units": ()}, "structure='parallel' needs at least one hidden layer"),
    (DCNv2Config, {"num_cross_layers": 0}, "num_cross_layers=0: expected an integer"),
    (DCNv2Config, {"low_rank": 0}, "low_rank=0: expected an integer of at least 1"),
    (DCNv2Config, {"num_experts": 0}, "num_experts=0: expected an integer of at least 1"),
    (DCNv2Config, {"dropout": 2}, "dropout=2: expected a number"),
    (DeepFMConfig, {"hidden_units": "400"}, "hidden_units='400': expected a list"),
    (DeepFMConfig, {"dropout": float("nan")}, "dropout=nan: expected a number"),
    (WideDeepConfig, {"hidden_units": (-4,)}, r"hidden_units=\[-4\]: .* got -4"),
    (WideDeepConfig, {"dropout": 1}, "dropout=1: expected a number"),
    (DLRMConfig, {"interaction": "sum"}, "interaction='sum': expected one of 'dot', 'cat'"),
    (DLRMConfig, {"bottom_hidden_units": (0,)}, "bottom_hidden_units"),
    (DLRMConfig, {"top_hidden_units": (1.5,)}, "top_hidden_units"),
    (DLRMConfig, {"bottom_dropout": 1.0}, "bottom_dropout"),
    (DLRMConfig, {"top_dropout": "a"}, "top_dropout='a'"),
    (
        XDeepFMConfig,
        {"cin_units": ()},
        r"cin_units=\[\]: expected at least one layer of feature maps",
    ),
    (XDeepFMConfig, {"cin_units": (4, 0)}, r"cin_units=\[4, 0\]: .* got 0"),
    (PNNConfig, {"hidden_units": 400}, "hidden_units=400: expected a list of layer widths"),
    (FiBiNETConfig, {"bilinear": "all"}, "bilinear='all': expected one of 'field_all'"),
    (FiBiNETConfig, {"excitation": "tanh"}, "excitation='tanh': expected one of 'relu', 'sigmoid'"),
    (FiBiNETConfig, {"reduction_ratio": 0}, r"reduction_ratio=0: expected in \(0, 1000\]"),
    (FiBiNETConfig, {"reduction_ratio": float("nan")}, "reduction_ratio=nan: expected"),
    (MaskNetConfig, {"structure": "stacked"}, "structure='stacked': .* 'serial', 'parallel'"),
    (MaskNetConfig, {"hidden_units": ()}, "structure='serial' needs at least one block"),
    (MaskNetConfig, {"reduction_ratio": -1.0}, "reduction_ratio=-1.0: expected"),
    (MaskNetConfig, {"num_blocks": 0}, "num_blocks=0: expected an integer of at least 1"),
    (MaskNetConfig, {"block_dim": 1.5}, "block_dim=1.5: expected an integer of at least 1"),
    (GDCNConfig, {"structure": "both"}, "structure='both': .* 'parallel', 'stacked', 'cross'"),
    (GDCNConfig, {"hidden_units": ()}, "structure='parallel' needs at least one hidden layer"),
    (GDCNConfig, {"num_cross_layers": 0}, "num_cross_layers=0: expected an integer"),
    (FinalMLPConfig, {"num_heads": 3}, r"mlp1_hidden_units=.*num_heads=3 divides, such as 399"),
    (FinalMLPConfig, {"mlp2_hidden_units": (9,), "num_heads": 2}, r"mlp2_hidden_units=\[9\]"),
    (FinalMLPConfig, {"mlp2_hidden_units": ()}, r"mlp2_hidden_units=\[\]: expected at least one"),
    (FinalMLPConfig, {"context1": "user"}, "context1='user': expected a list of names of features"),
    (
        FinalMLPConfig,
        {"context2": ("user",), "feature_selection": False},
        "context2 belongs to the gates, which feature_selection=False leaves out",
    ),
    (ModelInputs, {"feature_names": ()}, r"feature_names=\(\): .* at least one"),
    (ModelInputs, {"feature_names": ("a", "b", "a")}, r"each name once, got \['a'\]"),
    (ModelInputs, {"embedding_dim": -4}, "embedding_dim=-4: expected an integer of at least 1"),
    (ModelInputs, {"num_dense": -1}, "num_dense=-1: expected an integer of at least 0"),
    (ModelInputs, {"pooling": "max"}, "pooling='max': expected one of 'sum', 'mean'"),
]


@pytest.mark.parametrize(
    ("settings", "values", "message"), BAD_SETTINGS, ids=[str(bad[1]) for bad in BAD_SETTINGS]
)
def test_bad_setting_is_named_with_its_value_and_what_would_do(settings, values, message: str):
    if settings is ModelInputs:
        values = {"feature_names": ("a",), "embedding_dim": 4, "num_dense": 0, **values}
    with pytest.raises(ConfigError, match=message):
        settings(**values)


def test_networks_built_with_plain_values_are_checked_too():
    tables = make_tables(4)
    with pytest.raises(ConfigError, match="attention_dim=5: expected a multiple of num_heads=2"):
        AutoInt(tables, feature_names=["user"], embedding_dim=4, num_dense=0, attention_dim=5)
    with pytest.raises(ConfigError, match="at least one categorical feature"):
        AutoInt(tables, feature_names=[], embedding_dim=4, num_dense=0)
    with pytest.raises(ConfigError, match="num_dense=-1"):
        AutoInt(tables, feature_names=["user"], embedding_dim=4, num_dense=-1)


def test_dot_interaction_needs_two_fields():
    with pytest.raises(ConfigError, match="interaction='dot': expected at least two fields"):
        DLRMConfig().build(ModelInputs(("user",), 4, 0), make_tables(4), None)
    DLRMConfig(interaction="cat").build(ModelInputs(("user",), 4, 0), make_tables(4), None)
    DLRMConfig().build(ModelInputs(("user",), 4, 1), make_tables(4), None)


@pytest.mark.parametrize(("config", "tables"), [(PNNConfig(), 1), (FiBiNETConfig(), 2)])
def test_models_of_pairs_need_two_fields(config: ModelConfig, tables: int):
    collections = [make_tables(width) for width in (4, 1)][:tables] + [None] * (2 - tables)
    with pytest.raises(
        ConfigError, match=r"(pnn|fibinet): expected at least two fields.*\['user'\]"
    ):
        config.build(ModelInputs(("user",), 4, 0), *collections)
    config.build(ModelInputs(("user",), 4, 1), *collections)


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (
            {"context1": ("usr",)},
            r"context1: no categorical feature 'usr' \(did you mean 'user'\?\)",
        ),
        ({"context2": ("tag", "tag")}, "context2: expected each feature once, got 'tag'"),
        ({"gate_only": ("tag",)}, "gate_only: 'tag' is in neither context1 nor context2"),
        ({"context1": NAMES, "gate_only": NAMES}, "gate_only: expected at least one .* a field"),
    ],
)
def test_contexts_of_gates_are_checked_against_the_data(contexts, message: str):
    with pytest.raises(ConfigError, match=message):
        FinalMLPConfig(**contexts).build(ModelInputs(NAMES, 4, 0), make_tables(4), None)


def test_masks_wider_than_any_layer_are_refused_before_they_are_allocated():
    config = MaskNetConfig(hidden_units=(2**20, 4), reduction_ratio=1000.0)
    with (
        pytest.raises(
            ConfigError, match="reduction_ratio=1000.0: expected masks with at most 1,048"
        ),
        torch.device("meta"),
    ):
        config.build(ModelInputs(NAMES, 4, 0), make_tables(4, device="meta"), None)


def test_gates_without_context_learn_from_the_first_step():
    """Their vector and hidden layers would get no gradient if they started at zero."""
    torch.manual_seed(0)
    config = FinalMLPConfig(mlp1_hidden_units=(8,), mlp2_hidden_units=(8,), gate_hidden_units=(8,))
    model = config.build(ModelInputs(NAMES, 4, 0), make_tables(4), None)
    batch = make_batch(num_dense=0, batch_size=64)
    model(batch.dense, batch.sparse).sum().backward()
    for name in ("gate1.vector.weight", "gate1.network.0.weight", "gate2.vector.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_settings_are_frozen():
    config: ModelConfig = AutoIntConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.attention_dim = 3
