"""Bags that rows share are looked up and combined once, and learn as if each row had its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embcomp
from embcomp import CompressedEmbeddingBagCollection
from embcomp.collection.batch_shapes import expanded
from embcomp.testing.cases import learning
from embcomp.testing.check_data import plain_tables
from tests.helpers.backends_under_test import CASES

BATCH, VALUES = 40, 16  # rows of the batch; values of its 3 bags of f0, 4 of f1, 2 of f2
EVERY_ROW = {  # what they draw or learn depends on how often a batch has a value
    *("adapt", "adapt_zero", "cafe"),
    *("lr2vq", "lr2vq_folded", "lr2vq_line", "lr2vq_table"),
    *("matryoshka", "optembed", "optembed_rows"),
}


def deduplicated(*, weighted=False):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 1, 3, 1, 0, 2, 4, 2, 1])
    rows = [torch.randint(bags, (BATCH,), generator=generator) for bags in (3, 4, 2)]
    return KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.randint(60, (VALUES,), generator=generator),
        weights=torch.rand(VALUES, generator=generator) if weighted else None,
        lengths=lengths,
        stride_per_key_per_rank=[[3], [4], [2]],
        inverse_indices=(["f2", "f0", "f1"], torch.stack([rows[2], rows[0], rows[1]])),
    )


def collection(case, *, weighted=False):
    torch.manual_seed(0)
    tables = [t.bag() for t in plain_tables(dim=16, rows=(60, 90, 75))]
    made = CompressedEmbeddingBagCollection(tables, CASES[case].config, is_weighted=weighted)
    learning(made)
    return made


def step(tables, features):
    """The answer, gradients and learnt state of one training step."""
    target = torch.linspace(-1, 1, 48)
    answer = tables(features).values()
    loss = (answer - target).square().mean(1).sum()
    penalty = tables.penalty()
    if (total := loss if penalty is None else loss + penalty).requires_grad:
        total.backward()
    tables.settle()
    found = {"answer": answer.detach(), "loss": total.detach()}
    found |= {
        f"gradient of {n}": p.grad for n, p in tables.named_parameters() if p.grad is not None
    }
    return found | {n: t for n, t in tables.state_dict().items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("case", CASES)
def test_every_method_learns_of_shared_bags_as_of_repeated_ones(case, weighted):
    ours, other = (collection(case, weighted=weighted) for _ in range(2))
    features = deduplicated(weighted=weighted)
    found, wanted = step(ours, features), step(other, expanded(features))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=partial("{}: {}".format, name))


def looked_up(tables, features):
    """How many physical rows are read."""
    pooled, unpooled, _ = tables.route(features)
    return sum(part.values().numel() for part in (pooled, unpooled) if part is not None)


@pytest.mark.parametrize("case", CASES)
def test_values_of_shared_bags_are_looked_up_once(case):
    tables = collection(case)
    features = deduplicated()
    repeated = expanded(features)
    assert repeated.values().numel() > 6 * VALUES
    for training in (True, False):
        tables.train(training)
        if training and case in EVERY_ROW:
            assert looked_up(tables, features) == looked_up(tables, repeated)
        else:
            assert looked_up(tables, features) * 6 < max(1, looked_up(tables, repeated))


@pytest.mark.parametrize("dims", [(8, 8), (8, 3)], ids=["of one width", "of two"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_an_artefact_and_torchscript_hand_out_shared_bags(tmp_path, dims, pooling):
    configs = [
        EmbeddingBagConfig(
            name=name, num_embeddings=60, embedding_dim=dim, feature_names=[name], pooling=pooling
        )
        for name, dim in zip(("f2", "f0"), dims)
    ]
    tables = CompressedEmbeddingBagCollection(configs).eval()
    features = deduplicated()
    wanted = tables(expanded(features)).values()
    assert wanted.shape == (BATCH, sum(dims))
    embcomp.save(tables, tmp_path / "artefact")
    served = embcomp.load(tmp_path / "artefact")
    assert served.fused is not None  # which takes rectangles alone
    for found in (tables, served, torch.jit.script(tables)):
        torch.testing.assert_close(found(features).values(), wanted)


def test_rows_of_bags_that_are_not_there_are_refused():
    tables = collection("full")
    for odd in (-1, 3):
        features = deduplicated()
        features.inverse_indices()[1][1, 5] = odd  # of f0
        with pytest.raises(ValueError, match=rf"feature f0 must be in \[0, 3\).*row 5 has {odd}"):
            tables(features)


def test_bags_that_no_row_has_may_outnumber_the_rows():
    tables = collection("full")
    features = deduplicated()
    names, rows = features.inverse_indices()
    few = KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        stride_per_key_per_rank=[[3], [4], [2]],
        inverse_indices=(names, rows[:, :2]),
    )
    assert torch.equal(tables(few).values(), tables(features).values()[:2])
