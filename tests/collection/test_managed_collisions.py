"""TorchRec's managed collisions in front of a collection: ids that grow are theirs to map, ours to store."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from embcomp import CompressedEmbeddingBagCollection, Full, LowDim, Plan, Unified, compress_

ROWS, DIM = 16, 8
TABLES = [
    EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name])
    for name in ("user", "item")
]
METHODS = pytest.mark.parametrize(
    "plan",
    [Full(), Unified(num_buckets=64), Plan(overrides={"user": LowDim(widths={"user": 4})})],
    ids=["full", "unified", "mixed"],
)


class Model(nn.Module):
    """Ids of any size in, rows that are handed out to them, embeddings."""

    def __init__(self, plan):
        super().__init__()
        self.ids = ManagedCollisionCollection(
            {
                table.name: MCHManagedCollisionModule(
                    device=torch.device("cpu"),
                    zch_size=ROWS,
                    input_hash_size=2**62,
                    eviction_interval=1,
                    eviction_policy=DistanceLFU_EvictionPolicy(),
                )
                for table in TABLES
            },
            TABLES,
        )
        self.tables = CompressedEmbeddingBagCollection(TABLES, plan)

    def forward(self, features):
        return self.tables(self.ids(features)).values()


def batch(user, item):
    return KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.tensor([*user, *item]),
        lengths=torch.ones(len(user) + len(item), dtype=torch.int32),
    )


def started(plan):
    torch.manual_seed(0)
    model = Model(plan)
    features = batch([10**15, 7, 10**15], [5, 10**12, 6])
    for _ in range(2):  # rows are handed out to what was seen before
        model(features)
    return model, features


@METHODS
def test_an_id_keeps_its_row_from_batch_to_batch_and_others_have_others(plan):
    model, features = started(plan)
    answer = model(features)
    assert torch.equal(answer[0, :DIM], answer[2, :DIM])
    assert not torch.equal(answer[0, :DIM], answer[1, :DIM])
    again = model(batch([7, 10**15], [6, 5]))
    assert torch.equal(
        again, torch.stack([answer[1], answer[0]]).where(torch.arange(16) < DIM, again)
    )
    assert torch.equal(again[:, DIM:], answer[[2, 0], DIM:])


@METHODS
def test_only_rows_of_the_batch_learn(plan):
    model, features = started(plan)
    before = model(features).detach()
    other = model.tables(batch([3], [3])).values().detach()
    seen = {int(row) for row in model.ids(features).values()}
    assert 3 not in seen
    optimizer = torch.optim.SGD(model.tables.parameters(), lr=0.5)
    model(features).square().sum().backward()
    optimizer.step()
    assert model(features).square().sum() < 0.5 * before.square().sum()
    if plan == Full():  # methods that share rows move others along
        assert torch.equal(model.tables(batch([3], [3])).values(), other)


def test_what_was_handed_out_is_in_the_state_dict():
    model, features = started(Full())
    answer = model(features).detach()
    torch.manual_seed(1)
    fresh = Model(Full())
    assert not torch.allclose(fresh.eval()(features), answer)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(features), answer)


def test_more_ids_than_rows_stay_inside_the_table():
    model, _ = started(Full())
    for start in range(0, 200, 10):
        ids = [10**9 + start + n for n in range(10)]
        assert torch.isfinite(model(batch(ids, ids))).all()
    assert int(model.ids(batch(ids, ids)).values().min()) >= 0
    assert int(model.ids(batch(ids, ids)).values().max()) < ROWS


def test_compress_replaces_the_tables_behind_them_and_leaves_the_ids_alone():
    model, features = started(Full())
    mapped = model.eval().ids(features).values().clone()
    report = compress_(model, LowDim(widths={"user": 4, "item": 4}))
    assert [table.place for table in report.tables] == ["tables", "tables"]
    assert torch.equal(model.ids(features).values(), mapped)
    assert not model(features)[:, 4:DIM].any()


def multi_probe(plan, device="cpu"):
    """Ids of TorchRec's multi-probe map in one bucket, and tables behind it."""
    probed = {
        table.name: HashZchManagedCollisionModule(
            zch_size=ROWS, device=torch.device(device), total_num_buckets=1, max_probe=ROWS
        )
        for table in TABLES
    }
    tables = CompressedEmbeddingBagCollection(TABLES, plan, device=torch.device(device))
    return ManagedCollisionCollection(probed, TABLES), probed, tables


@METHODS
def test_a_multi_probe_map_that_is_read_only_leads_to_our_rows_on_a_cpu(plan):
    ids, probed, tables = multi_probe(plan)
    ids.eval()
    features = batch([10**15, 7, 10**15], [7, 7, 7])
    before = ids(features)["user"].values()
    assert before[0] == before[2] != before[1]
    # As a map that was trained elsewhere: another id came first, and 7 went to the next place.
    place = int(before[1])
    known = probed["user"]._hash_zch_identities.data
    known[place], known[(place + 1) % ROWS] = 99, 7
    mapped = ids(features)
    assert mapped["user"].values().tolist() == [before[0], (place + 1) % ROWS, before[0]]
    torch.testing.assert_close(tables(mapped)["user"][0], tables(mapped)["user"][2])
    assert not torch.equal(tables(mapped)["user"][0], tables(mapped)["user"][1])


def test_a_multi_probe_map_that_learns_is_refused_by_torchrec_on_a_cpu():
    """The reason why the next test needs CUDA; it fails as soon as TorchRec fills such maps here."""
    ids, _, _ = multi_probe(Full())
    with pytest.raises(RuntimeError, match="readonly"):
        ids(batch([1], [2]))


@pytest.mark.gpu
@METHODS
def test_a_multi_probe_map_that_learns_hands_out_a_row_for_each_id(plan):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: FBGEMM's multi-probe maps fill themselves there alone")
    ids, _, tables = multi_probe(plan, "cuda")
    users = [10**15 + n for n in range(ROWS // 2)]
    features = batch(users, users).to("cuda")
    mapped = [ids(features)["user"].values() for _ in range(3)]
    assert len(mapped[0].unique()) == len(users) and int(mapped[0].max()) < ROWS
    assert all(torch.equal(each, mapped[0]) for each in mapped)
    answer = tables(ids(features))["user"]
    answer.square().sum().backward()
    assert torch.equal(tables(ids.eval()(features))["user"], answer)
