"""Features whose ids are hashes of values: from raw logs to an artefact, without any vocabulary."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.lookup import HashedIds
from embcomp.data_pipelines.preparing.text_hash import hash_texts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import ConfigError, DataError
from tests.helpers.raw_logs import folder_bytes, read_split

pytestmark = pytest.mark.slow

SCHEMA = """
name: shop
label: y
categorical: [{name: user, encode: hash}, {name: tags, separator: "|", encode: hash}, shop]
"""
SPLIT = {"kind": "chronological", "train": 0.8, "valid": 0.1, "test": 0.1}


def log(seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = 400
    users = rng.integers(0, 2**63, 60, dtype=np.uint64)[rng.integers(0, 60, rows)]
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "user": [str(each) if each % 9 else "" for each in users],
            "tags": [
                "|".join(f"t{t}" for t in rng.integers(0, 9, n)) for n in rng.integers(0, 4, rows)
            ],
            "shop": rng.integers(0, 4, rows),
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "shop.yaml").write_text(SCHEMA)
    for day in (1, 2):
        log(day).write_csv(folder / f"{day}.csv")
    options = {"importer": "table", "schema": folder / "shop.yaml", "split": SPLIT}
    prepare(folder / "1.csv", folder / "data1", **options)
    prepare(folder / "2.csv", folder / "data2", extend=folder / "data1", **options)
    return folder


def config_of(home, *overrides):
    return parse_config(
        {
            "name": "run",
            "data": {"path": str(home / "data1"), "batch_size": 64},
            "tables": {
                "embedding_dim": 4,
                "method": {"name": "unified", "num_buckets": 50},
                "overrides": {"tags": {"name": "hash", "num_buckets": 20}},
                "first_order": {"name": "hash", "num_buckets": 20},
            },
            "model": {"name": "deepfm", "hidden_units": [8]},
            "train": {"max_steps": 4, "row_optimizer": {"learning_rate": 0.5}},
        },
        overrides,
    )


def test_ids_are_hashes_that_do_not_change():
    values = pl.Series(
        ["0", "18446744073709551615", "a longer text than twelve bytes", None, "商品"]
    )
    ids = HashedIds().ids(values)
    assert ids.dtype == np.int32
    hashes = [int(each) for each in hash_texts(values, 31)]
    expected = [2 + each % (2**31 - 2) for each in hashes]
    assert ids.tolist() == [*expected[:3], 0, expected[4]]
    assert ids.tolist() == VECTORS


VECTORS = [625024011, 2057239963, 141970218, 0, 1229208099]


def test_a_dataset_has_no_vocabulary_of_them(home):
    info = DatasetInfo.load(home / "data1")
    user, tags, shop = info.categorical
    assert user.is_hashed and tags.is_hashed and not shop.is_hashed
    assert user.num_embeddings == 2**31 and not user.vocabulary and shop.vocabulary
    rows = read_split(info, "train")
    raw = log(1).head(320)
    known = HashedIds().ids(raw["user"].replace({"": None}))
    assert rows["user"].to_list() == known.tolist()
    assert user.missing == (log(1)["user"] == "").sum() > 0
    assert info.splits["test"].unseen_rate["user"] == 0
    validate_dataset(home / "data1")
    again = DatasetInfo.load(home / "data2")
    assert again.categorical[0].room is None and again.categorical[2].room == 0


def test_a_command_hashes_features_of_any_format(home, tmp_path):
    command = ["prepare", "table", str(home / "1.csv"), str(tmp_path / "data1"), "--split"]
    command += ["chronological", "--name", "shop", "--schema", str(tmp_path / "plain.yaml")]
    (tmp_path / "plain.yaml").write_text(SCHEMA.replace(", encode: hash", ""))
    result = CliRunner().invoke(app, [*command, "--encode", "user=hash", "--encode", "tags=hash"])
    assert result.exit_code == 0, result.output
    there, here = folder_bytes(home / "data1"), folder_bytes(tmp_path / "data1")
    parts = [name for name in there if name != "dataset.json"]
    assert sorted(there) == sorted(here) and all(there[name] == here[name] for name in parts)


def test_what_cannot_be_is_said(home, tmp_path):
    options = {"importer": "table", "schema": home / "shop.yaml", "split": SPLIT}
    with pytest.raises(DataError, match="encode of user is 'md5'; there are vocabulary, hash, ids"):
        prepare(home / "1.csv", tmp_path / "out", encode={"user": "md5"}, **options)
    with pytest.raises(DataError, match="encode names 'nobody'"):
        prepare(home / "1.csv", tmp_path / "out", encode={"nobody": "hash"}, **options)
    with pytest.raises(DataError, match="'user' are hashes of values in one of the two only"):
        more = {"encode": "vocabulary", "extend": home / "data1"}
        prepare(home / "2.csv", tmp_path / "out", **more, **options)
    (tmp_path / "odd.yaml").write_text(SCHEMA.replace("name: user,", "name: user, min_count: 2,"))
    with pytest.raises(DataError, match="nobody counts values that are hashed"):
        prepare(home / "1.csv", tmp_path / "out", importer="table", schema=tmp_path / "odd.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tables.overrides={}", None),
        (
            "tables.overrides={tags: full}",
            "tables.method: the ids of 'tags' are hashes .* full would",
        ),
        ("tables.first_order=full", "tables.first_order: the ids of 'user' are hashes"),
    ],
)
def test_methods_that_keep_something_for_each_id_are_refused(home, tmp_path, override, says):
    from embcomp.planning.config_plan import plan_config, sizes_of_dataset

    sizes = sizes_of_dataset(home / "data1")
    if says is None:
        plan = plan_config(config_of(home, override), sizes)
        assert plan.main.footprint.serve_bytes == 50 * 2 * 4
        return
    with pytest.raises(ConfigError, match=says):
        plan_config(config_of(home, override), sizes)


def test_from_raw_rows_to_an_artefact_and_on_to_the_next_day(home, tmp_path):
    from embcomp.training import load_model, train
    from embcomp.training.export import export_run

    report = train(config_of(home), runs=tmp_path, quiet=True)
    assert report.test["rows"] == 40
    export_run(tmp_path / "run", tmp_path / "artefact")
    out = tmp_path / "scores.parquet"
    command = ["score", str(tmp_path / "artefact"), str(home / "1.csv"), str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    scores = pl.read_parquet(out)
    assert scores.height == 400
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "artefact")])
    assert result.exit_code == 1 and "are hashes of its values" in result.stderr
    warm = f"train.warm_start={tmp_path / 'run'}"
    day2 = config_of(home, "name=day2", f"data.path={home / 'data2'}", warm)
    found = train(day2, runs=tmp_path, quiet=True).stages[-1]["result"]["warm_start"]
    assert list(found["tables"]) == ["shop"]
    assert json.loads((tmp_path / "day2" / "warm_start.json").read_text())["steps"] > 0
    assert load_model(tmp_path / "day2").state_dict()
