"""What a table may be, and what its user hears when it may not."""

from __future__ import annotations

import math

import pytest
import torch
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from embcomp.errors import ConfigError
from embcomp.tables.specs import (
    LookupKey,
    PhysicalTable,
    SkipEmptyShards,
    TableSpec,
    UniformInit,
    padded_dim,
    specs_from_configs,
    splits_by_rows,
)


def bag(name="t", rows=10, dim=4, **more):
    return EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=["f"], **more
    )


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
@pytest.mark.parametrize("key", ["num_embeddings", "embedding_dim"])
def test_sizes_must_be_positive_integers(key, value):
    sizes = {"num_embeddings": 10, "embedding_dim": 4, key: value}
    with pytest.raises(
        ConfigError, match=rf"table 'C7': {key} must be a positive int, got {value}"
    ):
        TableSpec(name="C7", feature_names=("f",), **sizes)


@pytest.mark.parametrize("rows", [0, -3])
def test_torchrec_configs_with_bad_rows_are_refused_by_name(rows):
    config = bag("C7")
    config.num_embeddings = rows  # TorchRec itself refuses it only where it draws the weights
    with pytest.raises(ConfigError, match=f"table 'C7'.*got {rows}"):
        specs_from_configs([config])


@pytest.mark.parametrize("dim", [0, -4])
def test_torchrec_configs_with_bad_widths_are_refused_by_name(dim):
    config = bag("C7")
    config.embedding_dim = dim  # what an int field of a mutable dataclass may end up as
    with pytest.raises(ConfigError, match=f"table 'C7'.*embedding_dim.*got {dim}"):
        specs_from_configs([config])


def test_duplicate_names_are_refused():
    with pytest.raises(ConfigError, match="got twice: a, b"):
        specs_from_configs([bag("a"), bag("b"), bag("a"), bag("b"), bag("c")])


@pytest.mark.parametrize("name", ["user.id", "", "."])
def test_names_that_are_no_module_names_are_refused(name):
    with pytest.raises(ConfigError, match="table name"):
        specs_from_configs([bag(name)])


def test_a_spec_reads_all_that_matters_of_a_config():
    config = EmbeddingBagConfig(
        name="t",
        num_embeddings=100,
        embedding_dim=6,
        feature_names=["f", "g"],
        pooling=PoolingType.MEAN,
        data_type=DataType.FP16,
        weight_init_min=-0.3,
        weight_init_max=0.3,
    )
    (spec,) = specs_from_configs([config])
    assert spec.feature_names == ("f", "g")
    assert spec.mean_pooling
    assert spec.full_bytes == 100 * 6 * 2
    assert spec.init_bounds == (-0.3, 0.3)
    assert spec.init_std == pytest.approx(0.6 / math.sqrt(12))


def test_default_initialisation_is_torchrecs():
    (spec,) = specs_from_configs([bag(rows=100)])
    assert spec.init_bounds == (-0.1, 0.1)  # one over the square root of the rows


def test_features_default_to_the_tables_name():
    (spec,) = specs_from_configs([EmbeddingConfig(name="t", num_embeddings=2, embedding_dim=2)])
    assert spec.feature_names == ("t",)


def test_the_users_initialisation_is_kept():
    (spec,) = specs_from_configs([bag(init_fn=torch.nn.init.ones_)])
    assert spec.init_fn is torch.nn.init.ones_


def test_lower_precisions_are_refused():
    with pytest.raises(ConfigError, match="trained in FP32 or FP16"):
        specs_from_configs([bag(data_type=DataType.INT8)])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (LookupKey("users", "user_id"), "users/user_id#0"),
        (LookupKey("a/b#1", "x#2/y", 3), "a/b#1/x#2/y#3"),
    ],
)
def test_a_look_up_goes_to_torchrec_under_its_table_feature_and_part(key, name):
    assert str(key) == f"{key}" == name
    table = PhysicalTable(
        name="p", num_embeddings=3, embedding_dim=4, lookups=(key,), init_fn=UniformInit(0, 1)
    )
    assert table.keys == (name,)
    assert table.config().feature_names == [name]


def test_tables_whose_look_ups_would_have_one_name_are_refused():
    configs = [bag("a/b"), bag("a")]
    configs[0].feature_names, configs[1].feature_names = ["c"], ["b/c"]
    with pytest.raises(ConfigError, match=r"'a/b' and 'a': .* under one name, 'a/b/c#0'; rename"):
        specs_from_configs(configs)


@pytest.mark.parametrize(("dim", "padded"), [(1, 4), (3, 4), (4, 4), (5, 8), (10, 12), (16, 16)])
def test_widths_are_padded_to_multiples_of_4(dim, padded):
    assert padded_dim(dim) == padded
    table = PhysicalTable(
        name="p",
        num_embeddings=3,
        embedding_dim=dim,
        lookups=(LookupKey("t", "f"),),
        init_fn=UniformInit(0, 1),
    )
    assert table.config().embedding_dim == padded
    assert table.config().pooling is PoolingType.SUM


def test_uniform_initialisation_ignores_the_shards_shape():
    torch.manual_seed(0)
    for shape in ((20_000, 1), (10, 2_000), (20_000,)):
        weight = UniformInit.with_std(0.01)(torch.empty(shape))
        assert weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert weight.abs().max().item() <= 0.01 * 3**0.5


def test_empty_shards_never_reach_the_users_initialisation():
    def refuse(weight):
        raise RuntimeError("xavier wants two dimensions")

    assert SkipEmptyShards(refuse)(torch.empty(0)).numel() == 0
    with pytest.raises(RuntimeError, match="xavier"):
        SkipEmptyShards(refuse)(torch.empty(1, 1))


def test_a_table_splits_by_rows_where_every_rank_gets_some():
    for rows in range(1, 40):
        for ranks in range(1, 9):
            block = math.ceil(rows / ranks)
            starts = [rank * block for rank in range(ranks)]
            assert splits_by_rows(rows, ranks) == all(start < rows for start in starts)
