"""The maps that are made: equal traffic, alike rows, ids that occur together; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embcomp.errors import ConfigError
from embcomp.io.row_map_files import read_row_map, summarise_row_map
from embcomp.tools.balanced_assignment import assign_balanced
from embcomp.tools.row_maps import co_cluster_maps, frequency_map, kmeans_map, save_row_map
from tests.helpers.training_cases import write_dataset

GROUPS, EACH = 8, 30
TRUE = np.arange(GROUPS * EACH) % GROUPS


def purity(rows):
    """The share of ids in a cluster whose most are of their group."""
    table = np.zeros((rows.max() + 1, GROUPS))
    np.add.at(table, (rows, TRUE), 1)
    return table.max(axis=1).sum() / len(rows)


def test_frequent_ids_are_alone_whatever_their_numbers_and_shared_rows_have_equal_traffic():
    random = np.random.default_rng(0)
    counts = random.permutation(1_000_000 // np.arange(1, 2001))
    rows = frequency_map(counts, 100, private_share=0.4)
    traffic = np.bincount(rows, weights=counts, minlength=100)
    alone = np.bincount(rows) == 1
    assert alone.sum() == 40 and set(np.argsort(-counts)[:40]) == set(np.flatnonzero(alone[rows]))
    assert traffic[~alone].max() < 1.5 * traffic[~alone].min()
    assert sorted(frequency_map(counts[:50], 50)) == list(range(50))
    assert frequency_map(counts, 1).max() == 0


def test_rows_that_are_alike_share_one():
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(GROUPS, 6, generator=random)
    rows = centres[torch.from_numpy(TRUE)] + 0.05 * torch.randn(len(TRUE), 6, generator=random)
    counts = np.ones(len(TRUE))
    counts[:5] = 0  # never seen: they join the nearest all the same
    for weights in (None, counts):
        assert purity(kmeans_map(rows, 2 * GROUPS, counts=weights)) == 1
    assert np.array_equal(kmeans_map(rows, GROUPS), kmeans_map(rows, GROUPS))


def together(noise, seed=0):
    """Pairs of ids of two features, most of them of one group."""
    random = np.random.default_rng(seed)
    first = random.integers(len(TRUE), size=12_000)
    second = first % GROUPS + GROUPS * random.integers(EACH, size=len(first))
    other = random.random(len(first)) < noise
    second[other] = random.integers(len(TRUE), size=other.sum())
    return np.stack([first, second], axis=1)


def test_ids_that_occur_together_share_clusters_of_equal_sizes():
    pairs = together(noise=0.3)
    found = co_cluster_maps(pairs, (len(TRUE), len(TRUE)), GROUPS, slack=0.1)
    for rows in (found.first, found.second):
        assert purity(rows) > 0.95
        assert np.bincount(rows, minlength=GROUPS).max() <= EACH * 1.1 + 1
    same = found.first[pairs[:, 0]] == found.second[pairs[:, 1]]
    assert same.mean() > 0.6  # the clusters of both features are those of each other
    again = co_cluster_maps(pairs, (len(TRUE), len(TRUE)), GROUPS, slack=0.1)
    assert np.array_equal(found.first, again.first) and np.array_equal(found.second, again.second)


def test_ids_that_occur_nowhere_have_a_row_too():
    found = co_cluster_maps([[0, 1], [2, 1], [2, 0]], (50, 40), 5, slack=0)
    assert np.bincount(found.first).tolist() == [10] * 5
    assert np.bincount(found.second).tolist() == [8] * 5


def test_centroids_take_the_nearest_that_ask_and_no_more_than_they_have_room_for():
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0]])
    centroids = torch.tensor([[0.0], [1.0], [10.0]])
    assert assign_balanced(points, centroids, 2).tolist() == [0, 0, 1, 1, 2]
    same = assign_balanced(torch.zeros(60, 2), torch.rand(30, 2), 2)  # more rounds than are made
    assert torch.bincount(same).tolist() == [2] * 30


def test_a_saved_map_says_for_which_vocabulary_it_is(tmp_path):
    data = write_dataset(tmp_path / "data")
    from embcomp.data_pipelines.schema import DatasetInfo

    info = DatasetInfo.load(data)
    feature = info.categorical[0]
    rows = np.arange(feature.num_embeddings) % 3
    save_row_map(tmp_path / "m.parquet", rows, rows // 2, dataset=data, feature=feature.name)
    summary = summarise_row_map(tmp_path / "m.parquet")
    assert summary.rows == (3, 2) and not summary.skips
    assert summary.vocabulary == info.checksums[feature.vocabulary].sha256
    assert np.array_equal(read_row_map(tmp_path / "m.parquet"), np.stack([rows, rows // 2], axis=1))
    for arguments, reason in (
        ({"dataset": data, "feature": "nobody"}, "no categorical feature 'nobody'"),
        ({"dataset": data}, "a dataset and a feature or neither"),
        ({"dataset": data, "feature": info.categorical[1].name}, "ids, the map"),
    ):
        with pytest.raises(ConfigError, match=reason):
            save_row_map(tmp_path / "n.parquet", rows, **arguments)
    assert not (tmp_path / "n.parquet").exists()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: frequency_map([1, 2], 3), "expected 1 to 2 rows for 2 ids, got 3"),
        (lambda: frequency_map([1, -2], 1), "expected counts"),
        (lambda: frequency_map([], 1), "expected counts"),
        (lambda: frequency_map([1.0], 1, private_share=2), r"private_share must be in \[0, 1\]"),
        (lambda: kmeans_map(torch.ones(4), 2), r"expected rows \(num_embeddings, D\)"),
        (lambda: kmeans_map(torch.full((4, 2), torch.nan), 2), "expected finite rows"),
        (lambda: kmeans_map(torch.ones(4, 2), 2, counts=[1]), "a count for each of 4 rows, got 1"),
        (lambda: co_cluster_maps([[0, 9]], (3, 4), 2), r"ids in \[0, 4\) in column 1, got 9 to 9"),
        (lambda: co_cluster_maps([[0.5, 1]], (3, 4), 2), "expected pairs"),
        (lambda: co_cluster_maps([[0, 1]], (3, 4), 2, slack=-1), "slack must be at least 0"),
        (lambda: save_row_map("m.npy"), "at least one column"),
        (lambda: save_row_map("m.npy", [0], [0, 1]), "columns of one length"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(call, reason):
    with pytest.raises(ConfigError, match=reason):
        call()
