"""Training configs: binding, overrides, suggestions, round trip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import embcomp.backends
import embcomp.models
from embcomp.config.train_config import load_config, parse_config
from embcomp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ToyFull:
    budget: str | int | None = None
    size_fields: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class ToyQR:
    num_remainders: int | None = None
    combine: str = "add"
    budget: str | int | None = None
    size_fields: ClassVar[tuple[str, ...]] = ("num_remainders",)


@dataclass(frozen=True, kw_only=True)
class ToyNet:
    layers: tuple[int, ...] = (16, 8)
    dropout: float = 0.0

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@pytest.fixture(autouse=True)
def toy_registries(monkeypatch):
    backends = {"full": ToyFull, "qr": ToyQR}
    monkeypatch.setattr(embcomp.backends, "BACKENDS", backends, raising=False)
    monkeypatch.setattr(embcomp.models, "MODELS", {"net": ToyNet}, raising=False)


def raw() -> dict:
    return {
        "name": "toy",
        "data": {"path": "data/toy"},
        "tables": {"method": {"name": "qr", "num_remainders": 4}, "overrides": {"C1": "full"}},
        "model": {"name": "net", "layers": [4, 2]},
        "train": {"row_optimizer": {"name": "sgd", "learning_rate": 0.5}},
    }


def refused(document: dict, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(document, overrides)
    return str(error.value)


def test_options_become_the_fields_of_the_named_dataclass():
    config = parse_config(raw())
    assert config.tables.method.settings == ToyQR(num_remainders=4)
    assert config.tables.overrides["C1"].settings == ToyFull()
    assert config.model.settings == ToyNet(layers=(4, 2))


def test_resolved_yaml_loads_back_equal_and_holds_the_defaults(tmp_path):
    config = parse_config(raw())
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert load_config(path).to_yaml() == config.to_yaml()
    assert "combine: add" in path.read_text()
    assert "clip_norm: null" in path.read_text()


def test_unknown_method_option_names_the_options_of_the_method():
    document = raw()
    document["tables"]["method"]["width"] = 3
    text = refused(document)
    assert "tables.method: unknown key 'width'; ToyQR takes num_remainders, combine, budget" in text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "train.epocs=3",
            "train: unknown key 'epocs' (did you mean 'epochs'?); the keys are epochs",
        ),
        ("trian.epochs=3", "unknown key 'trian' (did you mean 'train'?)"),
        ("tables.method.num_remainder=3", "(did you mean 'num_remainders'?)"),
        (
            "tables.method.name=ful",
            "unknown method 'ful' (did you mean 'full'?); the methods are full",
        ),
        ("model.name=nets", "unknown model 'nets' (did you mean 'net'?)"),
        ("tables.overrides.C2={name: full, x: 1}", "tables.overrides.C2: unknown key 'x'"),
        ("train.row_optimizer.nme=sgd", "train.row_optimizer: unknown key 'nme'"),
        (
            "train.plateau={facto: 0.5}",
            "train.plateau: unknown key 'facto' (did you mean 'factor'?)",
        ),
    ],
)
def test_unknown_keys_are_errors_that_name_the_valid_ones(override, text):
    assert text in refused(raw(), override)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs=0", "train.epochs"),
        ("tables.embedding_dim=-4", "tables.embedding_dim"),
        ("tables.embedding_dim=0", "tables.embedding_dim"),
        ("data.batch_size=many", "data.batch_size"),
        ("model.dropout=1.5", "model: dropout must be in [0, 1), got 1.5"),
        ("tables.method.num_remainders=x", "tables.method: num_remainders:"),
        ("train.row_optimizer.l2=0.1", "needs mode: dense"),
        ("train.row_optimizer.weight_decay=3", "must be below 1"),
        ("name=a/b", "folder"),
        ("train.sharding=diagonal", "train.sharding"),
        ("name", "expected key.path=value"),
        ("seed.x=3", "seed has no keys"),
        ("name={", "not valid YAML"),
    ],
)
def test_wrong_values_are_errors_that_name_the_key(override, text):
    document = raw() | {"seed": 3}
    assert text in refused(document, override)


def test_several_problems_are_reported_at_once():
    text = refused(raw(), "train.epocs=3", "data.batch_size=0")
    assert "2 problems" in text and "epocs" in text and "batch_size" in text


def test_overrides_are_parsed_as_yaml_and_go_through_the_same_checks():
    config = parse_config(
        raw(),
        ["train.early_stop.patience=3", "model.layers=[7]", "train.dense_optimizer.eps=1e-3"],
    )
    assert config.train.early_stop is not None and config.train.early_stop.patience == 3
    assert config.model.settings.layers == (7,)
    assert config.train.dense_optimizer.eps == 1e-3


def test_an_override_can_add_options_to_a_method_given_by_its_name_alone():
    document = raw()
    document["tables"]["method"] = "qr"
    config = parse_config(document, ["tables.method.num_remainders=5"])
    assert config.tables.method.settings == ToyQR(num_remainders=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "appears twice"),
        ("- 1\n", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("", "expected a mapping"),
    ],
)
def test_files_that_are_no_config_are_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "bad.yaml" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_missing_sections_are_named():
    document = raw()
    del document["data"], document["tables"]["method"]
    text = refused(document)
    assert "the key 'data' is missing" in text
    assert "tables: the key 'method' is missing" in text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train={sharding: row_wise, row_optimizer: {mode: dense}}", "data_parallel"),
        ("train={sharding: column_wise, row_optimizer: rowwise_adagrad}", "row_optimizer"),
        ("train={sharding: column_wise, row_optimizer: {}}", "number of ranks"),
        ("train={sharding: data_parallel, row_optimizer: {name: adam}}", "mode: dense"),
        ("train={sharding: data_parallel, row_optimizer: {max_gradient: 1}}", "max_gradient"),
        ("train={sharding: column_wise, row_optimizer: {name: rowwise_rmsprop_ar}}", "per piece"),
        ("train={sharding: data_parallel, row_optimizer: {name: rowwise_rmsprop_ar}}", "fused"),
        ("train.row_optimizer={name: rowwise_rmsprop_ar, mode: dense}", "needs mode: fused"),
        ("train.row_optimizer={name: rowwise_rmsprop_ar, min_shrinkage: 2}", "min_shrinkage"),
        (
            "train.row_optimizer={name: adagrad, ar_alpha: 0.1}",
            "ar_alpha belongs to name: rowwise_rmsprop_ar",
        ),
    ],
)
def test_rows_that_cannot_be_sharded_so_are_refused_before_training(override, text):
    assert text in refused(raw(), override)


def test_settings_of_one_row_optimizer_are_not_written_with_others():
    override = "train.row_optimizer={name: rowwise_rmsprop_ar, ar_alpha: 0.25}"
    config = parse_config(raw(), [override])
    own = config.model_dump(mode="json")["train"]["row_optimizer"]
    assert [own[key] for key in ("ar_alpha", "ema_beta", "min_shrinkage")] == [0.25, 0.99, 0.1]
    assert parse_config(config.model_dump(mode="json")) == config
    assert "ema_beta" not in parse_config(raw()).to_yaml()


def test_the_budget_of_the_tables_sizes_the_method_and_is_written_once():
    document = raw()
    document["tables"] |= {"method": "qr", "budget": "10%"}
    config = parse_config(document)
    assert config.tables.method.settings == ToyQR(budget="10%")
    assert config.to_yaml().count("10%") == 1
    assert (
        parse_config(config.model_dump(mode="json"), ["tables.budget=20%"]).tables.budget == "20%"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("tables.budget=64MiB", "give either budget or method.num_remainders"),
        ("tables={method: qr, budget: 64XB}", "tables.budget: expected a positive number"),
        ("tables={method: qr, budget: -1}", "tables.budget: expected a positive number"),
        ("tables={method: qr, budget: 1.5}", "tables.budget: expected a positive number"),
    ],
)
def test_budgets_that_cannot_be_meant_are_refused_once(override, text):
    message = refused(raw(), override)
    assert text in message and "problems" not in message
