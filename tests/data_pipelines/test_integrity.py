"""A dataset that is not as it was written is found out: quickly where that is cheap, or in full."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embcomp.data_pipelines import integrity
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import ArtefactError, DataError
from embcomp.planning.config_plan import sizes_of_dataset
from embcomp.search.evaluators.dataset_view import write_view
from embcomp.serving.artefact_folder import copy_dataset
from tests.helpers.raw_logs import write_criteo

FLIPS = 40


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "toy"
    write_toy_dataset(
        folder, rows=(60, 20, 20), num_values=(9, 5), multi_valued=["C2"], files_per_split=2
    )
    return folder


@pytest.fixture
def dataset(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "toy")


def edit(folder, change):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def make_old(folder):
    """What an embcomp without checksums wrote."""
    edit(folder, lambda content: (content.pop("checksums"), content.pop("digest")))


def rewrite(path, change):
    """Replace a part's rows by others, with checksums of its pages that are right."""
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def files_of(folder):
    return ["dataset.json", *DatasetInfo.load(folder).files()]


def test_every_flipped_bit_is_found_by_validate(pristine, dataset):
    rng = np.random.default_rng(0)
    for name in files_of(pristine):
        whole = (pristine / name).read_bytes()
        places = np.unique(np.append(rng.integers(0, 8 * len(whole), FLIPS), 8 * len(whole) - 1))
        for place in places.tolist():
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            (dataset / name).write_bytes(damaged)
            with pytest.raises(DataError):
                validate_dataset(dataset)
                pytest.fail(f"bit {place} of {name} passed")
        (dataset / name).write_bytes(whole)
    validate_dataset(dataset)


def swap_parts(folder):
    a, b = (folder / "train" / f"part-0000{i}.parquet" for i in (0, 1))
    other = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(other)


def reverse_rows(folder):
    rewrite(
        folder / "train" / "part-00001.parquet",
        lambda rows: rows.take(pa.array(range(len(rows) - 1, -1, -1))),
    )


def reorder_parts(folder):
    edit(folder, lambda content: content["splits"]["train"]["files"].reverse())


def swap_counts(folder):
    vocabulary = folder / "vocabulary" / "C1.parquet"
    rows = pq.read_table(vocabulary)
    values = rows.column("value").to_pylist()
    rewrite(vocabulary, lambda old: old.set_column(1, "value", pa.array(values[::-1])))


@pytest.mark.parametrize("change", [swap_parts, reverse_rows, reorder_parts, swap_counts])
def test_sound_files_in_other_places_or_orders_are_found(dataset, change):
    change(dataset)
    with pytest.raises(DataError, match="SHA-256|does not have its digest"):
        validate_dataset(dataset)


@pytest.mark.parametrize("change", [swap_parts, reverse_rows, reorder_parts])
def test_opening_finds_parts_that_were_replaced_or_reordered(dataset, change):
    change(dataset)
    with pytest.raises(DataError, match=r"bytes|footer|digest"):
        integrity.open_dataset(dataset)


def test_labels_that_changed_are_counted(dataset):
    make_old(dataset)
    info = integrity.open_dataset(dataset)
    integrity.check_labels(info, ["train", "valid", "test"])
    ones = pa.array(np.ones(30, np.float32))
    rewrite(dataset / "train/part-00000.parquet", lambda rows: rows.set_column(0, "label", ones))
    with pytest.raises(DataError, match=r"split train states \d+ positives, its files hold"):
        integrity.check_labels(info, ["train"])


def test_ranks_share_the_files_and_together_find_everything(dataset):
    info = integrity.open_dataset(dataset)
    for name in ("train/part-00000.parquet", "test/part-00001.parquet"):
        path = dataset / name
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    found = [integrity.damaged_files(info, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(name for names in found for name in names) == [
        "test/part-00001.parquet",
        "train/part-00000.parquet",
    ]
    assert max(map(len, found)) == 1


def test_a_flipped_value_is_not_read(tmp_path):
    write_criteo(tmp_path / "train.txt", 300)
    info = prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", min_count=1)
    (name,) = info.split("train").files
    column = pq.read_metadata(tmp_path / "out" / name).row_group(0).column(5)
    whole = bytearray((tmp_path / "out" / name).read_bytes())
    whole[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    (tmp_path / "out" / name).write_bytes(whole)
    with pytest.raises(DataError, match="the file is damaged"):
        list(ParquetLoader(tmp_path / "out", "train", batch_size=50))


def test_prepared_files_are_described_as_they_are(tmp_path):
    write_criteo(tmp_path / "train.txt", 300)
    info = prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", rows_per_group=50)
    assert sorted(info.checksums) == sorted(info.files())
    for name in info.files():
        labels = None
        if not name.startswith("vocabulary"):
            labels = int(np.asarray(pq.read_table(tmp_path / "out" / name)["label"]).sum())
        assert info.checksums[name] == integrity.record_of(tmp_path / "out" / name, labels)
    for raw in info.sources:
        assert raw.digest == raw.own_digest() != ""


def test_a_dataset_without_checksums_is_read_and_said_to_have_none(dataset):
    assert integrity.has_checksums(DatasetInfo.load(dataset))
    make_old(dataset)
    info = validate_dataset(dataset)
    assert not integrity.has_checksums(info)
    assert "records no checksums" in integrity.without_checksums(info)
    assert len(list(ParquetLoader(dataset, "train", batch_size=10))) == 6


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("vocabulary", "../x.parquet"),
        ("vocabulary", "/etc/passwd"),
        ("vocabulary", "a/../../x.parquet"),
        ("vocabulary", "./dataset.json"),
        ("files", "../train.parquet"),
        ("files", "train/\0.parquet"),
        ("files", "x" * 5000),
        ("checksums", "../x.parquet"),
    ],
)
def test_a_path_that_leaves_the_folder_is_refused_by_name(dataset, key, path):
    def change(content):
        if key == "vocabulary":
            content["categorical"][0]["vocabulary"] = path
        elif key == "files":
            content["splits"]["train"]["files"][0] = path
        else:
            content["checksums"][path] = next(iter(content["checksums"].values()))

    make_old(dataset) if key != "checksums" else None
    edit(dataset, change)
    with pytest.raises(DataError) as error:
        DatasetInfo.load(dataset)
    assert path[:20].replace("\0", "\\x00") in str(error.value)


@pytest.mark.parametrize("absurd", [10**9, 2**31 + 1, 10**12, 10**30])
def test_an_absurd_number_of_embeddings_is_refused_with_the_feature(dataset, absurd):
    make_old(dataset)
    edit(dataset, lambda content: content["categorical"][1].update(num_embeddings=absurd))
    with pytest.raises(DataError, match="feature 'C2' has num_embeddings"):
        sizes_of_dataset(dataset)


@pytest.mark.parametrize("wrong", [10, 12])
def test_a_vocabulary_of_another_size_is_refused_with_the_feature(dataset, wrong):
    make_old(dataset)

    def change(content):
        content["categorical"][0].update(num_embeddings=wrong, num_raw_values=0)

    edit(dataset, change)
    with pytest.raises(DataError, match=r"C1\.parquet has 9 values, but C1 has 1[02] embeddings"):
        sizes_of_dataset(dataset)


def test_descriptions_that_are_no_descriptions_are_named(dataset):
    for text in ("[" * 100_000, '{"format_version": 1' + "0" * 5000 + "}", "[]", "\ud800"):
        (dataset / "dataset.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(DataError, match=r"dataset\.json"):
            DatasetInfo.load(dataset)


def test_a_view_for_candidates_keeps_its_paths_inside_and_its_checksums(dataset, tmp_path):
    view = write_view(dataset, tmp_path / "view", 8)
    info = validate_dataset(view)
    assert integrity.has_checksums(info)
    assert all(not file.startswith("/") for file in info.files())
    edit(view, lambda content: content.update(name="older"))
    assert DatasetInfo.load(write_view(dataset, tmp_path / "view", 8)).name == "toy"


def test_a_vocabulary_cannot_take_the_place_of_an_artefacts_own_file(dataset, tmp_path):
    make_old(dataset)
    (dataset / "vocabulary" / "C1.parquet").rename(dataset / "config.json")
    edit(dataset, lambda content: content["categorical"][0].update(vocabulary="config.json"))
    with pytest.raises(ArtefactError, match=r"feature 'C1' has the vocabulary 'config\.json'"):
        copy_dataset(DatasetInfo.load(dataset), None, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_an_artefact_describes_its_own_vocabularies_and_copies_no_damaged_one(dataset, tmp_path):
    (tmp_path / "a").mkdir()
    copy_dataset(DatasetInfo.load(dataset), None, tmp_path / "a")
    copied = integrity.open_dataset(tmp_path / "a")
    assert sorted(copied.checksums) == ["vocabulary/C1.parquet", "vocabulary/C2.parquet"]
    integrity.check_digests(copied)
    swap_counts(dataset)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"C1\.parquet: the SHA-256 is not"):
        copy_dataset(DatasetInfo.load(dataset), None, tmp_path / "b")
