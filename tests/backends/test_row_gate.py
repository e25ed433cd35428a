"""Gates of rows: the step's stand-in gradient, norms in units of their mean, and live thresholds."""

from __future__ import annotations

import pytest
import torch

from embcomp import CompressedEmbeddingBagCollection, OptEmbed
from embcomp.backends.widths.threshold_gate import Step
from embcomp.testing.check_data import plain_tables, random_batch


def test_the_step_is_one_above_zero_only():
    u = torch.tensor([-1.0, -1e-30, 0.0, 1e-30, 2.0])
    assert Step.apply(u).tolist() == [0, 0, 0, 1, 1]


def test_the_steps_gradient_is_two_at_zero_and_falls_to_nothing_beyond_one():
    u = torch.tensor([-1.2, -0.7, -0.2, 0.0, 0.2, 0.7, 1.2], requires_grad=True)
    Step.apply(u).sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([0.0, 0.4, 1.2, 2.0, 1.2, 0.4, 0.0]))


def trained(scale, **settings):
    """A supernet's collection after one backward pass on rows of a given size."""
    torch.manual_seed(0)
    tables = plain_tables(16)
    collection = CompressedEmbeddingBagCollection(
        [table.bag() for table in tables], OptEmbed(**settings)
    ).train()
    with torch.no_grad():
        for bag in collection.unpooled_rows.embedding_bags.values():
            bag.weight.mul_(scale)
    out = collection(random_batch(tables, seed=0, batch_size=50, shape="full_bags"))
    out.values().square().sum().backward()
    return collection, collection.combine.combines["optembed"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gates_are_live_whatever_the_size_of_the_rows(scale):
    _, supernet = trained(scale, alpha=0.0, prune="rows")
    gradient = supernet.thresholds.values.grad
    # Rows of mean size are at a distance of 1, half of them within the reach of the gradient.
    assert (gradient < 0).all()  # a sum of squares falls as thresholds rise
    assert torch.isfinite(gradient).all()


def test_the_penalty_pushes_thresholds_up_and_is_there_in_training_only():
    collection, _ = trained(1.0, alpha=0.5, prune="rows")
    assert collection.penalty() is not None
    torch.testing.assert_close(collection.penalty().item(), 0.5 * 3)
    collection.eval()(random_batch(plain_tables(16), seed=0))
    assert collection.penalty() is None


def test_rows_of_zeros_are_pruned_from_the_start_and_all_others_pass():
    collection, _ = trained(1.0)
    collection.eval()
    weight = collection.unpooled_rows.embedding_bags["t0"].weight
    with torch.no_grad():
        weight[5] = 0
    masks = OptEmbed()._passing(collection.plan.tables, collection.states()[0].form)
    assert masks["t0"].whole().logical_not().nonzero().tolist() == [[5]]
    assert masks["t1"].whole().all() and masks["t2"].whole().all()
