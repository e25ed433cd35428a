"""No setting of TorchRec's table configs is dropped in silence, whatever TorchRec adds to them."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    CountBasedEvictionPolicy,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from embcomp import CompressedEmbeddingBagCollection
from embcomp.backends import PQ, QR, Hash, LowDim, Unified
from embcomp.errors import ConfigError
from embcomp.tables.specs import specs_from_configs
from embcomp.tables.torchrec_settings import HONOURED, REFUSED

CONFIGS = (BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig)
OTHER = {
    "num_embeddings_post_pruning": 5,
    "need_pos": True,
    "input_dim": 1000,
    "total_num_buckets": 4,
    "use_virtual_table": True,
    "virtual_table_eviction_policy": CountBasedEvictionPolicy(),
    "enable_embedding_update": True,
    "stash_weights": True,
}


def config(kind=EmbeddingBagConfig, **settings):
    return kind(
        **(
            {"name": "t", "num_embeddings": 50, "embedding_dim": 4, "feature_names": ["f"]}
            | settings
        )
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_is_honoured_or_refused(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert names <= HONOURED | set(REFUSED)
    assert names | {"pooling"} == HONOURED | set(REFUSED)
    assert OTHER.keys() == REFUSED.keys()


@pytest.mark.parametrize("kind", [EmbeddingBagConfig, EmbeddingConfig])
@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_honours_is_refused_by_name(kind, name):
    specs_from_configs([config(kind)])
    with pytest.raises(ConfigError, match=f"table 't': {name} must be left at its default, got"):
        specs_from_configs([config(kind, **{name: OTHER[name]})])


def test_a_setting_of_a_torchrec_to_come_is_refused_when_it_is_used():
    @dataclasses.dataclass
    class Later(EmbeddingBagConfig):
        quota: int = 3
        labels: list = dataclasses.field(default_factory=list)

    (spec,) = specs_from_configs([config(Later)])
    assert spec.name == "t"
    for settings in ({"quota": 4}, {"labels": ["a"]}):
        with pytest.raises(ConfigError, match="this embcomp does not know it"):
            specs_from_configs([config(Later, **settings)])


def test_what_is_honoured_reaches_the_spec():
    (spec,) = specs_from_configs(
        [config(data_type=DataType.FP16, pooling=PoolingType.MEAN, weight_init_min=-2)]
    )
    assert (spec.num_embeddings, spec.embedding_dim, spec.feature_names) == (50, 4, ("f",))
    assert spec.data_type is DataType.FP16 and spec.mean_pooling
    assert spec.init_bounds == (-2, pytest.approx(50**-0.5))
    with pytest.raises(ConfigError, match="FP32 or FP16, got .*BF16; FBGEMM looks up no BF16 rows"):
        specs_from_configs([config(data_type=DataType.BF16)])


@pytest.mark.parametrize("dense", [False, True], ids=["fused", "data parallel"])
def test_nothing_below_could_train_rows_of_bf16(dense):
    """Why they are refused; it fails as soon as FBGEMM or TorchRec can do more."""
    unsharded = EmbeddingBagCollection([config(data_type=DataType.BF16)])
    assert unsharded.embedding_bags["t"].weight.dtype is torch.float16
    precision = SparseType.BF16
    if dense:
        rows = DenseTableBatchedEmbeddingBagsCodegen(
            [(50, 4)], use_cpu=True, weights_precision=precision
        )
    else:
        rows = SplitTableBatchedEmbeddingBagsCodegen(
            [(50, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], weights_precision=precision
        )
    with pytest.raises(NotImplementedError, match="BFloat16"):
        rows(torch.tensor([1, 2]), torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"weight_init_min": 0.5, "weight_init_max": 0.6}, 0.5, 0.6),
        ({"init_fn": partial(torch.nn.init.uniform_, a=-3, b=-2)}, -3, -2),
        ({"init_fn": partial(torch.nn.init.uniform_, b=0.5)}, 0, 0.5),
        ({"init_fn": torch.nn.init.uniform_}, 0, 1),
        ({"init_fn": partial(torch.nn.init.constant_, val=7)}, 7, 7),
        ({"init_fn": partial(torch.nn.init.uniform_, a=2, b=3), "weight_init_max": 0.1}, 2, 3),
    ],
)
@pytest.mark.parametrize("plan", [None, Hash(num_buckets=20, collisionless=0), LowDim(width=3)])
def test_rows_start_where_torchrec_would_start_them(plan, settings, low, high):
    collection = CompressedEmbeddingBagCollection([config(**settings)], plan)
    (rows,) = collection.parameters()
    used = rows[:, :3]
    assert bool(((used >= low) & (used <= high)).all())
    assert used.max() - used.min() >= 0.5 * (high - low)


@pytest.mark.parametrize("method", [QR(divisor=5), Unified(num_buckets=9)], ids=lambda m: m.name)
def test_an_initialisation_that_no_row_would_get_is_refused_by_name(method):
    own = config(init_fn=torch.nn.init.normal_)
    with pytest.raises(ConfigError, match=f"table 't': {method.name} draws rows of its own shape"):
        CompressedEmbeddingBagCollection([own], method)
    CompressedEmbeddingBagCollection([config()], method)


def test_a_method_that_begins_with_whole_tables_starts_them_as_asked():
    CompressedEmbeddingBagCollection(
        [config(init_fn=torch.nn.init.normal_)], PQ(subvector_dim=2, num_codewords=4)
    )
