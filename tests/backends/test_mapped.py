"""Rows by a map from a file: what is read, packed, handed on and refused."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embcomp import ConfigError, Full, Hash, Mapped, load, save
from embcomp.backends.mapped.row_codes import gather_codes, packed
from embcomp.io.row_map_files import summarise_row_map, write_row_map
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.serving.fused import library as compiled
from embcomp.testing.cases import BackendCase, embed_ids, pooled
from embcomp.testing.check_data import batch_of, plain_tables, random_batch
from embcomp.testing.planted import plant
from embcomp.tools.row_maps import kmeans_map
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit

TABLES = plain_tables(8, rows=(60, 90, 75))


def files(folder, suffix="npy", **maps):
    """Maps in files, by table."""
    paths = {}
    for table, rows in maps.items():
        paths[table] = str(folder / f"{table}.{suffix}")
        write_row_map(paths[table], np.asarray(rows))
    return paths


def collection_of(tmp_path, *, seed=0, **settings):
    return pooled(BackendCase(config=Mapped(**settings)), TABLES, seed=seed)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_the_identity_is_the_full_table_and_a_hash_is_the_hashed_one(tmp_path, suffix):
    salt, count = torch.tensor(table_salt(2021, "t1")), torch.tensor(40)
    hashed = hash_rows(torch.arange(90), salt, count).numpy()
    paths = files(tmp_path, suffix, t0=np.arange(60), t1=hashed)
    ours = collection_of(tmp_path, maps=paths, rows={"t1": (40,)})
    for table, method in (("t0", Full()), ("t1", Hash(num_buckets=40, collisionless=0))):
        theirs = pooled(BackendCase(config=method), TABLES)
        weight = f"rows.embedding_bags.{table}.weight"
        theirs.state_dict()[weight].copy_(ours.state_dict()[weight])
        batch = random_batch(TABLES, seed=1)
        key = f"f{table[1]}"
        assert torch.equal(ours(batch)[key], theirs(batch)[key])


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("shared", [False, True])
def test_an_embedding_is_made_of_the_rows_that_the_map_names(tmp_path, combine, shared):
    random = np.random.default_rng(0)
    lines = random.integers(-1, 20, (60, 2))
    lines[0] = 19
    paths = files(tmp_path, t0=lines)
    collection = collection_of(tmp_path, maps=paths, combine=combine, shared=shared)
    weight = collection.state_dict()["rows.embedding_bags.t0.weight"]
    assert len(weight) == (20 if shared else 40)
    found = embed_ids(collection, TABLES)["f0"]
    for id_ in range(60):
        parts = [
            weight[row + (0 if shared else 20 * column)]
            if row >= 0
            else torch.zeros(weight.shape[1])
            for column, row in enumerate(lines[id_].tolist())
        ]
        wanted = torch.cat(parts) if combine == "concat" else parts[0] + parts[1]
        torch.testing.assert_close(found[id_], wanted)


def test_a_parquet_file_may_name_the_ids_of_its_lines(tmp_path):
    order = np.random.default_rng(1).permutation(60)
    table = pa.table({"id": order, "row": (order * 7) % 13})
    pq.write_table(table, tmp_path / "m.parquet")
    collection = collection_of(tmp_path, maps={"t0": str(tmp_path / "m.parquet")})
    weight = collection.state_dict()["rows.embedding_bags.t0.weight"]
    wanted = weight[torch.from_numpy((np.arange(60) * 7) % 13)]
    assert torch.equal(embed_ids(collection, TABLES)["f0"], wanted)


def test_an_artefact_holds_the_map_and_needs_no_file(tmp_path):
    paths = files(
        tmp_path, t0=np.arange(60) // 7, t2=np.stack([np.arange(75) % 9, np.arange(75) // 9], 1)
    )
    collection = collection_of(tmp_path, maps=paths)
    batch = random_batch(TABLES, seed=2)
    wanted = collection(batch).values()
    size = 4 * 8 * (9 + 9 + 9) + 60 * 4 // 8 + -(-75 * 2 * 4 // 8) + 4 * 8 * 90
    assert collection.footprint.serve_bytes == size
    save(collection, tmp_path / "a")
    for path in paths.values():
        (tmp_path / path).unlink()
    assert torch.equal(load(tmp_path / "a")(batch).values(), wanted)


def test_the_state_of_a_map_stays_when_its_file_changes(tmp_path):
    paths = files(tmp_path, t0=np.arange(60) // 6)
    trained = collection_of(tmp_path, maps=paths)
    state = trained.state_dict()
    files(tmp_path, t0=np.arange(60)[::-1] // 6)
    other = collection_of(tmp_path, maps=paths, seed=5)
    batch = batch_of({"f0": [[3], [50]], "f1": [[1], [2]], "f2": [[3], [4]]})
    assert not torch.equal(other(batch).values(), trained(batch).values())
    other.load_state_dict(state)
    assert torch.equal(other(batch).values(), trained(batch).values())


@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16, 17, 25, 31, 32])
def test_codes_of_any_width_come_back(bits):
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, 501)
    stream = torch.from_numpy(np.concatenate([np.zeros(3, np.uint8), packed(codes, bits)]))
    starts, mask = 24 + bits * torch.arange(501), torch.tensor(2**bits - 1)
    assert np.array_equal(gather_codes(stream, starts, mask, bits).numpy(), codes)
    assert len(stream) == 3 + -(-501 * bits // 8)


@pytest.mark.skipif(compiled.why_missing() is not None, reason="no compiled look-up")
@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_codes_of_many_bits_are_read_by_the_compiled_look_up(tmp_path, combine):
    rows = {"t0": (70_000, 9, 200_000), "t1": (5, 66_000, 3)}
    collection = collection_of(tmp_path, rows=rows, combine=combine)
    save(collection, tmp_path / "a")
    fused, batch = load(tmp_path / "a"), random_batch(TABLES, seed=3)
    assert fused._fused is not None
    torch.testing.assert_close(fused(batch).values(), collection(batch).values())


def refused(tmp_path, reason, **settings):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        collection_of(tmp_path, **settings)


def test_maps_that_do_not_fit_are_refused_with_table_and_file(tmp_path):
    (good,) = files(tmp_path, t0=np.arange(60) // 2).values()
    digest = summarise_row_map(good).sha256
    collection_of(tmp_path, maps={"t0": good}, digests={"t0": digest})
    refused(
        tmp_path, "t0': expected a map of the SHA-256 abc", maps={"t0": good}, digests={"t0": "abc"}
    )
    refused(tmp_path, "table 't1' has 90 ids, and its map", maps={"t1": good})
    refused(
        tmp_path, "names row 29, and rows has 29 of them", maps={"t0": good}, rows={"t0": (29,)}
    )
    refused(tmp_path, "rows has 2 columns, its map", maps={"t0": good}, rows={"t0": (30, 30)})
    refused(tmp_path, "other", maps={"other": good})
    refused(
        tmp_path, "digests names t1, which has no map", maps={"t0": good}, digests={"t1": digest}
    )
    refused(tmp_path, "rows of 't0' names no column", rows={"t0": ()})
    refused(tmp_path, "cannot be read", maps={"t0": str(tmp_path / "none.npy")})
    refused(tmp_path, "cannot be read", maps={"t0": "a\x00b.npy"})
    refused(tmp_path, "maps of 't0' must be the path of a file, got 1", maps={"t0": 1})
    refused(tmp_path, "expected skips by table, got [True]", maps={"t0": good}, skips=[True])
    refused(tmp_path, "rows of 't0' must be a list of how many", rows={"t0": 5})
    refused(tmp_path, "rows of table 't0' must be an integer of at least 1", rows={"t0": (5, 0)})
    (tmp_path / "m.csv").write_text("1")
    refused(tmp_path, "ends with .npy or .parquet", maps={"t0": str(tmp_path / "m.csv")})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (np.full(60, -2), "got -2"),
        (np.full(60, 2**31), "got 2147483648"),
        (np.full(60, -1), "column 0 names no row"),
        (np.full(60, 0.5), "expected integers of the shape"),
        (np.zeros((60, 0), np.int64), "1 to 1024 columns"),
        (np.zeros((2, 3, 4), np.int64), "expected integers of the shape"),
        (np.array([object()]), "cannot be read"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, rows, reason):
    np.save(tmp_path / "m.npy", rows)
    refused(tmp_path, reason, maps={"t0": str(tmp_path / "m.npy")})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": [0, 0, 2], "row": [1, 1, 1]}, "id 0 is there 2 times"),
        ({"id": [0, 1, 3], "row": [1, 1, 1]}, "id 3 is outside [0, 3)"),
        ({"row": [1, None, 2]}, "'row' has nulls"),
        ({"row": ["a", "b", "c"]}, "expected integer columns; 'row' is string"),
        ({"id": [0, 1, 2]}, "1 to 1024 columns"),
    ],
)
def test_bad_parquet_is_refused(tmp_path, columns, reason):
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    refused(tmp_path, reason, maps={"t0": str(tmp_path / "m.parquet")})


def test_a_damaged_file_is_refused(tmp_path):
    for suffix in ("npy", "parquet"):
        (path,) = files(tmp_path, suffix, t0=np.arange(60)).values()
        whole = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path, "cannot be read", maps={"t0": path})


def test_a_map_for_another_vocabulary_is_refused_before_training(tmp_path):
    path = str(tmp_path / "m.parquet")
    write_row_map(path, np.arange(60), vocabulary="ab" * 32)
    method = Mapped(maps={"t0": path})
    spec = pooled(BackendCase(config=method), TABLES).plan.tables[0]
    method.check_vocabularies([spec], {"t0": "ab" * 32})
    method.check_vocabularies([spec], {})
    with pytest.raises(ConfigError, match=r"'t0': its map .* was made for another vocabulary"):
        method.check_vocabularies([spec], {"t0": "cd" * 32})


def test_clusters_of_trained_rows_beat_hashing_in_equal_rows(tmp_path):
    planted = plant(seed=3)
    torch.manual_seed(0)
    full = Clicks(planted, Full(), 8)
    fit(full, planted, epochs=2)
    counts = planted.counts(TRAIN)
    trained = {name: full.form.tensors[f"rows.{name}"] for name in counts}
    maps = files(tmp_path, **{n: kmeans_map(trained[n], 30, counts=counts[n]) for n in counts})
    scores = {}
    for method in (Hash(num_buckets=30, collisionless=0), Mapped(maps=maps)):
        torch.manual_seed(0)
        model = Clicks(planted, method, 8)
        fit(model, planted, epochs=2)
        scores[method.name] = auc(model, planted)
    assert scores["mapped"] > scores["hash"] + 0.02
