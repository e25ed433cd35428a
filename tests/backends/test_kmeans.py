"""k-means: its error falls, its answers repeat, and few points do to begin with."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch

from embcomp.backends.codebooks import kmeans as module
from embcomp.backends.codebooks.kmeans import kmeans
from embcomp.errors import ConfigError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_error_never_rises(dim, seed, monkeypatch):
    points = drawn(500, dim, seed=seed)
    weights = 1 / torch.arange(1, 501) ** 0.5
    monkeypatch.setattr(module, "_FIRST_LEVELS", (256,))  # all from the seeds on
    errors = kmeans(points, weights, 16, seed=seed).errors
    assert len(errors) > 3
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_the_same_seed_gives_the_same_centroids():
    points, weights = drawn(9000, 3), torch.ones(9000)
    one, same, other = (kmeans(points, weights, 20, seed=seed).centroids for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_clusters_that_are_far_apart_are_found():
    centres = 20 * drawn(12, 4, seed=5)
    points = centres.repeat(50, 1) + 0.01 * drawn(600, 4, seed=6)
    found = kmeans(points, torch.ones(600), 12, seed=0)
    assert torch.cdist(centres, found.centroids).min(1).values.max() < 0.05
    assert found.errors[-1] < 1e-3


def test_weights_pull_centroids():
    points = torch.tensor([[0.0], [1.0], [10.0]])
    heavy = kmeans(points, torch.tensor([3.0, 1.0, 1.0]), 2, seed=0).centroids
    assert sorted(heavy.flatten().tolist()) == pytest.approx([0.25, 10.0])
    without = kmeans(points, torch.tensor([0.0, 1.0, 1.0]), 2, seed=0)
    assert sorted(without.centroids.flatten().tolist()) == [1.0, 10.0]


def test_few_distinct_points_are_the_centroids():
    points = torch.tensor([[2.0, 1.0], [0.0, 5.0], [2.0, 1.0], [0.0, 4.0]])
    found = kmeans(points, torch.ones(4), 5, seed=0)
    assert found.centroids.tolist() == [[0, 4], [0, 5], [2, 1], [2, 1], [2, 1]]
    assert found.errors == (0.0,)


def test_samples_of_long_inputs_keep_what_is_heavy():
    points = drawn(20_000, 2)
    points[7] = torch.tensor([500.0, 500.0])
    weights = torch.ones(20_000)
    weights[7] = 1e4
    found = kmeans(points, weights, 4, seed=3).centroids  # 1024 of the points take part
    assert torch.cdist(points[7:8], found).min() < 1
    assert found.abs().sort(0).values[:3].max() < 3


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_beginning_with_few_points_loses_little(dim, monkeypatch):
    points, weights = drawn(6000, dim), torch.ones(6000)
    found = [kmeans(points, weights, 30, seed=seed).errors[-1] for seed in range(4)]
    monkeypatch.setattr(module, "_FIRST_LEVELS", (256,))
    patient = [kmeans(points, weights, 30, seed=seed).errors[-1] for seed in range(4)]
    assert sum(found) < 1.1 * sum(patient)


def test_errors_are_those_of_the_centroids():
    points, weights = drawn(2000, 3) + 50, torch.arange(2000) % 7
    found = kmeans(points, weights, 20, seed=0)
    gaps = torch.cdist(points.double(), found.centroids.double()).amin(1).square()
    assert found.errors[-1] == pytest.approx(float((weights * gaps).sum() / weights.sum()))


def test_equal_points_count_together():
    points = torch.cat([drawn(300, 2), drawn(300, 2), torch.tensor([[-0.0, 1.0], [0.0, 1.0]])])
    merged, weights = module._distinct(points, torch.ones(602, dtype=torch.float64))
    assert len(merged) == 301
    assert sorted(weights.tolist()) == [2] * 301
    assert torch.equal(merged.unique(dim=0), points.unique(dim=0))


def test_points_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(module, "_MULTIPLIER", 0)  # the last number alone counts
    points = torch.tensor([[1.0, 5.0], [2.0, 5.0], [1.0, 5.0]])
    merged, weights = module._distinct(points, torch.tensor([1.0, 2.0, 4.0]))
    assert merged.tolist() == [[1, 5], [2, 5]]
    assert weights.tolist() == [5, 2]


def test_faiss_is_asked_for_by_name():
    points = drawn(500, 2)
    with pytest.raises(ConfigError, match="one of torch, faiss, got 'sklearn'"):
        kmeans(points, torch.ones(500), 4, seed=0, backend="sklearn")
    if importlib.util.find_spec("faiss") is None:
        with pytest.raises(ConfigError, match="install faiss-cpu, or set clustering: torch"):
            kmeans(points, torch.ones(500), 4, seed=0, backend="faiss")
    else:
        ours = kmeans(points, torch.ones(500), 4, seed=0).errors[-1]
        theirs = kmeans(points, torch.ones(500), 4, seed=0, backend="faiss").errors[-1]
        assert theirs == pytest.approx(ours, rel=0.1)
