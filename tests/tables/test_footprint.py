"""Bytes by hand against bytes predicted."""

from __future__ import annotations

import pytest
import torch

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.tables.footprint import count_bytes
from embcomp.tables.specs import TableSpec


def spec(rows, dim, name="t"):
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=(f"f_{name}",)
    )


@pytest.mark.parametrize(
    ("config", "rows", "columns"),
    [
        (Full(), 1000, 10),
        (Hash(num_buckets=300), 300, 10),
        (Hash(ratio=0.25), 250, 10),
        (QR(divisor=7), 143 + 7, 10),  # ceil(1000 / 7) quotients and 7 remainders
        (QR(divisor=7, combine="add"), 150, 10),
        (QR(divisor=7, combine="concat"), 150, 5),
        (Unified(num_buckets=300), 300, 5),
        (Unified(num_buckets=300, num_chunks=3), 300, 4),  # ceil(10 / 3)
    ],
)
def test_one_table(config, rows, columns):
    footprint = config.footprint([spec(1000, 10)])
    assert footprint.serve_bytes == 4 * rows * columns
    padded = -(-columns // 4) * 4
    assert footprint.train_weight_bytes == 4 * rows * padded
    assert footprint.train_bytes("sgd") == 4 * rows * padded
    assert footprint.train_bytes("rowwise_adagrad") == 4 * rows * (padded + 1)
    assert footprint.train_bytes("adagrad") == 4 * rows * 2 * padded
    assert footprint.train_bytes("adam") == 4 * rows * 3 * padded


def test_unified_is_billed_once_for_all_its_tables():
    tables = [spec(1000, 8, "a"), spec(9000, 8, "b"), spec(50, 8, "c")]
    assert Unified(num_buckets=400).footprint(tables).serve_bytes == 400 * 4 * 4
    two = Unified(num_buckets=400, num_tables=2).footprint(tables)
    assert two.serve_bytes == 2 * 400 * 4 * 4
    beside = Unified(num_buckets=400, collisionless=50).footprint(tables)
    assert beside.serve_bytes == 400 * 4 * 4 + 50 * 8 * 4


def test_projections_are_billed_without_row_state():
    footprint = Unified(num_buckets=100, chunks={"t": 5}).footprint([spec(1000, 8)])
    assert footprint.serve_bytes == 100 * 4 * 4 + 20 * 8 * 4
    assert footprint.optimizer_bytes("rowwise_adagrad") == 100 * 4
    assert {tensor.role for tensor in footprint.tensors} == {"weights", "projection"}


def test_tables_that_would_not_shrink_are_billed_full():
    tables = [spec(90, 4, "small"), spec(10_000, 4, "large")]
    assert Hash(num_buckets=500).footprint(tables).serve_bytes == 4 * 4 * (90 + 500)
    assert QR(divisor=95).footprint(tables).serve_bytes == 4 * 4 * (90 + 106 + 95)


def test_counting_reads_element_sizes():
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int8)}
    assert count_bytes(tensors) == 48 + 5
