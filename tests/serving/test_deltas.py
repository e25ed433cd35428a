"""A delta makes the next artefact to the byte, is small where little changed, or is refused in a line."""

from __future__ import annotations

import random
import shutil
import tracemalloc
import zipfile

import numpy as np
import polars as pl
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from typer.testing import CliRunner

from embcomp import CompressedEmbeddingBagCollection, Full, load, save
from embcomp.cli import app
from embcomp.data_pipelines.prepare import prepare
from embcomp.errors import ArtefactError
from embcomp.models import ModelInputs
from embcomp.models.dlrm import DLRMConfig
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_saving import save_model
from embcomp.serving.deltas import row_differences
from embcomp.serving.deltas.delta_applying import apply_delta
from embcomp.serving.deltas.delta_making import make_delta
from embcomp.serving.deltas.row_differences import OldRows, difference, restored
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables, plain_tables
from tests.helpers.artefact_damage import DAMAGES
from tests.helpers.backends_under_test import CASES


def bytes_of(folder):
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def old_rows(rows):
    return OldRows(read=lambda start, stop: rows[start:stop].copy(), count=len(rows))


@pytest.mark.parametrize("width", [1, 4, 16, 20])
def test_rows_that_changed_moved_came_and_went_are_told_apart(width):
    rng = np.random.default_rng(width)
    for trial in range(40):
        old = rng.integers(0, 256, (rng.integers(0, 300), width), dtype=np.uint8)
        if trial % 3 == 0:
            old[rng.random(len(old)) < 0.3] = 0  # rows that are alike
        new = old[rng.random(len(old)) > rng.choice([0, 0.05, 0.5])]
        places = np.sort(rng.integers(0, len(new) + 1, rng.integers(0, 9)))
        new = np.insert(new, places, rng.integers(0, 256, (len(places), width)), axis=0)
        new[rng.random(len(new)) < rng.choice([0, 0.1, 1])] += 1
        shifts, found, literals = [0, 0], [], 0
        for first in range(0, len(new), 64):
            block = new[first : first + 64]
            one = difference(block, first, old_rows(old), shifts[0])
            again, end = restored(one.content, block.shape, first, old_rows(old), shifts[1])
            shifts, literals = [one.shift, end], literals + one.literals
            assert one.shift == end
            found.append(again)
        assert np.array_equal(np.concatenate([new[:0], *found]), new)


def test_dropped_rows_and_new_ones_in_the_middle_cost_themselves_alone():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, (1000, 16), dtype=np.uint8)
    new = np.insert(np.delete(old, rng.choice(1000, 50, replace=False), axis=0), 300, 7, axis=0)
    shift, literals, size = 0, 0, 0
    for first in range(0, len(new), 100):
        one = difference(new[first : first + 100], first, old_rows(old), shift)
        shift, literals, size = one.shift, literals + one.literals, size + len(one.content or b"")
    assert literals == 1 and size < len(new) * 16 / 8


def changed(collection, share):
    """The same collection with some rows that training went on with."""
    torch.manual_seed(9)
    state = collection.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.dim() == 2:
            rows = torch.rand(len(tensor)) < share
            tensor[rows] += 0.01 * torch.randn(int(rows.sum()), tensor.shape[1])
    collection.load_state_dict(state)
    return collection


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_patched_artefact_is_the_new_one_to_the_byte(case, tmp_path, monkeypatch):
    monkeypatch.setattr(row_differences, "BLOCK_BYTES", 512)
    tables = awkward_tables((16, 6, 3))
    collection = pooled(CASES[case], tables)
    row_type = ROW_TYPES[sorted(CASES).index(case) % 4]
    save(collection, tmp_path / "old", row_type=row_type)
    save(changed(collection, 0.3), tmp_path / "new", row_type=row_type, max_file_size=3000)
    before = bytes_of(tmp_path / "old")
    delta = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    apply_delta(tmp_path / "old", tmp_path / "delta", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "new")
    assert bytes_of(tmp_path / "old") == before
    rows, literal = delta.rows["rows"]
    assert literal <= rows and delta.bytes == (tmp_path / "delta").stat().st_size


def test_a_delta_is_of_the_size_of_what_changed(tmp_path):
    tables = plain_tables(16, rows=(4000, 3000, 2000))
    collection = pooled(CASES["full"], tables)
    save(collection, tmp_path / "old")
    save(collection, tmp_path / "same", max_file_size=200_000)
    save(changed(collection, 0.05), tmp_path / "new")
    new = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    rows, literal = new.rows["rows"]
    assert rows == 9000 and 300 < literal < 600
    assert new.bytes < literal * 64 + rows / 8 + 6000 < new.new_bytes / 8
    same = make_delta(tmp_path / "old", tmp_path / "same", tmp_path / "none")
    assert same.rows["rows"] == (9000, 0) and same.bytes < 6000
    again = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "delta").read_bytes() and again.bytes


def test_neither_artefact_is_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_differences, "BLOCK_BYTES", 1 << 16)
    collection = pooled(CASES["full"], plain_tables(16, rows=(60_000, 50_000, 40_000)))
    save(collection, tmp_path / "old")
    save(changed(collection, 0.5), tmp_path / "new")
    tracemalloc.start()
    try:
        delta = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
        apply_delta(tmp_path / "old", tmp_path / "delta", tmp_path / "out")
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "new")
    assert held < 3 << 20 < delta.bytes < delta.new_bytes  # a checksum's pieces are of 1 MiB


SCHEMA = "name: shop\nlabel: {column: bought}\ncategorical: [user, item]\nmin_count: 2\n"


def shop(folder, seed, users):
    """A day's data, prepared, and a model of it whose rows stay with their values."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = [f"{rng.integers(2)},u{rng.choice(users)},i{rng.integers(300)}" for _ in range(4000)]
    (folder / "raw.csv").write_text("bought,user,item\n" + "\n".join(lines) + "\n")
    (folder / "schema.yaml").write_text(SCHEMA)
    info = prepare(
        folder / "raw.csv", folder / "data", importer="table", schema=folder / "schema.yaml"
    )
    configs = [
        EmbeddingBagConfig(
            name=feature.name,
            num_embeddings=feature.num_embeddings,
            embedding_dim=8,
            feature_names=[feature.name],
        )
        for feature in info.categorical
    ]
    inputs = ModelInputs(
        feature_names=("user", "item"), embedding_dim=8, num_dense=0, pooling="sum"
    )
    tables = CompressedEmbeddingBagCollection(configs, Full())
    torch.manual_seed(0)
    settings = DLRMConfig(top_hidden_units=(8,))
    save_model(
        settings.build(inputs, tables, None).eval(),
        folder / "artefact",
        settings=settings,
        inputs=inputs,
        dataset=info,
    )
    return folder / "artefact"


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days")
    return shop(folder / "old", 1, range(500)), shop(folder / "new", 2, range(40, 530))


@pytest.mark.parametrize("whole", [False, True])
def test_vocabularies_go_by_their_entries(days, tmp_path, whole):
    old, new = days
    delta = make_delta(old, new, tmp_path / "delta", whole_vocabularies=whole)
    apply_delta(old, tmp_path / "delta", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(new)
    assert bool(delta.entries) != whole
    if not whole:
        names = sorted(file.name for file in (old / "vocabulary").iterdir())
        before, after = (
            [pl.read_parquet(folder / "vocabulary" / name) for name in names] for folder in days
        )
        gone = sum(len(set(b["value"]) - set(a["value"])) for b, a in zip(before, after))
        assert delta.entries["dropped"] == gone > 30 and delta.entries["new"] > 0


def test_other_versions_of_pyarrow_are_named(days, tmp_path, monkeypatch):
    """Where they write other bytes."""
    from embcomp.serving.deltas import delta_applying

    make_delta(*days, tmp_path / "delta")
    write = delta_applying.write_entries
    monkeypatch.setattr(delta_applying.pa, "__version__", "0.0")
    monkeypatch.setattr(
        delta_applying,
        "write_entries",
        lambda entries, schema, path: write(entries.head(3), schema, path),
    )
    with pytest.raises(
        ArtefactError, match=r"made with pyarrow .*0\.0: install it, or make the delta"
    ):
        apply_delta(days[0], tmp_path / "delta", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    collection = pooled(CASES["coded"], plain_tables(8))
    save(collection, folder / "old")
    save(changed(collection, 0.5), folder / "new")
    make_delta(folder / "old", folder / "new", folder / "delta")
    return folder


def test_damaged_deltas_make_the_new_artefact_or_nothing(pair, tmp_path):
    content = (pair / "delta").read_bytes()
    wanted = bytes_of(pair / "new")
    draw, refused = random.Random(0), 0
    for trial in range(150):
        damaged = bytearray(content)
        if trial % 5 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / "delta").write_bytes(damaged)
        try:
            apply_delta(pair / "old", tmp_path / "delta", tmp_path / "out")
        except ArtefactError as error:
            refused += 1
            assert "delta" in str(error) and "\n" not in str(error)
        else:
            assert bytes_of(tmp_path / "out") == wanted
            shutil.rmtree(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    assert refused > 100


def rewritten(delta, path, entries):
    """A delta with other entries under names of its own."""
    with zipfile.ZipFile(delta) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, entries.get(name, lambda content: content)(old.read(name)))
    return path


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda text: text.replace(b'"config.json"', b'"../config.json"'),
            "stays inside the folder",
        ),
        (
            lambda text: text.replace(b'"format_version": 1', b'"format_version": 2'),
            "format_version",
        ),
        (lambda text: b"{", "delta.json is damaged"),
        (
            lambda text: text.replace(b'"row_bytes": 16', b'"row_bytes": 1073741824'),
            "damaged",
        ),
        (lambda text: text.replace(b'"start": 0', b'"start": 9'), "does not make the|damaged"),
    ],
)
def test_a_delta_that_says_what_it_should_not_is_refused(pair, tmp_path, made, told):
    delta = rewritten(pair / "delta", tmp_path / "delta", {"delta.json": made})
    with pytest.raises(ArtefactError, match=told) as caught:
        apply_delta(pair / "old", delta, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_blocks_take_no_rows_that_are_not_there():
    rows = np.arange(64, dtype=np.uint8).reshape(4, 16)
    one = difference(rows[1:], 0, old_rows(rows), 0)
    assert one.content is not None and one.literals == 0
    with pytest.raises(ValueError, match="does not have"):
        restored(one.content, (3, 16), 0, old_rows(rows[:2]), 0)
    for cut in range(len(one.content)):
        with pytest.raises(ValueError, match=r"ends too early|other rows|ascend|not have|away"):
            restored(one.content[:cut], (3, 16), 0, old_rows(rows), 0)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damaged_artefacts_are_neither_compared_nor_patched(pair, tmp_path, damage):
    shutil.copytree(pair / "old", tmp_path / "old")
    DAMAGES[damage](tmp_path / "old", random.Random(damage))
    for call in (
        lambda: make_delta(tmp_path / "old", pair / "new", tmp_path / "delta"),
        lambda: make_delta(pair / "new", tmp_path / "old", tmp_path / "delta"),
        lambda: apply_delta(tmp_path / "old", pair / "delta", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=str(tmp_path / "old")):
            call()
        assert [path.name for path in tmp_path.iterdir()] == ["old"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_verbs_say_sizes_and_refuse_in_one_line(pair, tmp_path):
    made = run("diff", pair / "old", pair / "new", tmp_path / "delta")
    assert made.exit_code == 0, made.output
    assert "rows: " in made.stdout and "% of the" in made.stdout
    patched = run("patch", pair / "old", tmp_path / "delta", tmp_path / "out")
    assert patched.exit_code == 0 and ArtefactConfig.read(pair / "new").digest in patched.stdout
    assert load(tmp_path / "out").feature_names == ["f0", "f1", "f2"]
    other = pooled(CASES["hash"], plain_tables(8))
    save(other, tmp_path / "hash")
    save(pooled(CASES["coded"], plain_tables(8)), tmp_path / "int8", row_type="int8")
    save(pooled(CASES["coded"], plain_tables(8)[:2]), tmp_path / "fewer")
    there = sorted(path.name for path in tmp_path.iterdir())
    for words, told in (
        (("diff", pair / "old", pair / "new", tmp_path / "delta"), "exists and is left as it is"),
        (("diff", pair / "old", pair / "new", tmp_path / "none" / "d"), "is not a folder"),
        (
            ("diff", pair / "old", tmp_path / "hash", tmp_path / "d"),
            "the method of tables' t0: hash",
        ),
        (("diff", pair / "old", tmp_path / "int8", tmp_path / "d"), "the row types of tables: "),
        (
            ("diff", pair / "old", tmp_path / "fewer", tmp_path / "d"),
            "t2: not there in the new one",
        ),
        (("diff", pair / "old", tmp_path / "nowhere", tmp_path / "d"), "does not exist"),
        (("patch", pair / "new", tmp_path / "delta", tmp_path / "o"), "is what it makes"),
        (("patch", tmp_path / "hash", tmp_path / "delta", tmp_path / "o"), "is another one"),
        (
            ("patch", pair / "old", tmp_path / "delta", tmp_path / "out"),
            "exists and is left as it is",
        ),
        (("patch", pair / "old", tmp_path / "nowhere", tmp_path / "o"), "does not exist"),
        (("patch", pair / "old", pair / "old" / "config.json", tmp_path / "o"), "damaged"),
    ):
        refused = run(*words)
        assert refused.exit_code == 1 and told in " ".join(refused.stderr.split()), refused.stderr
        assert "Traceback" not in refused.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == there
