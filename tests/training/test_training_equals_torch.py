"""Sharded, fused, lazily decayed training against plain torch on whole tables."""

from __future__ import annotations

import pytest
import torch

from embcomp.training import load_model
from tests.helpers.training_cases import (
    first_weights,
    toy_config,
    train_and_load,
    train_on_ranks,
    train_with_plain_torch,
    write_dataset,
)

pytestmark = pytest.mark.slow

SGD = "train.row_optimizer={name: sgd, learning_rate: 0.5, weight_decay: 0.02}"
ADAGRAD = "train.row_optimizer={name: adagrad, learning_rate: 0.1}"
ROWWISE = "train.row_optimizer={name: rowwise_adagrad, learning_rate: 0.1, weight_decay: 0.05}"
DENSE = "train.row_optimizer={name: adam, mode: dense, learning_rate: 0.01, l2: 0.05}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = {
        key: float((found[key] - value).abs().max())
        for key, value in expected.items()
        if not torch.allclose(found[key], value, rtol=1e-4, atol=2e-6)
    }
    assert not wrong


@pytest.mark.parametrize(
    "overrides",
    [
        (SGD, "train.epochs=2", "train.eval_every=1000"),
        (SGD, "train.warmup_steps=7", "train.clip_norm=0.05"),
        (ROWWISE,),
        (ADAGRAD,),
        (DENSE, "train.clip_norm=0.05", "train.epochs=2", "train.eval_every=1000"),
        (ROWWISE, "train.sharding=data_parallel"),
    ],
    ids=["sgd lazy decay", "sgd warmup clip", "rowwise", "adagrad", "dense l2 clip", "replicated"],
)
def test_one_process_equals_plain_torch(dataset, tmp_path, overrides):
    config = toy_config(dataset, *overrides)
    expected = train_with_plain_torch(config, world_size=1)
    assert any(not torch.equal(v, expected[k]) for k, v in first_weights(config).items())
    assert_equal(train_and_load(config, tmp_path), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        (SGD, "train.sharding=row_wise"),
        (SGD, "train.sharding=table_wise"),
        (ROWWISE, "train.sharding=auto"),
        (ROWWISE, "train.sharding=data_parallel"),
        (ADAGRAD, "train.sharding=column_wise"),
        (DENSE, "train.clip_norm=0.05"),
    ],
    ids=["row-wise", "table-wise", "auto", "replicated", "column-wise", "dense"],
)
def test_two_ranks_equal_plain_torch_on_the_same_batches(workers, dataset, tmp_path, overrides):
    config = toy_config(dataset, *overrides)
    workers.run(2, train_on_ranks, config, tmp_path)
    found = load_model(tmp_path / "toy").state_dict()
    assert_equal(found, train_with_plain_torch(config, world_size=2))
