"""The weighted loss of a batch: a mean over its weights, whatever their scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.training.build import BatchLoss

LABELS = torch.tensor([1.0, 0, 0, 1, 1, 0, 0])
LOGITS = torch.linspace(-2, 3, 7)


def loss_and_gradient(weights: torch.Tensor | None, num_valid: int | None = None):
    sparse = KeyedJaggedTensor(keys=[], values=torch.empty(0), lengths=torch.empty(0).int())
    batch = Batch(torch.empty(7, 0), sparse, LABELS, num_valid=num_valid, weights=weights)
    logits = LOGITS.clone().requires_grad_()
    loss = BatchLoss(nn.Identity())(logits, batch)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("num_valid", [None, 6])
def test_ones_are_no_weights_to_the_bit(num_valid):
    for found, expected in zip(
        loss_and_gradient(torch.ones(7), num_valid), loss_and_gradient(None, num_valid)
    ):
        assert torch.equal(found, expected)


def test_the_loss_is_the_weighted_mean_and_a_row_of_weight_zero_has_no_gradient():
    weights = torch.tensor([0.0, 1, 2, 0.5, 10, 0, 3])
    loss, gradient = loss_and_gradient(weights)
    losses = cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(loss, (losses * weights).sum() / weights.sum())
    assert (gradient == 0).tolist() == (weights == 0).tolist()


@pytest.mark.parametrize("factor", [0.25, 3.0, 1e-30, 1e30])
def test_a_common_factor_changes_neither_loss_nor_gradient(factor):
    weights = torch.tensor([0.0, 1, 2, 0.5, 10, 0, 3])
    for found, expected in zip(loss_and_gradient(weights * factor), loss_and_gradient(weights)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_rows_that_another_rank_counts_have_no_say():
    weights = torch.tensor([1.0, 2, 1, 2, 1, 2, 1e9])
    _, gradient = loss_and_gradient(weights, num_valid=6)
    assert gradient[6] == 0 and gradient[0] != 0
    expected = loss_and_gradient(torch.tensor([1.0, 2, 1, 2, 1, 2, 0]), num_valid=6)
    assert torch.equal(gradient, expected[1])


def test_a_batch_without_any_weight_has_no_loss_and_no_gradient():
    loss, gradient = loss_and_gradient(torch.zeros(7))
    assert loss == 0 and not gradient.any()
