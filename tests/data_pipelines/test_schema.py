from __future__ import annotations

import json

import pytest

from embcomp.data_pipelines.schema import (
    CategoricalFeature,
    DatasetInfo,
    NumericFeature,
    SplitInfo,
)
from embcomp.errors import DataError


def make_info(**changes: object) -> DatasetInfo:
    fields: dict = {
        "name": "toy",
        "group": "user",
        "numeric": [NumericFeature(name="x", transform="standard_log", mean=1.0, std=2.0)],
        "categorical": [
            CategoricalFeature(name="user", num_embeddings=5, vocabulary="vocabulary/user.parquet")
        ],
        "splits": {"train": SplitInfo(files=["train-00000.parquet"], rows=4, positives=1)},
    }
    return DatasetInfo(**(fields | changes))


def save(info: DatasetInfo, folder) -> None:
    for file in info.files():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")
    info.save(folder)


def test_load_gives_back_what_was_saved_and_knows_its_folder(tmp_path):
    info = make_info(bayes={"auc": 0.8, "log_loss": 0.4})
    save(info, tmp_path)
    loaded = DatasetInfo.load(tmp_path)
    assert loaded.model_dump() == info.model_dump()
    assert loaded.folder == tmp_path
    assert loaded.split("train").label_rate == 0.25
    assert not list(tmp_path.glob(".*"))


def test_equal_info_gives_equal_bytes(tmp_path):
    save(make_info(), tmp_path)
    first = (tmp_path / "dataset.json").read_bytes()
    DatasetInfo.load(tmp_path).save(tmp_path)
    assert (tmp_path / "dataset.json").read_bytes() == first


def test_a_folder_without_dataset_json_is_named(tmp_path):
    with pytest.raises(DataError, match="not a prepared dataset"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_an_error(tmp_path, version):
    save(make_info(), tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["format_version"] = version
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="this embcomp reads 1"):
        DatasetInfo.load(tmp_path)


def test_a_missing_part_is_named(tmp_path):
    save(make_info(), tmp_path)
    (tmp_path / "train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"names train-00000\.parquet"):
        DatasetInfo.load(tmp_path)


def test_unknown_keys_and_broken_json_are_errors(tmp_path):
    save(make_info(), tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["categorical"][0]["rows"] = 3
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"categorical\.0\.rows"):
        DatasetInfo.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "movie"}, "not a categorical feature"),
        ({"label": "x"}, "used twice"),
    ],
)
def test_names_must_agree(changes, message):
    with pytest.raises(ValueError, match=message):
        make_info(**changes)


def test_a_transform_needs_its_constants():
    with pytest.raises(ValueError, match="'min', 'max'"):
        NumericFeature(name="x", transform="min_max")


def test_an_unknown_split_names_those_there_are():
    with pytest.raises(DataError, match="train"):
        make_info().split("valid")
