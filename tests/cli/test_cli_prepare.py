"""`embcomp prepare` and `embcomp validate`: good data in, named errors out, nothing lost."""

from __future__ import annotations

import gzip

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def criteo_line(index: int) -> str:
    numbers = "\t".join(str((index * k) % 17) for k in range(1, 14))
    categories = "\t".join(f"{(index * k) % 11:08x}" for k in range(1, 27))
    return f"{index % 3 == 0:d}\t{numbers}\t{categories}\n"


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("".join(criteo_line(index) for index in range(300)))
    return path


def test_raw_logs_become_a_sound_dataset(raw, tmp_path):
    result = run("prepare", "criteo", raw, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "13 numeric and 26 categorical features" in result.output
    checked = run("validate", tmp_path / "out")
    assert checked.exit_code == 0, checked.output
    assert "a sound dataset of 300 rows" in checked.output


def test_options_reach_the_dataset(raw, tmp_path):
    result = run(
        *("prepare", "criteo", raw, tmp_path / "out", "--name", "clicks", "--group", "C3"),
        *("--split", "chronological", "--shares", "0.5,0.25,0.25", "--min-count", "2"),
        *("--numeric", "I1=bucket", "--numeric", "I2=min_max"),
    )
    assert result.exit_code == 0, result.output
    info = DatasetInfo.load(tmp_path / "out")
    assert (info.name, info.group) == ("clicks", "C3")
    assert {name: split.rows for name, split in info.splits.items()} == {
        "train": 150,
        "valid": 75,
        "test": 75,
    }
    assert info.split_rule["kind"] == "chronological"
    assert "I1" in [feature.name for feature in info.categorical]
    assert {feature.min_count for feature in info.categorical} == {2}
    transforms = {feature.name: feature.transform for feature in info.numeric}
    assert transforms["I2"] == "min_max"


def test_numbers_that_a_transform_cannot_represent_are_said_with_the_way_out(raw, tmp_path):
    lines = raw.read_text().splitlines(keepends=True)
    raw.write_text("".join(line.replace("\t", "\t-", 1) for line in lines))
    result = run("prepare", "criteo", raw, tmp_path / "out")
    assert result.exit_code == 0, result.output
    clipped = DatasetInfo.load(tmp_path / "out").numeric[0].clipped
    assert f"I1: {clipped} of 300 values are negative" in " ".join(result.stderr.split())
    assert "--numeric I1=none" in " ".join(result.stderr.split())
    kept = run("prepare", "criteo", raw, tmp_path / "kept", "--numeric", "I1=none")
    assert "negative" not in kept.stderr
    assert f"numeric, log1p ({clipped} clipped)" in run("cat", tmp_path / "out").output


def test_given_files_are_the_splits(raw, tmp_path):
    result = run("prepare", "criteo", "--train", raw, "--test", _copy(raw), tmp_path / "out")
    assert result.exit_code == 0, result.output
    info = DatasetInfo.load(tmp_path / "out")
    assert info.splits["train"].rows == info.splits["test"].rows == 300


def _copy(path):
    copy = path.with_name("test.txt")
    copy.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["criteoo"], "did you mean 'criteo'"),
        (["criteo", "--group", "C99"], "group 'C99'"),
        (["criteo", "--min-count", "many"], "--min-count: expected a number, got many"),
        (["criteo", "--min-count", "2", "--min-count", "3"], "FEATURE=VALUE once for each"),
        (["criteo", "--min-count", "C1=0"], "min_count of C1 is 0"),
        (["criteo", "--numeric", "sqrt"], "transform 'sqrt'"),
        (["criteo", "--split", "random", "--shares", "0.5,0.5"], "expected three numbers"),
        (["criteo", "--split", "random", "--shares", "0.5,0.4,0.4"], "must sum to 1"),
        (["criteo", "--shares", "0.8,0.1,0.1"], "need --split random"),
        (["criteo", "--split-seed", "3"], "need --split random"),
        (["criteo", "--max-memory", "1MiB"], "max_memory"),
        (["table"], "needs a schema"),
        (["libfm", "--schema", "x.yaml"], "only `table` takes a schema"),
    ],
)
def test_bad_choices_are_named_and_nothing_is_made(raw, tmp_path, arguments, message):
    out = tmp_path / "out"
    result = run("prepare", arguments[0], raw, out, *arguments[1:])
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not out.exists()


def test_raw_files_are_given_one_way_only(raw, tmp_path):
    both = run("prepare", "criteo", raw, tmp_path / "out", "--train", raw)
    neither = run("prepare", "criteo", tmp_path / "out")
    for result in (both, neither):
        assert result.exit_code == 1
        assert "give the raw files before the output folder, or by --train" in result.stderr


def _bad_columns(path):
    path.write_text(criteo_line(1) * 5 + "1\t2\t3\n")


def _bad_integer(path):
    path.write_text(criteo_line(1) * 5 + criteo_line(2).replace("\t2\t", "\tzwei\t", 1))


def _empty(path):
    path.write_text("")


def _bad_text(path):
    path.write_bytes(criteo_line(1).encode() * 5 + b"\xff\xfe" + criteo_line(2).encode())


@pytest.mark.parametrize("spoil", [_bad_columns, _bad_integer, _empty, _bad_text])
def test_malformed_logs_are_named_by_file_and_leave_nothing(raw, tmp_path, spoil):
    spoil(raw)
    result = run("prepare", "criteo", raw, tmp_path / "out")
    assert result.exit_code == 1
    assert "train.txt" in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_truncated_gz_is_named(raw, tmp_path):
    packed = tmp_path / "train.txt.gz"
    packed.write_bytes(gzip.compress(raw.read_bytes())[:-200])
    result = run("prepare", "criteo", packed, tmp_path / "out")
    assert result.exit_code == 1
    assert "train.txt.gz" in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_raw_file_is_named(tmp_path):
    result = run("prepare", "criteo", tmp_path / "none.txt", tmp_path / "out")
    assert result.exit_code == 1
    assert "none.txt" in result.stderr


def test_existing_dataset_is_replaced_only_when_asked(raw, tmp_path):
    assert run("prepare", "criteo", raw, tmp_path / "out").exit_code == 0
    again = run("prepare", "criteo", raw, tmp_path / "out")
    assert again.exit_code == 1
    assert "overwrite" in again.stderr
    assert run("prepare", "criteo", raw, tmp_path / "out", "--overwrite").exit_code == 0


def test_validate_finds_a_broken_dataset(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    next((tmp_path / "toy").rglob("*.parquet")).write_bytes(b"not parquet")
    result = run("validate", tmp_path / "toy")
    assert result.exit_code == 1
    assert ".parquet" in result.stderr


def test_validate_checks_a_recipe_and_its_dataset(tmp_path):
    alone = run("validate", "criteo_autoint_unified")
    assert alone.exit_code == 0, alone.output
    assert "a sound config" in alone.output
    write_toy_dataset(tmp_path / "toy")
    together = run("validate", "criteo_autoint_unified", f"data.path={tmp_path / 'toy'}")
    assert together.exit_code == 0, together.output
    assert "agrees with the dataset" in together.output


def test_validate_names_a_feature_that_the_dataset_lacks(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    override = "tables.overrides={C77: full}"
    data = f"data.path={tmp_path / 'toy'}"
    result = run("validate", "criteo_autoint_unified", data, override)
    assert result.exit_code == 1
    assert "'C77'" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmodle: {name: fm}\n", "did you mean 'model'"),
        ("[1, 2]\n", "expected a mapping at the top"),
        ("name: x\nname: y\n", "appears twice"),
        ("name: {\n", "not valid YAML"),
    ],
)
def test_validate_names_what_is_wrong_with_a_yaml(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    result = run("validate", tmp_path / "config.yaml")
    assert result.exit_code == 1
    assert message in result.stderr
