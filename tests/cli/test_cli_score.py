"""`embcomp score`: raw rows through an artefact, equal to `prepare` and `evaluate` of the same rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import EmbeddingBagConfig
from typer.testing import CliRunner

from embcomp import CompressedEmbeddingBagCollection, Full, encoder, load, save
from embcomp.cli import app
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.serving.raw_scoring import score as score_rows
from embcomp.training import train
from tests.helpers.training_cases import toy_config

pytestmark = pytest.mark.slow

SCHEMA = """
name: shop
label: {column: stars, positive: "> 3", negative: "< 3"}
numeric: [{name: price, transform: standard_log}, {name: age, transform: min_max}]
categorical: [user, shop, {name: tags, separator: "|"}, day]
group: user
min_count: 2
"""
HEADER = "stars,user,shop,price,age,tags,day\n"


def rows_of(count: int, seed: int, *, threes: bool = False, new: int = 0) -> list[list[str]]:
    """Fields of raw rows; `threes` adds ratings that the label rule leaves out."""
    rng = np.random.default_rng(seed)
    stars = [1, 2, 4, 5, *([3] if threes else [])]
    return [
        [
            str(rng.choice(stars)),
            f"u{rng.integers(9 + new)}" if rng.random() < 0.9 else "",
            f"s{rng.integers(30 + new)}",
            f"{rng.random() * 90:.3f}",
            "" if rng.random() < 0.3 else str(rng.integers(80)),
            "|".join(f"t{j}" for j in range(rng.integers(4))),
            str(rng.integers(7)),
        ]
        for _ in range(count)
    ]


def write(path: Path, rows: list[list[str]], drop: int = 0) -> Path:
    """A CSV; `drop` leaves out the first columns."""
    header = ",".join(HEADER.strip().split(",")[drop:]) + "\n"
    path.write_text(header + "".join(",".join(row[drop:]) + "\n" for row in rows))
    return path


def run_command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def score(*words, fails: str | None = None) -> dict:
    result = run_command("score", *words)
    if fails is not None:
        assert result.exit_code == 1, result.output
        assert fails in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr
        return {}
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A prepared table, a run on it (bags, numbers, first-order weights) and its artefacts."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "schema.yaml").write_text(SCHEMA)
    files = {"train": rows_of(300, 1), "valid": rows_of(60, 2), "test": rows_of(101, 3, new=4)}
    options = []
    for split, rows in files.items():
        options += [f"--{split}", write(folder / f"{split}.csv", rows)]
    data = folder / "data"
    made = run_command("prepare", "table", data, "--schema", folder / "schema.yaml", *options)
    assert made.exit_code == 0, made.output
    config = toy_config(
        data,
        "tables.method={name: low_dim, width: 5, kept: {shop: 12, tags: 3}}",
        "model.batch_norm=true",
    )
    train(config, runs=folder, quiet=True)
    for words in (["artefact"], ["rewritten", "--rewrite-vocabulary"], ["int8", "--dtype", "int8"]):
        made = run_command("export", folder / "toy", folder / words[0], *words[1:])
        assert made.exit_code == 0, made.output
    return folder


def test_scores_are_those_of_prepare_and_evaluate_to_the_bit(home, tmp_path):
    found = score(
        home / "artefact", home / "test.csv", tmp_path / "out.parquet", "--batch-size", 32
    )
    evaluated = json.loads(run_command("evaluate", home / "toy").stdout)
    for name, value in found["metrics"].items():
        assert evaluated[name] == value, name
    for name in ("unseen_rate", "unseen_rate_by_feature"):
        assert evaluated[name] == found[name]
    assert found["unseen_rate"] > 0 and evaluated["gauc"] is not None
    info, model = DatasetInfo.load(home / "data"), load(home / "artefact")
    batches = ParquetLoader(info, "test", batch_size=32, drop_last=False)
    logits = torch.cat([model(b.dense, b.sparse) for b in batches])
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema == {
        "row": pl.Int64,
        "probability": pl.Float32,
        "logit": pl.Float32,
        "label": pl.Float32,
    }
    assert frame["row"].to_list() == list(range(101))
    assert np.array_equal(frame["logit"].to_numpy(), logits.numpy())
    assert np.array_equal(frame["probability"].to_numpy(), logits.sigmoid().numpy())
    assert frame["label"].sum() == info.splits["test"].positives


def test_unlabelled_rows_have_the_same_scores_and_no_label(home, tmp_path):
    bare = write(tmp_path / "bare.csv", rows_of(101, 3, new=4), drop=1)
    for raw, out in ((home / "test.csv", "a.parquet"), (bare, "b.parquet")):
        found = score(home / "artefact", raw, tmp_path / out)
    assert (found["labelled"], found["metrics"]) == (0, None)
    with_labels, without = (pl.read_parquet(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert without.equals(with_labels.drop("label"))


def test_several_files_are_one_input_whatever_the_batch_size(home, tmp_path):
    rows = rows_of(90, 5)
    files = [write(tmp_path / f"{at}.csv", rows[at : at + 30]) for at in (0, 30, 60)]
    whole = write(tmp_path / "whole.csv", rows)
    score(home / "int8", *files, tmp_path / "a.parquet", "--batch-size", 7, "--threads", 1)
    score(home / "int8", whole, tmp_path / "b.parquet", "--rows", 75)
    a, b = (pl.read_parquet(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert (a.height, b.height) == (90, 75)
    for name in a.columns:
        np.testing.assert_allclose(a[name].head(75), b[name], rtol=1e-5, atol=1e-6)


def test_rows_that_the_label_rule_leaves_out_are_scored_and_not_evaluated(home, tmp_path):
    rows = rows_of(80, 6, threes=True)
    found = score(home / "artefact", write(tmp_path / "r.csv", rows), tmp_path / "o.parquet")
    counted = sum(row[0] != "3" for row in rows)
    assert found["labelled"] == found["metrics"]["rows"] == counted < found["rows"] == 80
    frame = pl.read_parquet(tmp_path / "o.parquet")
    assert frame["probability"].null_count() == 0
    assert frame["label"].is_null().to_list() == [row[0] == "3" for row in rows]


def test_malformed_rows_have_no_score_and_are_counted(home, tmp_path):
    rows = rows_of(40, 7)
    for at in (0, 17, 39):
        rows[at][3] = "cheap"
    raw, out = write(tmp_path / "r.csv", rows), tmp_path / "o.parquet"
    score(home / "artefact", raw, out, fails="of 40 rows are malformed, more than the share of")
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"], "nothing is left"
    result = run_command("score", home / "artefact", raw, out, "--max-bad-rows", "0.1")
    assert result.exit_code == 0, result.output
    assert "3 malformed rows have no score" in result.stderr
    assert "r.csv, line 2: price is 'cheap'" in result.stderr
    found, frame = json.loads(result.stdout), pl.read_parquet(out)
    assert (found["rows"], found["malformed"], found["labelled"]) == (40, 3, 37)
    for name in ("probability", "logit", "label"):
        assert frame.filter(frame[name].is_null())["row"].to_list() == [0, 17, 39]
    clean = score(home / "artefact", write(tmp_path / "c.csv", rows_of(40, 7)), out, "--overwrite")
    assert clean["malformed"] == 0


def test_a_rewritten_vocabulary_encodes_what_it_dropped_as_unseen(home, tmp_path):
    dropped = {
        name: {
            value
            for value in pl.read_parquet(home / "data" / old.vocabulary)["value"]
            if value not in set(pl.read_parquet(home / "rewritten" / new.vocabulary)["value"])
        }
        for name, old, new in zip(
            ("user", "shop", "tags"),
            DatasetInfo.load(home / "data").categorical,
            DatasetInfo.load(home / "rewritten").categorical,
        )
    }
    assert dropped["shop"] and not dropped["user"]
    rows = rows_of(200, 8)
    raw = write(tmp_path / "r.csv", rows)
    (batch,) = encoder(home / "rewritten").batches(raw)
    ids = batch.sparse["shop"].values().tolist()
    assert all(i == 1 for i, row in zip(ids, rows) if row[2] in dropped["shop"])
    for name in ("artefact", "rewritten"):
        score(home / name, raw, tmp_path / f"{name}.parquet")
    old, new = (pl.read_parquet(tmp_path / f"{n}.parquet") for n in ("artefact", "rewritten"))
    same = [
        row[2] not in dropped["shop"] and not dropped["tags"] & set(row[5].split("|"))
        for row in rows
    ]
    assert 20 < sum(same) < 200
    np.testing.assert_allclose(old["logit"].filter(same), new["logit"].filter(same), atol=1e-5)


def test_existing_files_are_kept_and_only_scores_are_replaced(home, tmp_path):
    raw, out = home / "test.csv", tmp_path / "out.parquet"
    score(home / "artefact", raw, out)
    before = out.read_bytes()
    score(home / "int8", raw, out, fails="exists and is left as it is; --overwrite")
    assert out.read_bytes() == before
    score(home / "int8", raw, out, "--overwrite")
    assert out.read_bytes() != before
    about = json.loads(pq.read_schema(out).metadata[b"embcomp.scores"])
    digest = json.loads((home / "int8/config.json").read_text())["digest"]
    assert about["artefact"] == digest and about["dataset"] == "data"
    precious = tmp_path / "mine.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(precious)
    kept = precious.read_bytes()
    score(home / "artefact", raw, precious, "--overwrite", fails="is no file of scores")
    score(home / "artefact", precious, precious, "--overwrite", fails="is one of the raw files")
    score(home / "artefact", tmp_path, tmp_path / "new.parquet", fails="lies in their folder")
    assert precious.read_bytes() == kept
    score(home / "artefact", raw, raw, fails="the last argument is the file of scores to make")
    score(home / "artefact", out, fails="give the raw files before the file of scores")
    (tmp_path / "f.parquet").mkdir()
    score(home / "artefact", raw, tmp_path / "f.parquet", fails="is a folder")
    link = tmp_path / "link.parquet"
    link.symlink_to(tmp_path / "deep" / "real.parquet")
    score(home / "artefact", raw, link)
    assert link.is_symlink() and (tmp_path / "deep/real.parquet").is_file()


def test_a_stopped_command_leaves_nothing_that_the_next_one_does_not_remove(home, tmp_path):
    raw = write(tmp_path / "r.csv", rows_of(3000, 9))
    command = [sys.executable, "-m", "embcomp.cli", "score", str(home / "artefact"), str(raw)]
    out = tmp_path / "o.parquet"
    child = subprocess.Popen([*command, str(out), "--batch-size", "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".o.parquet.*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert not out.exists() and list(tmp_path.glob(".o.parquet.*"))
    score(home / "artefact", raw, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.parquet", "r.csv"]


def test_what_cannot_score_rows_is_refused_with_the_way_out(home, tmp_path):
    raw, out = home / "test.csv", tmp_path / "o.parquet"
    config = EmbeddingBagConfig(name="u", num_embeddings=9, embedding_dim=4, feature_names=["u"])
    save(CompressedEmbeddingBagCollection([config], Full()), tmp_path / "tables")
    score(tmp_path / "tables", raw, out, fails="holds tables alone, which score no rows: put")
    result = CliRunner().invoke(app, ["score", str(tmp_path / "nowhere"), str(raw), str(out)])
    assert result.exit_code == 1 and "does not exist" in result.stderr
    score(home / "artefact", tmp_path / "absent.csv", out, fails="absent.csv does not exist")
    score(
        home / "artefact", raw, out, "--format", "criteo", fails="gives no numeric feature 'price'"
    )
    score(home / "artefact", raw, out, "--schema", raw, fails="schema")
    shutil.copytree(home / "artefact", tmp_path / "damaged")
    vocabulary = next((tmp_path / "damaged/vocabulary").iterdir())
    content = bytearray(vocabulary.read_bytes())
    content[len(content) // 2] ^= 1
    vocabulary.write_bytes(bytes(content))
    score(tmp_path / "damaged", raw, out, fails=f"{vocabulary.name} is damaged or was changed")
    assert not out.exists()


def test_a_dataset_without_raw_rows_needs_vocabularies_and_a_format(tmp_path):
    write_toy_dataset(tmp_path / "data", rows=(120, 40, 40))
    train(toy_config(tmp_path / "data"), runs=tmp_path, quiet=True)
    made = run_command("export", tmp_path / "toy", tmp_path / "a")
    assert made.exit_code == 0, made.output
    raw = tmp_path / "raw.csv"
    info = DatasetInfo.load(tmp_path / "a")
    raw.write_text(",".join(info.feature_names) + "\n" + ",".join("1" for _ in info.feature_names))
    out = tmp_path / "o.parquet"
    score(tmp_path / "a", raw, out, fails="does not say how raw rows are written")
    schema = tmp_path / "schema.yaml"
    numeric, categorical = info.numeric_names, info.categorical_names
    schema.write_text(
        json.dumps({"name": "t", "label": "y", "numeric": numeric} | {"categorical": categorical})
    )
    assert score(tmp_path / "a", raw, out, "--schema", schema)["rows"] == 1


def test_memory_does_not_grow_with_the_rows(home, tmp_path, monkeypatch):
    """What is held at a time is a few blocks, however many there are."""
    from embcomp.data_pipelines.preparing import row_encoder

    monkeypatch.setattr("embcomp.data_pipelines.importers.text.BLOCK_BYTES", 4096)
    raw = write(tmp_path / "r.csv", rows_of(3000, 10))
    held, most, blocks = set(), [0], []
    encode = row_encoder.RowEncoder.encode

    class Counted:
        def __init__(self):
            held.add(id(self))
            most[0] = max(most[0], len(held))

        def __del__(self):
            held.discard(id(self))

    def counted(self, frame, features):
        columns = encode(self, frame, features)
        object.__setattr__(columns, "counted", Counted())
        blocks.append(len(columns.labels))
        return columns

    monkeypatch.setattr(row_encoder.RowEncoder, "encode", counted)
    found = score_rows(home / "artefact", raw, tmp_path / "o.parquet", batch_size=64)
    assert found.rows == 3000 and found.labelled is None
    assert len(blocks) > 12 and 1 <= most[0] <= 6
