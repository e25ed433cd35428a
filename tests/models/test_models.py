"""What every model promises, whatever its formula."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.types import LazyNoWait

from embcomp import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, Full
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import bind_dataclass
from embcomp.models import MODELS, AutoIntConfig, FMConfig, LRConfig, ModelConfig, ModelInputs
from tests.helpers.model_cases import (
    CASES,
    CONFIGS,
    DIM,
    NAMES,
    build,
    make_batch,
    make_kjt,
    make_tables,
)

every_model = pytest.mark.parametrize("config", CONFIGS, ids=str)


def logits_of(model: nn.Module, num_dense: int = 2) -> Tensor:
    batch = make_batch(num_dense=num_dense)
    with torch.no_grad():
        return model.eval()(batch.dense, batch.sparse)


def test_every_registered_model_has_a_test_case_and_each_case_is_registered():
    assert set(CASES) == set(MODELS)
    for name, configs in CASES.items():
        assert configs
        assert {type(config) for config in configs} == {MODELS[name]}


def test_the_documentation_names_every_model_and_every_setting():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name, config in MODELS.items():
        assert f"`{name}`" in text
        for field in dataclasses.fields(config):
            assert f"`{field.name}`" in text, f"{name}: {field.name}"


@pytest.mark.parametrize("name", MODELS)
def test_defaults_of_the_settings_are_those_of_the_network(name: str):
    if name == "autoint_plus":  # the same network as autoint, with other defaults
        return
    config = MODELS[name]()
    network = type(build(config))
    parameters = inspect.signature(network.__init__).parameters
    for field in dataclasses.fields(config):
        if field.name != "use_wide":  # the network is given the tables, or not
            assert parameters[field.name].default == field.default, field.name


@every_model
def test_logits_are_one_finite_number_per_row(config: ModelConfig):
    logits = logits_of(build(config))
    assert logits.shape == (6,)
    assert torch.isfinite(logits).all()
    assert len(logits.unique()) == 6


@every_model
@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_gradient_reaches_every_parameter(config: ModelConfig, unpooled: bool):
    model = build(config, unpooled=unpooled)
    batch = make_batch(batch_size=64)
    (model(batch.dense, batch.sparse) * torch.linspace(1, 2, 64)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_model
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_unpooled_rows_give_the_logits_of_pooled_ones(config: ModelConfig, pooling):
    pooled = logits_of(build(config, pooling=pooling))
    unpooled = logits_of(build(config, pooling=pooling, unpooled=True))
    torch.testing.assert_close(unpooled, pooled)


@every_model
@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_the_order_of_tables_and_keys_does_not_matter(config: ModelConfig, unpooled: bool):
    model = build(config, unpooled=unpooled).eval()
    moved = build(config, unpooled=unpooled, names=("tag", "user", "item")).eval()
    batch = make_batch()
    expected = model(batch.dense, batch.sparse)
    torch.testing.assert_close(moved(batch.dense, batch.sparse), expected)
    other_keys = make_kjt(batch.bags, ("item", "tag", "user"))
    torch.testing.assert_close(moved(batch.dense, other_keys), expected)


@every_model
def test_no_numeric_features_are_needed(config: ModelConfig):
    model = build(config, num_dense=0)
    assert logits_of(model, num_dense=0).shape == (6,)
    assert not any("numeric" in name or "bottom" in name for name, _ in model.named_parameters())


@every_model
def test_one_row_gets_the_logit_that_it_gets_in_a_batch(config: ModelConfig):
    model = build(config).eval()
    batch = make_batch()
    last = {name: bags[-1:] for name, bags in batch.bags.items()}
    alone = model(batch.dense[-1:], make_kjt(last, NAMES))
    torch.testing.assert_close(alone, model(batch.dense, batch.sparse)[-1:])


@every_model
@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_compressed_collections_serve_as_tables(config: ModelConfig, unpooled: bool):
    def compressed(dim: int) -> nn.Module:
        plain: Any = make_tables(dim, unpooled=unpooled)
        if unpooled:
            return CompressedEmbeddingCollection(plain.embedding_configs(), Full())
        return CompressedEmbeddingBagCollection(plain.embedding_bag_configs(), Full())

    model = config.build(
        ModelInputs(NAMES, DIM, 2),
        compressed(DIM) if config.uses_embeddings else None,
        compressed(1) if config.uses_first_order else None,
    )
    assert logits_of(model).isfinite().all()


class Lazy(nn.Module):
    """Tables that answer with an awaitable, as sharded ones do."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.inner = tables

    def forward(self, sparse):
        return LazyNoWait(self.inner(sparse))


@every_model
@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_awaitable_embeddings_are_waited_for(config: ModelConfig, unpooled: bool):
    expected = logits_of(build(config, unpooled=unpooled))
    model = build(config, unpooled=unpooled)
    for name in ("tables", "first_order_tables"):
        tables = model._modules.get(name)
        if tables is not None:
            model._modules[name] = Lazy(tables)
    torch.testing.assert_close(logits_of(model), expected)


@every_model
def test_a_build_on_meta_is_initialised_by_reset_parameters(config: ModelConfig):
    inputs = ModelInputs(NAMES, DIM, 2)
    with torch.device("meta"):
        model = config.build(
            inputs,
            make_tables(DIM, device="meta") if config.uses_embeddings else None,
            make_tables(1, device="meta") if config.uses_first_order else None,
        )
    model._modules.pop("tables", None)
    model._modules.pop("first_order_tables", None)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    module: Any
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        level = "norm" in name or "bias" in name or name == "linear.numeric.weight"
        assert level or parameter.numel() == 1 or parameter.std() > 0, name


@every_model
def test_settings_survive_a_trip_through_yaml_values(config: ModelConfig):
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    assert bind_dataclass(type(config), values) == config


def test_tables_are_asked_for_only_when_used():
    inputs = ModelInputs(NAMES, DIM, 2)
    with pytest.raises(ConfigError, match=r"tables: FMConfig\(\) takes a collection .* got None"):
        FMConfig().build(inputs, None, make_tables(1))
    with pytest.raises(ConfigError, match=r"first_order: FMConfig\(\) takes a collection"):
        FMConfig().build(inputs, make_tables(DIM), None)
    with pytest.raises(ConfigError, match="first_order: AutoIntConfig.* takes None"):
        AutoIntConfig().build(inputs, make_tables(DIM), make_tables(1))
    with pytest.raises(ConfigError, match=r"tables: LRConfig\(\) takes None"):
        LRConfig().build(inputs, make_tables(DIM), make_tables(1))


@pytest.mark.parametrize("unpooled", [False, True], ids=["pooled", "unpooled"])
def test_tables_that_do_not_fit_are_named_before_training(unpooled: bool):
    inputs = ModelInputs((*NAMES, "city"), DIM, 2)
    config = AutoIntConfig()
    with pytest.raises(ConfigError, match=r"tables: .* none serves \['city'\]"):
        config.build(inputs, make_tables(DIM, unpooled=unpooled), None)
    with pytest.raises(ConfigError, match="expected embedding_dim=4 for every feature, got .*8"):
        config.build(ModelInputs(NAMES, DIM, 2), make_tables(8, unpooled=unpooled), None)


@every_model
def test_numeric_values_of_another_width_are_refused(config: ModelConfig):
    batch = make_batch(num_dense=3)
    with pytest.raises(ValueError, match=r"expected dense of shape \(B, 2\), got \(6, 3\)"):
        build(config)(batch.dense, batch.sparse)
