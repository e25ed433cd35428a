"""The loader hands out every row exactly once, the same on resume, and refuses data that lies."""

from __future__ import annotations

import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import (
    CategoricalFeature,
    DatasetInfo,
    NumericFeature,
    SplitInfo,
)
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.errors import CheckpointError, DataError, EmbcompError

NUM_ROWS = 97


def write_numbered(folder, num_rows=NUM_ROWS, row_group_rows=10, num_files=2):
    """A dataset in which every column of row r tells r: I1 = r, C1 = r, C2 = [r] * (r % 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, rows in enumerate(np.array_split(np.arange(num_rows, dtype=np.int32), num_files)):
        table = pa.table(
            {
                "label": (rows % 2).astype(np.float32),
                "I1": rows.astype(np.float32),
                "I2": -rows.astype(np.float32),
                "C1": rows,
                "C2": pa.array([[r] * (r % 3) for r in rows.tolist()], pa.list_(pa.int32())),
                "C3": rows % 7,
            }
        )
        files.append(f"part-{part}.parquet")
        pq.write_table(table, folder / files[-1], row_group_size=row_group_rows)
    size = max(num_rows, 2)
    info = DatasetInfo(
        name="numbered",
        group="C3",
        numeric=[NumericFeature(name="I1"), NumericFeature(name="I2")],
        categorical=[
            CategoricalFeature(name="C1", num_embeddings=size),
            CategoricalFeature(name="C2", num_embeddings=size, multi_valued=True, max_length=2),
            CategoricalFeature(name="C3", num_embeddings=7),
        ],
        splits={"train": SplitInfo(files=files, rows=num_rows, positives=num_rows // 2)},
    )
    info.save(folder)
    return folder


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("numbered"))


def rows_of(batch):
    return batch.dense[:, 0].to(torch.int64).tolist()


def counted_rows(batch):
    rows = rows_of(batch)
    return rows if batch.num_valid is None else rows[: batch.num_valid]


def assert_rows_are_whole(batch):
    rows = torch.tensor(rows_of(batch))
    jagged = batch.sparse.to_dict()
    assert batch.sparse.keys() == ["C1", "C2", "C3"]
    assert batch.sparse.stride() == len(rows)
    torch.testing.assert_close(batch.dense[:, 1], -rows.float())
    torch.testing.assert_close(batch.labels, (rows % 2).float())
    torch.testing.assert_close(jagged["C1"].values(), rows)
    torch.testing.assert_close(jagged["C1"].lengths().long(), torch.ones_like(rows))
    torch.testing.assert_close(jagged["C2"].lengths().long(), rows % 3)
    torch.testing.assert_close(jagged["C2"].values(), rows.repeat_interleave(rows % 3))
    torch.testing.assert_close(jagged["C3"].values(), rows % 7)
    torch.testing.assert_close(batch.groups, rows % 7)


def assert_same(left, right):
    assert left.num_valid == right.num_valid
    for a, b in (
        (left.dense, right.dense),
        (left.labels, right.labels),
        (left.groups, right.groups),
        (left.sparse.values(), right.sparse.values()),
        (left.sparse.lengths(), right.sparse.lengths()),
        (left.sparse.offsets(), right.sparse.offsets()),
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert left.sparse.length_per_key() == right.sparse.length_per_key()
    assert left.sparse.offset_per_key() == right.sparse.offset_per_key()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_rows=st.integers(1, 60),
    row_group_rows=st.integers(1, 30),
    num_files=st.integers(1, 3),
    batch_size=st.integers(1, 25),
    world_size=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    buffer=st.integers(1, 70),
    epoch=st.integers(0, 2),
)
def test_every_row_exactly_once_in_equal_steps(
    tmp_path_factory,
    num_rows,
    row_group_rows,
    num_files,
    batch_size,
    world_size,
    shuffle,
    drop_last,
    buffer,
    epoch,
):
    folder = write_numbered(tmp_path_factory.mktemp("d"), num_rows, row_group_rows, num_files)

    def loader(rank):
        return ParquetLoader(
            folder,
            "train",
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            shuffle_buffer=buffer,
            seed=3,
            prefetch=0,
        )

    if drop_last and num_rows < batch_size * world_size:
        with pytest.raises(DataError, match="too few"):
            loader(0)
        return
    loaders = [loader(rank) for rank in range(world_size)]
    for one in loaders:
        one.set_epoch(epoch)
    streams = [list(one) for one in loaders]
    assert {len(stream) for stream in streams} == {len(loaders[0])}
    for step in zip(*streams):
        assert len({len(batch.labels) for batch in step}) == 1
    for stream in streams:
        for batch in stream:
            assert_rows_are_whole(batch)
    seen = [row for stream in streams for batch in stream for row in counted_rows(batch)]
    if drop_last:
        full = num_rows // world_size // batch_size * batch_size * world_size
        assert len(seen) == len(set(seen)) == full
        assert all(batch.num_valid is None for stream in streams for batch in stream)
        assert all(len(batch.labels) == batch_size for stream in streams for batch in stream)
    else:
        assert sorted(seen) == list(range(num_rows))
    if not shuffle:
        steps = [row for step in zip(*streams) for batch in step for row in counted_rows(batch)]
        assert steps == sorted(steps)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_rows=st.integers(1, 70),
    row_group_rows=st.integers(1, 30),
    steps_rows=st.sampled_from([4, 8, 12]),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    buffer=st.integers(1, 70),
    epoch=st.integers(0, 2),
)
def test_a_step_holds_the_same_rows_in_the_same_order_on_any_number_of_ranks(
    tmp_path_factory, num_rows, row_group_rows, steps_rows, shuffle, drop_last, buffer, epoch
):
    folder = write_numbered(tmp_path_factory.mktemp("d"), num_rows, row_group_rows, 2)
    if drop_last and num_rows < steps_rows:
        return
    seen = {}
    for world_size in (1, 2, 4):
        loaders = [
            ParquetLoader(
                folder,
                "train",
                batch_size=steps_rows // world_size,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                drop_last=drop_last,
                shuffle_buffer=buffer,
                seed=3,
                prefetch=0,
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            loader.set_epoch(epoch)
        steps = [[row for b in step for row in counted_rows(b)] for step in zip(*loaders)]
        assert [len(step) for step in steps[:-1]] == [steps_rows] * (len(steps) - 1)
        seen[world_size] = steps
    assert seen[1] == seen[2] == seen[4]


def test_a_state_goes_on_with_the_same_rows_on_another_number_of_ranks(numbered):
    def loaders(world_size):
        return [
            ParquetLoader(
                numbered,
                "train",
                batch_size=8 // world_size,
                rank=rank,
                world_size=world_size,
                shuffle=True,
                drop_last=False,
                shuffle_buffer=24,
            )
            for rank in range(world_size)
        ]

    (whole,) = loaders(1)
    whole.set_epoch(2)
    expected = [rows_of(batch) for batch in whole]
    for step in (0, 1, 5, len(expected)):
        rest = loaders(4)
        for loader in rest:
            loader.load_state_dict(whole.state_dict(step))
        found = [[row for b in each for row in counted_rows(b)] for each in zip(*rest)]
        assert found == expected[step:]


def test_ranges_decode_each_row_group_on_few_ranks_and_cover_every_row(numbered):
    def loader(rank, **options):
        return ParquetLoader(
            numbered, "train", batch_size=4, rank=rank, world_size=4, prefetch=0, **options
        )

    seen = []
    for rank in range(4):
        ranges = loader(rank, in_ranges=True)
        rows = [row for batch in ranges for row in counted_rows(batch)]
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        seen += rows
    assert seen == list(range(NUM_ROWS))
    with pytest.raises(CheckpointError, match="ranges"):
        loader(0).load_state_dict(loader(0, in_ranges=True).state_dict())
    with pytest.raises(ValueError, match="in_ranges must be"):
        loader(0, in_ranges=True, shuffle=True)


def test_every_row_is_as_likely_in_every_step_of_a_window(numbered):
    loader = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, prefetch=0)
    counts = np.zeros((NUM_ROWS, len(loader)))
    for epoch in range(600):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            counts[rows_of(batch), step] += 1
    # Of 600 draws 50 are expected in each of 12 steps; 5 standard deviations are 34.
    assert counts.sum(axis=0).tolist() == [4800] * len(loader)
    assert np.abs(counts - 50).max() < 34


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_is_exact_at_every_step(numbered, shuffle, drop_last, world_size, prefetch):
    def fresh():
        return ParquetLoader(
            numbered,
            "train",
            batch_size=8,
            rank=world_size - 1,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=drop_last,
            shuffle_buffer=20,
            seed=5,
            prefetch=prefetch,
        )

    whole = fresh()
    whole.set_epoch(4)
    states, batches = [whole.state_dict()], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    for step, state in enumerate(states):
        restored = json.loads(json.dumps(state))
        assert restored == whole.state_dict(step)
        loader = fresh()
        loader.load_state_dict(restored)
        loader.set_epoch(4)
        rest = list(loader)
        assert len(rest) == len(batches) - step
        for left, right in zip(rest, batches[step:]):
            assert_same(left, right)
        # The epoch after a continued one is whole again.
        loader.set_epoch(5)
        assert len(list(loader)) == len(batches)


def test_every_iteration_of_an_epoch_is_the_same_and_epochs_differ(numbered):
    loader = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, shuffle_buffer=30)
    orders = []
    for epoch in (0, 0, 1):
        loader.set_epoch(epoch)
        orders.append([row for batch in loader for row in rows_of(batch)])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    other = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, shuffle_buffer=30, seed=1)
    assert orders[0] != [row for batch in other for row in rows_of(batch)]


def test_shuffling_mixes_row_groups_and_the_rows_inside(numbered):
    loader = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, shuffle_buffer=48)
    rows = np.array([row for batch in loader for row in rows_of(batch)])
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.2
    assert len({row // 10 for row in rows[:48].tolist()}) >= 4


def test_a_batch_does_not_depend_on_prefetching(numbered):
    plain = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, prefetch=0)
    ahead = ParquetLoader(numbered, "train", batch_size=8, shuffle=True, prefetch=3)
    for left, right in zip(plain, ahead, strict=True):
        assert_same(left, right)


def test_leaving_an_epoch_early_stops_the_thread(numbered):
    before = threading.active_count()
    batches = iter(ParquetLoader(numbered, "train", batch_size=2, prefetch=1))
    next(batches)
    assert threading.active_count() == before + 1
    del batches
    assert threading.active_count() == before


def test_single_valued_batches_give_a_collection_all_it_needs(tmp_path):
    info = write_toy_dataset(tmp_path, num_values=(20, 10))
    loader = ParquetLoader(info, "train", batch_size=64)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.name}",
            num_embeddings=feature.num_embeddings,
            embedding_dim=4,
            feature_names=[feature.name],
        )
        for feature in info.categorical
    ]
    collection = EmbeddingBagCollection(tables=tables)
    batch = next(iter(loader))
    assert batch.sparse.values().dtype == torch.int64
    assert batch.sparse.values().is_contiguous()
    assert batch.sparse._length_per_key == [64, 64]
    assert batch.sparse._offset_per_key == [0, 64, 128]
    pooled = collection(batch.sparse)
    for feature in info.categorical:
        ids = batch.sparse[feature.name].values()
        expected = collection.embedding_bags[f"t_{feature.name}"].weight[ids]
        torch.testing.assert_close(pooled[feature.name], expected)


def test_batches_own_their_memory(tmp_path):
    info = write_toy_dataset(tmp_path, group="C1")
    for shuffle in (False, True):
        loader = ParquetLoader(info, "train", batch_size=64, shuffle=shuffle, prefetch=0)
        first, second = list(loader)[:2]
        values = second.sparse.values().clone(), second.dense.clone(), second.labels.clone()
        for tensor in (first.sparse.values(), first.dense, first.labels):
            tensor.zero_()
        assert torch.equal(second.sparse.values(), values[0])
        assert torch.equal(second.dense, values[1])
        assert torch.equal(second.labels, values[2])


def test_an_empty_split_evaluates_to_nothing(tmp_path):
    write_toy_dataset(tmp_path, rows=(100, 0, 50))
    assert list(ParquetLoader(tmp_path, "valid", batch_size=8)) == []


def test_more_ranks_than_rows_still_take_equal_steps(tmp_path):
    write_numbered(tmp_path, num_rows=2)
    batches = [
        list(ParquetLoader(tmp_path, "train", batch_size=8, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert [len(batch) for batch in batches] == [1, 1, 1, 1]
    assert [one[0].num_valid for one in batches].count(0) == 2
    assert sorted(row for one in batches for row in counted_rows(one[0])) == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 9}, "batch_size"),
        ({"seed": 8}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"shuffle_buffer": 99}, "shuffle_buffer"),
        ({"rank": 1, "world_size": 2}, "world_size"),
    ],
)
def test_a_state_of_another_stream_is_refused_by_name(numbered, change, named):
    arguments = {"batch_size": 8, "shuffle": True, "drop_last": True}
    state = ParquetLoader(numbered, "train", **arguments).state_dict()
    with pytest.raises(CheckpointError, match=named):
        ParquetLoader(numbered, "train", **(arguments | change)).load_state_dict(state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 8, "rank": 2, "world_size": 2},
        {"batch_size": 8, "seed": -1},
        {"batch_size": 8, "shuffle_buffer": 0},
        {"batch_size": 8, "prefetch": -1},
    ],
)
def test_impossible_arguments_are_refused(numbered, arguments):
    with pytest.raises(ValueError, match="must be"):
        ParquetLoader(numbered, "train", **arguments)


def test_an_unknown_split_names_those_there_are(numbered):
    with pytest.raises(DataError, match=r"\['train'\]"):
        ParquetLoader(numbered, "tests", batch_size=8)


def edit_info(folder, edit):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rewrite(folder, column, values):
    """Replace a column of the first file."""
    path = folder / "part-0.parquet"
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index(column), column, values(table[column]))
    pq.write_table(table, path, row_group_size=10)


def changed(old, place, value):
    array = np.asarray(old).copy()
    array[place] = value
    return pa.array(array)


BAD = {
    "another version": (
        lambda f: edit_info(f, lambda c: c.update(format_version=2)),
        ["dataset.json", "format_version 2"],
    ),
    "missing file": (lambda f: (f / "part-1.parquet").unlink(), ["part-1.parquet"]),
    "truncated file": (
        lambda f: (f / "part-1.parquet").write_bytes((f / "part-1.parquet").read_bytes()[:-50]),
        ["part-1.parquet", "not a complete Parquet file"],
    ),
    "damaged pages": (
        lambda f: (f / "part-1.parquet").write_bytes(
            b"PAR1" + b"\xff" * 1200 + (f / "part-1.parquet").read_bytes()[1204:]
        ),
        ["part-1.parquet", "damaged"],
    ),
    "column missing": (
        lambda f: pq.write_table(
            pq.read_table(f / "part-0.parquet").drop_columns(["C3"]), f / "part-0.parquet"
        ),
        ["part-0.parquet", "'C3'"],
    ),
    "other type": (
        lambda f: rewrite(f, "C1", lambda old: old.cast(pa.int64())),
        ["part-0.parquet", "'C1'", "int64", "int32"],
    ),
    "list where one value is due": (
        lambda f: edit_info(f, lambda c: c["categorical"][1].update(multi_valued=False)),
        ["part-0.parquet", "'C2'", "list of int32"],
    ),
    "other row count": (
        lambda f: edit_info(f, lambda c: c["splits"]["train"].update(rows=98)),
        ["'train'", "97", "98"],
    ),
    "id too large": (
        lambda f: rewrite(f, "C1", lambda old: changed(old, 33, 97)),
        ["part-0.parquet, row 33", "'C1'", "id 97", "[0, 97)"],
    ),
    "negative id": (
        lambda f: rewrite(f, "C1", lambda old: changed(old, 12, -1)),
        ["part-0.parquet, row 12", "'C1'", "id -1"],
    ),
    "id in a bag too large": (
        lambda f: edit_info(f, lambda c: c["categorical"][1].update(num_embeddings=14)),
        ["part-0.parquet, row 14", "'C2'", "id 14", "[0, 14)"],
    ),
    "label": (
        lambda f: rewrite(f, "label", lambda old: changed(old, 7, 0.5)),
        ["part-0.parquet, row 7", "'label'", "0.5"],
    ),
    "not a number": (
        lambda f: rewrite(f, "I2", lambda old: changed(old, 21, np.nan)),
        ["part-0.parquet, row 21", "'I2'", "nan"],
    ),
    "null": (
        lambda f: rewrite(f, "C3", lambda old: pa.array([None, *old.to_pylist()[1:]], pa.int32())),
        ["part-0.parquet", "'C3'", "1 null"],
    ),
    "group by a bag": (lambda f: edit_info(f, lambda c: c.update(group="C2")), ["'C2'", "group"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_bad_data_is_an_error_that_names_it(tmp_path, case, prefetch):
    write_numbered(tmp_path)
    spoil, named = BAD[case]
    spoil(tmp_path)
    with pytest.raises(EmbcompError) as raised:
        list(ParquetLoader(tmp_path, "train", batch_size=8, prefetch=prefetch))
    for text in named:
        assert text in str(raised.value)
