"""Blocks of rows and sparse rows: every id is found once, and forms that cannot be are refused."""

from __future__ import annotations

import pytest
import torch

from embcomp import Blocks, ConfigError, Sparse
from embcomp.backends.base import MethodState
from embcomp.collection.group_states import GroupState
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import batch_of, plain_tables
from tests.helpers.dnis_cases import collection_of


def test_ids_find_their_block_and_their_columns():
    tables = plain_tables(4, rows=(6, 3))
    config = Blocks(widths={"t0": (2, 0, 3), "t1": (4,)}, cuts={"t0": (2, 3)})
    collection = collection_of(tables, config)
    first = torch.arange(1.0, 5).view(2, 2)
    last = torch.arange(5.0, 14).view(3, 3)
    form = MethodState(
        config=config,
        tensors={
            "rows.t0__block_0": first,
            "rows.t0__block_2": last,
            "combine.columns": torch.tensor([3, 1, 0, 1, 2, 0, 1, 2, 3], dtype=torch.uint8),
        },
    )
    collection.load_states([GroupState(tables=collection.plan.tables, form=form)])
    wanted = torch.zeros(6, 4)
    wanted[:2, [3, 1]] = first
    wanted[3:, :3] = last
    assert torch.equal(embed_ids(collection, tables)["f0"], wanted)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_id_is_looked_up_once_or_not_at_all(ragged):
    tables = plain_tables(4, rows=(60, 30))
    widths = {"t0": (4, 0, 1), "t1": (2, 3)}
    collection = collection_of(tables, Blocks(widths=widths, cuts={"t0": (5, 20), "t1": (7,)}))
    bags = {"f0": [[id_] for id_ in range(30)], "f1": [[id_] for id_ in range(30)]}
    if ragged:
        bags["f0"] = [[], list(range(30)), *[[]] * 28]
    routed, _, _ = collection.route(batch_of(bags))
    counts = {key: jagged.values().tolist() for key, jagged in routed.to_dict().items()}
    assert counts == {
        "t0/f0#0": list(range(5)),
        "t0/f0#2": list(range(10)),
        "t1/f1#0": list(range(7)),
        "t1/f1#1": list(range(23)),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": {"t0": (4, 4)}}, "has 1 block"),
        ({"widths": {"t0": (4, -1)}, "cuts": {"t0": (3,)}}, "at least 0"),
        ({"widths": {"t0": (4, 4)}, "cuts": {"t0": (0,)}}, "must rise strictly"),
        ({"widths": {"t0": (4, 4, 4)}, "cuts": {"t0": (5, 5)}}, "must rise strictly"),
        ({"widths": {"t0": (4, 4)}, "cuts": {"t0": (60,)}}, "less than its 60 rows"),
        ({"widths": {"other": (4,)}}, "say nothing of table 't0'"),
        ({"widths": {"t0": (0,)}}, "leave at least one"),
    ],
)
def test_blocks_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        collection_of(plain_tables(4, rows=(60,)), Blocks(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t0": -1}, "at least 0"),
        ({"other": 4}, "say nothing of table 't0'"),
        ({"t0": 0}, "leave at least one"),
    ],
)
def test_sparse_rows_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        collection_of(plain_tables(4, rows=(60,)), Sparse(nonzeros=settings))
