"""Datasets that extend others: known values keep their ids, whatever comes, goes and comes back."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines import prepare as prepare_module
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import encode_pass
from embcomp.data_pipelines.preparing.news import growth_news
from embcomp.data_pipelines.schema import FIRST_ID, UNSEEN_ID, DatasetInfo
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import DataError
from embcomp.io.digests import sha256_of_file
from tests.helpers.raw_logs import folder_bytes, read_split, vocabulary

SCHEMA = "{name: shop, label: y, categorical: [{name: user, min_count: 2}, tags], numeric: [{name: x, transform: min_max}]}"
ALL_TRAIN = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}
ROOM = {"room": "20%"}


def day(number: int) -> pl.DataFrame:
    """A day's rows: values drift, so that some come, some go and some come back."""
    rng = np.random.default_rng(number)
    rows = 600
    users = rng.zipf(1.3, rows) % 90 + 40 * (number % 3)
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "user": [f"u{each}" for each in users],
            "tags": [f"t{each}" for each in rng.integers(0, 20 + 5 * number, rows)],
            "x": rng.normal(number, 1, rows),
        }
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    (folder / "shop.yaml").write_text(SCHEMA)
    for number in range(1, 6):
        day(number).write_csv(folder / f"day{number}.csv")
    return folder


def prepared(raw, number, output, **options):
    return prepare(
        raw / f"day{number}.csv",
        output,
        importer="table",
        schema=raw / "shop.yaml",
        name=f"day{number}",
        split=ALL_TRAIN,
        **options,
    )


@pytest.fixture(scope="module")
def chain(raw, tmp_path_factory):
    """Five datasets, each of which extends the one before."""
    folder = tmp_path_factory.mktemp("chain")
    infos = [prepared(raw, 1, folder / "1", **ROOM)]
    for number in range(2, 6):
        before = infos[-1].folder
        more = {"extend": before, "retire_after": 2, "decay": 0.5}
        infos.append(prepared(raw, number, folder / str(number), **ROOM, **more))
    return infos


def test_each_day_follows_from_the_one_before(chain):
    for name, least in (("user", 2), ("tags", 1)):
        ids: dict[str, int] = {}
        decayed: dict[str, float] = {}
        idle: dict[str, int] = {}
        size = 0
        for number, info in enumerate(chain, 1):
            counts = Counter(day(number)[name].to_list())
            for value in ids:
                decayed[value] = 0.5 * decayed[value] + counts[value]
                idle[value] = 0 if counts[value] else idle[value] + 1
            gone = [value for value in ids if idle[value] == 2]
            new = sorted(
                (v for v in counts if v not in ids and counts[v] >= least),
                key=lambda value: (-counts[value], value),
            )
            kept = len(ids) - len(gone)
            for value in gone:
                del ids[value]
            free = (n for n in range(FIRST_ID, 10**6) if n not in set(ids.values()))
            for value, number_of_new in zip(new, free):
                ids[value], decayed[value], idle[value] = number_of_new, counts[value], 0
            found = vocabulary(info, name)
            assert dict(zip(found["value"], found["id"])) == ids
            assert found["id"].is_sorted()
            assert found["count"].to_list() == [counts[value] for value in found["value"]]
            feature = next(each for each in info.categorical if each.name == name)
            used = max(ids.values()) + 1
            if used > size:
                size = used + -(-used // 5)
            assert feature.num_embeddings == size
            assert feature.room == size - FIRST_ID - len(ids)
            if number > 1:
                assert found["decayed"].to_list() == [decayed[value] for value in found["value"]]
                assert found["idle"].to_list() == [idle[value] for value in found["value"]]
                change = feature.change
                assert (change.kept, change.new, change.retired) == (kept, len(new), len(gone))
                assert change.unseen == sum(idle[value] > 0 for value in ids)
            rows = read_split(info, "train")[name].to_list()
            assert rows == [ids.get(value, UNSEEN_ID) for value in day(number)[name]]
            assert info.splits["train"].unseen_rate[name] == rows.count(UNSEEN_ID) / len(rows)
    assert any(feature.change.retired for feature in chain[-1].categorical)


def test_the_chain_is_described_and_validates(chain):
    for number, info in enumerate(chain, 1):
        validate_dataset(info.folder)
        assert (info.extends is None) == (number == 1)
        assert info.numeric[0].min == chain[0].numeric[0].min  # a number means what it meant
    last = chain[-1].extends
    assert (last.day, last.name, last.digest) == (5, "day4", chain[-2].digest)
    assert growth_news(chain[0]) == []
    (line,) = growth_news(chain[-1])
    assert line.startswith("day 5, after day4: ") and "retired; room for" in line


def test_methods_see_counts_that_reach_back(chain):
    counts = id_counts(chain[-1])["user"]
    found = vocabulary(chain[-1], "user")
    assert counts[found["id"].to_numpy()].tolist() == np.rint(found["decayed"].to_numpy()).tolist()
    rows = read_split(chain[-1], "train")["user"]
    assert counts[UNSEEN_ID] == (rows == UNSEEN_ID).sum()


def test_the_same_bytes_in_little_memory_and_after_a_kill(raw, chain, tmp_path, monkeypatch):
    def again(output):
        more = {"extend": chain[2].folder, "retire_after": 2, "decay": 0.5}
        return prepared(raw, 4, output, **ROOM, **more)

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: 20_000)
    monkeypatch.setattr(encode_pass.EncodePass, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "4")
    monkeypatch.undo()
    monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: 20_000)
    again(tmp_path / "4")
    assert folder_bytes(tmp_path / "4") == folder_bytes(chain[3].folder)


def test_a_dataset_of_an_earlier_version_can_be_extended(raw, tmp_path):
    first = prepared(raw, 1, tmp_path / "1")
    assert first.categorical[0].room is None
    assert "room" not in json.loads((tmp_path / "1" / "dataset.json").read_text())["categorical"][0]
    second = prepared(raw, 2, tmp_path / "2", extend=tmp_path / "1")
    there, here = vocabulary(first, "user"), vocabulary(second, "user")
    assert here.head(there.height)["value"].to_list() == there["value"].to_list()
    assert second.categorical[0].room == 0


def test_the_command(raw, chain, tmp_path):
    command = ["prepare", "table", str(raw / "day2.csv"), str(tmp_path / "2"), "--name", "day2"]
    command += ["--schema", str(raw / "shop.yaml"), "--split", "chronological"]
    command += ["--shares", "1,0,0", "--extend", str(chain[0].folder), "--room", "0.2"]
    result = CliRunner().invoke(app, [*command, "--decay", "0.5", "--retire-after", "2"])
    assert result.exit_code == 0, result.output
    assert "day 2, after day1" in result.stderr
    assert folder_bytes(tmp_path / "2") == folder_bytes(chain[1].folder)
    shown = CliRunner().invoke(app, ["cat", str(tmp_path / "2")]).stdout
    feature = chain[1].categorical[0]
    assert f"{feature.num_embeddings:,} ({feature.room:,} free)" in shown
    assert growth_news(chain[1])[0].split(";")[0] in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": 0.5}, "decay says how values of an earlier dataset go on"),
        ({"retire_after": 3}, "retire_after says how"),
        ({"room": "-5%"}, "room: '-5%' is not a share"),
        ({"room": "many"}, "room: 'many' is not a share"),
        ({"extend": "first", "decay": 1.5}, "decay is 1.5"),
        ({"extend": "first", "decay": float("nan")}, "decay is nan"),
        ({"extend": "first", "retire_after": 0}, "retire_after is 0"),
        ({"extend": "nowhere"}, "is not a prepared dataset"),
        ({"extend": "first", "numeric": "log1p"}, "'x' went through min_max there"),
        ({"extend": "first", "numeric": "bucket"}, "categorical features are user, tags, here x"),
    ],
)
def test_choices_that_cannot_be(raw, chain, tmp_path, options, says):
    if options.get("extend") == "first":
        options = {**options, "extend": chain[0].folder}
    with pytest.raises(DataError, match=says):
        prepared(raw, 2, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def damaged(frame: pl.DataFrame, what: str) -> pl.DataFrame:
    first = pl.int_range(pl.len()) == 0
    second = pl.int_range(pl.len()) == 1
    change = {
        "value": pl.when(second).then(pl.col("value").first()).otherwise("value").alias("value"),
        "id": pl.when(second).then(pl.col("id").first()).otherwise("id").alias("id"),
        "count": pl.when(first).then(-1).otherwise("count").alias("count"),
        "decayed": pl.when(first).then(float("nan")).otherwise("decayed").alias("decayed"),
        "range": pl.when(first).then(10**6).otherwise("id").cast(pl.Int32).alias("id"),
    }
    return frame.with_columns(change[what])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("value", "holds the value 'u.*' of 'user' twice"),
        ("id", "holds the id . of 'user' twice"),
        ("count", "a count of 'user' cannot be"),
        ("decayed", "a decayed count of 'user' cannot be"),
        ("range", "an id of 'user' cannot be"),
    ],
)
def test_vocabularies_that_cannot_be(raw, chain, tmp_path, what, says):
    info = DatasetInfo.load(chain[1].folder)
    for name, content in folder_bytes(info.folder).items():
        (tmp_path / "before" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "before" / name).write_bytes(content)
    file = info.categorical[0].vocabulary
    changed = damaged(vocabulary(info, "user"), what)
    changed.write_parquet(tmp_path / "before" / file)
    # As one's own program may have written it, with checksums and all, or none at all.
    info.checksums.pop(file)
    info.save(tmp_path / "before")
    with pytest.raises(DataError, match=says):
        prepared(raw, 3, tmp_path / "out", extend=tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_vocabulary_that_was_changed_is_named(raw, chain, tmp_path):
    for name, content in folder_bytes(chain[1].folder).items():
        (tmp_path / "before" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "before" / name).write_bytes(content)
    path = tmp_path / "before" / chain[1].categorical[0].vocabulary
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    assert sha256_of_file(path) != chain[1].checksums[chain[1].categorical[0].vocabulary].sha256
    with pytest.raises(DataError, match="was changed since it was written"):
        prepared(raw, 3, tmp_path / "out", extend=tmp_path / "before")


def test_the_output_cannot_be_what_is_extended(raw, tmp_path):
    prepared(raw, 1, tmp_path / "1")
    with pytest.raises(DataError, match="is the dataset that is to be extended"):
        prepared(raw, 2, tmp_path / "1", extend=tmp_path / "1", overwrite=True)
