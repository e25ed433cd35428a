"""Where TorchRec's own collection compiles as one graph, so does ours, with any method.

The KeyedJaggedTensor is made within the graph, which knows neither how many ids there are of a key nor
how many bags of a batch are empty. Tracing is what is tested, so nothing is compiled further.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.layers.learned_buffers import fill_buffers
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

TABLES = plain_tables(8)


class Within(nn.Module):
    """A collection that is given plain tensors."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, values, lengths):
        features = KeyedJaggedTensor(
            keys=["f0", "f1", "f2"], values=values, lengths=lengths, stride=6
        )
        out = self.collection(features)
        return out.values() if hasattr(out, "values") and not isinstance(out, dict) else out


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="eager")


def test_torchrecs_own_compiles():
    own = Within(EmbeddingBagCollection(tables=[table.bag() for table in TABLES]))
    batch = random_batch(TABLES, seed=0)
    found = compiled(own)(batch.values(), batch.lengths())
    torch.testing.assert_close(found, own(batch.values(), batch.lengths()))


@pytest.mark.parametrize("name", long_but(["full", "qr_mult", "coded", "low_dim_kept"], CASES))
def test_a_pooled_look_up_is_one_graph(name):
    module = Within(pooled(CASES[name], TABLES))
    fill_buffers(module)
    one = compiled(module)
    with torch.no_grad():
        for seed in (0, 1):  # which have other numbers of ids
            batch = random_batch(TABLES, seed=seed)
            wanted = module(batch.values(), batch.lengths())
            torch.testing.assert_close(one(batch.values(), batch.lengths()), wanted)


@pytest.mark.parametrize("name", ["full", "hash", "qr_mult", "coded"])
def test_an_unpooled_look_up_is_one_graph(name):
    module = Within(unpooled(CASES[name], TABLES))
    fill_buffers(module)
    batch = random_batch(TABLES, seed=0)
    with torch.no_grad():
        wanted = module(batch.values(), batch.lengths())
        found = compiled(module)(batch.values(), batch.lengths())
    for key, jagged in wanted.items():
        torch.testing.assert_close(found[key].values(), jagged.values())


@pytest.mark.parametrize("name", ["full", "unified", "qr_concat"])
def test_a_training_step_is_one_graph(name):
    module = Within(pooled(CASES[name], TABLES)).train()
    batch = random_batch(TABLES, seed=0)
    gradients = []
    for run in (module, compiled(module)):
        module.zero_grad()
        run(batch.values(), batch.lengths()).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_refuses_ids_out_of_range_and_buffers_that_nobody_filled():
    batch = random_batch(TABLES, seed=0)
    one = compiled(Within(pooled(CASES["full"], TABLES)))
    with pytest.raises(RuntimeError, match="an id of f0, f1, f2 is not in"):
        one(batch.values() + 60, batch.lengths())
    empty = Within(pooled(CASES["coded"], TABLES))
    with pytest.raises(RuntimeError, match="call the model once"):
        compiled(empty)(batch.values(), batch.lengths())
    assert torch.is_grad_enabled()  # a graph that fails restores nothing
