"""Maps from ids to rows for `mapped`, from counts, from trained rows, and from what occurs together.

Each gives one row number for every id, (num_embeddings,) int64; `save_row_map` writes it, and several of
them side by side as the columns of one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from embcomp.backends.codebooks.kmeans import kmeans
from embcomp.backends.codebooks.nearest import nearest
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.io.row_map_files import write_row_map
from embcomp.tools.balanced_assignment import assign_balanced

RowNumbers = NDArray[np.int64]
_AT_ONCE = 1 << 14  # rows whose nearest centroids are found together


def frequency_map(counts: ArrayLike, num_rows: int, *, private_share: float = 0.5) -> RowNumbers:
    """Rows of their own for the most frequent ids, and rows of about equal traffic for the rest.

    The rest are dealt by falling count, there and back over the shared rows, so that a row's ids are of
    all frequencies and no row has the traffic of two others. Unlike `double_hash` it asks nothing of the
    order of ids.

    Args:
        counts: (num_embeddings,) how often each id occurs.
        num_rows: rows there are to be.
        private_share: share of the rows that are private, rounded down.
    """
    often = _numbers(counts, "counts")
    _check_rows(num_rows, len(often))
    if not 0 <= private_share <= 1:
        raise ConfigError(f"private_share must be in [0, 1], got {private_share}")
    order = np.argsort(-often, kind="stable")
    private = (
        num_rows if num_rows == len(often) else min(int(num_rows * private_share), num_rows - 1)
    )
    rows = np.empty(len(often), dtype=np.int64)
    rows[order[:private]] = np.arange(private)
    shared = num_rows - private
    if shared:
        place = np.arange(len(often) - private)
        turn, at = place // shared, place % shared
        rows[order[private:]] = private + np.where(turn % 2 == 0, at, shared - 1 - at)
    return rows


def kmeans_map(
    rows: Tensor, num_rows: int, *, counts: ArrayLike | None = None, seed: int = 2021
) -> RowNumbers:
    """Ids whose trained rows are alike share a row: the nearest of the centroids of k-means.

    Args:
        rows: (num_embeddings, D) trained rows.
        num_rows: rows there are to be.
        counts: (num_embeddings,) how often each id occurs, which weighs it; all alike by default.
        seed: of k-means.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ConfigError(
            f"expected rows (num_embeddings, D) of floats, got {rows.dtype} {tuple(rows.shape)}"
        )
    _check_rows(num_rows, len(rows))
    points = rows.detach().to("cpu", torch.float32)
    if not bool(points.isfinite().all()):
        raise ConfigError("expected finite rows; a trained table has none that are not")
    often = np.ones(len(points)) if counts is None else _numbers(counts, "counts")
    if len(often) != len(points):
        raise ConfigError(f"expected a count for each of {len(points)} rows, got {len(often)}")
    weights = torch.from_numpy(often).float()
    books = kmeans(points, weights, num_rows, seed=seed).centroids[None]
    only = torch.zeros(1, dtype=torch.int64)
    found = [nearest(part[:, None], books, only)[:, 0] for part in points.split(_AT_ONCE)]
    return torch.cat(found).numpy()


@dataclass(frozen=True, kw_only=True)
class CoClusters:
    """Clusters of two features at once.

    Attributes:
        first: (num_embeddings of the first,) its ids' clusters.
        second: the same of the second.
    """

    first: RowNumbers
    second: RowNumbers


def co_cluster_maps(
    pairs: ArrayLike, num_ids: Sequence[int], num_rows: int, *, slack: float = 0.1, seed: int = 2021
) -> CoClusters:
    """Ids that occur with the same ids of another feature share a row, and no row has many more than others.

    Dhillon, "Co-clustering documents and words using bipartite spectral graph partitioning", KDD 2001:
    singular vectors of the matrix of co-occurrences, divided by the roots of its degrees, are clustered
    for both features together. Clusters are then filled up to equal sizes, each id in the nearest that has
    room, which is what balanced graph clusterings for tables aim at.

    Args:
        pairs: (N, 2) ids of the first and of the second feature that occur together, as often as they do.
        num_ids: of the first and of the second feature.
        num_rows: clusters, of either.
        slack: how much more than its equal share a cluster may hold.
        seed: of the singular vectors and of k-means.
    """
    found = np.asarray(pairs)
    if (
        found.ndim != 2
        or found.shape[1] != 2
        or not np.issubdtype(found.dtype, np.integer)
        or not len(found)
    ):
        raise ConfigError(f"expected pairs (N, 2) of integers, got {found.dtype} {found.shape}")
    for side, count in enumerate(num_ids):
        low, high = int(found[:, side].min()), int(found[:, side].max())
        if low < 0 or high >= count:
            raise ConfigError(
                f"pairs: expected ids in [0, {count}) in column {side}, got {low} to {high}"
            )
        _check_rows(num_rows, count)
    if slack < 0:
        raise ConfigError(f"slack must be at least 0, got {slack}")
    vectors = _singular_vectors(torch.from_numpy(found.astype(np.int64)), num_ids, num_rows, seed)
    weights = torch.cat(
        [torch.from_numpy(np.bincount(found[:, s], minlength=num_ids[s])) for s in (0, 1)]
    )
    centroids = kmeans(torch.cat(vectors), weights.float(), num_rows, seed=seed).centroids
    first, second = (
        assign_balanced(own, centroids, -int(-len(own) * (1 + slack) // num_rows)).numpy()
        for own in vectors
    )
    return CoClusters(first=first, second=second)


def _singular_vectors(
    pairs: Tensor, num_ids: Sequence[int], num_rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(ids, columns) float32 of each feature; zeros for ids that occur nowhere."""
    degrees = [torch.bincount(pairs[:, side], minlength=num_ids[side]).float() for side in (0, 1)]
    roots = [degree.clamp(min=1).rsqrt() for degree in degrees]
    values = roots[0][pairs[:, 0]] * roots[1][pairs[:, 1]]
    columns = min(num_rows.bit_length() + 1, *num_ids)
    # Said either way, torch does not warn that it was left open.
    with (
        torch.random.fork_rng(devices=[]),
        torch.sparse.check_sparse_tensor_invariants(enable=True),
    ):
        torch.manual_seed(seed)
        matrix = torch.sparse_coo_tensor(pairs.t(), values, tuple(num_ids)).coalesce()
        left, _, right = torch.svd_lowrank(matrix, q=columns, niter=8)
    # The first vectors say how frequent an id is, and nothing else.
    kept = slice(1, None) if columns > 1 else slice(None)
    first, second = (
        torch.nn.functional.normalize(root[:, None] * vectors[:, kept])
        for root, vectors in zip(roots, (left, right))
    )
    return first * (degrees[0] > 0)[:, None], second * (degrees[1] > 0)[:, None]


def save_row_map(
    path: str | Path,
    *columns: ArrayLike,
    dataset: str | Path | None = None,
    feature: str | None = None,
) -> None:
    """Write a map that `mapped` reads.

    Args:
        path: `.parquet` or `.npy`, in a folder that is there.
        columns: (num_embeddings,) row numbers each, -1 for no row.
        dataset: the prepared dataset whose ids they are for; a Parquet file then says so, and training on
            another vocabulary is refused.
        feature: which feature's ids they are.
    """
    if not columns or (dataset is None) != (feature is None):
        raise ConfigError("expected at least one column, and a dataset and a feature or neither")
    held = [np.asarray(column) for column in columns]
    if len({column.shape for column in held}) > 1 or held[0].ndim != 1:
        raise ConfigError(
            f"expected columns of one length, got {[column.shape for column in held]}"
        )
    vocabulary = ""
    if dataset is not None and feature is not None:
        vocabulary = _vocabulary(DatasetInfo.load(Path(dataset)), feature, len(held[0]))
    write_row_map(path, np.stack(held, axis=1), vocabulary=vocabulary)


def _vocabulary(info: DatasetInfo, name: str, ids: int) -> str:
    """The SHA-256 of a feature's vocabulary, which must have so many ids."""
    found = {feature.name: feature for feature in info.categorical}
    if name not in found:
        raise ConfigError(
            f"{info.folder} has no categorical feature {name!r}; it has {', '.join(found)}"
        )
    feature = found[name]
    if feature.num_embeddings != ids:
        raise ConfigError(f"feature {name!r} has {feature.num_embeddings:,} ids, the map {ids:,}")
    if feature.vocabulary not in info.checksums:
        raise ConfigError(
            f"{info.folder} has no checksum of the vocabulary of {name!r}; prepare it again"
        )
    return info.checksums[feature.vocabulary].sha256


def _numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all() or (found < 0).any():
        raise ConfigError(f"expected {name} (num_embeddings,) that are finite and at least 0")
    return found


def _check_rows(num_rows: int, num_ids: int) -> None:
    if not 1 <= num_rows <= num_ids:
        raise ConfigError(f"expected 1 to {num_ids:,} rows for {num_ids:,} ids, got {num_rows}")
