"""`embcomp generate` and `embcomp demo`: from nothing to a table, a page and a picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.cli.demo_steps import METHODS, demo_run
from embcomp.data_pipelines.synthetic import generate as synthetic
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.planning.config_plan import plan_config, sizes_of_dataset

pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generated_logs_have_criteos_format_and_a_known_best_auc(tmp_path):
    result = run("generate", tmp_path / "raw.txt", "--rows", "500")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "raw.txt").read_text().splitlines()
    assert len(lines) == 500
    assert {line.count("\t") for line in lines} == {39}
    assert "best possible on the test split: auc 0." in result.output
    prepared = run("prepare", "criteo", tmp_path / "raw.txt", tmp_path / "data", "--min-count", "2")
    assert prepared.exit_code == 0, prepared.output
    assert '"bayes"' in (tmp_path / "data" / "dataset.json").read_text()


def test_generate_writes_by_default_what_the_library_does(tmp_path):
    assert run("generate", tmp_path / "cli.txt", "--rows", "200").exit_code == 0
    write_criteo_log(tmp_path / "lib.txt", SyntheticConfig(rows=200))
    assert (tmp_path / "cli.txt").read_bytes() == (tmp_path / "lib.txt").read_bytes()
    shown = run("generate", "--help").stdout
    assert f"{SyntheticConfig().rows}" in shown


def test_generate_says_that_the_disk_is_full_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device (os error 28)")  # as polars raises it

    monkeypatch.setattr(synthetic, "to_lines", full)
    result = run("generate", tmp_path / "raw.txt", "--rows", "200")
    assert result.exit_code == 1
    assert f"the disk of {tmp_path} is full" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "file/raw.txt", "--rows", "10"],
        ["prepare", "criteo", "file", "file/data"],
        ["cp", "criteo_autoint_hash", "file/mine.yaml"],
    ],
)
def test_a_file_where_a_folder_should_be_is_one_message(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run("generate", "file", "--rows", "10").exit_code == 0
    before = (tmp_path / "file").read_bytes()
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("error:") == 1 and "file" in result.stderr
    assert (tmp_path / "file").read_bytes() == before


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert run("generate", tmp_path / name, "--rows", "200", "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "rows must be in"),
        (["--drift", "2"], "drift must be in"),
        (["--split", "alphabetical"], "split 'alphabetical' is not a rule"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, arguments, message):
    result = run("generate", tmp_path / "raw.txt", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "raw.txt").exists()


def test_generate_does_not_overwrite(tmp_path):
    (tmp_path / "raw.txt").write_text("precious")
    result = run("generate", tmp_path / "raw.txt")
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert (tmp_path / "raw.txt").read_text() == "precious"


def test_runs_of_the_demo_differ_in_their_tables_alone(tmp_path):
    write_toy_dataset(tmp_path / "toy", rows=(2048, 64, 64), num_values=(2000, 500, 50))
    runs = [demo_run(name, tmp_path / "toy", 1).model_dump() for name in METHODS]
    tables = [(run.pop("name"), run.pop("tables")) for run in runs]
    assert runs[0] == runs[1] == runs[2]
    assert [table["method"]["name"] for _, table in tables] == ["full", "hash", "unified"]
    for name in ("hash", "unified"):
        plan = plan_config(demo_run(name, tmp_path / "toy", 1), sizes_of_dataset(tmp_path / "toy"))
        assert (
            10
            <= sum(line.full for line in plan.lines()) / sum(line.serve for line in plan.lines())
            < 11
        )


@pytest.mark.slow
def test_demo_leaves_a_table_a_page_and_a_picture(tmp_path, monkeypatch):
    out = tmp_path / "out"
    # A short log has few values that are not rare, all in tables that hashing would leave full.
    monkeypatch.setitem(
        METHODS, "hash", {"method": {"name": "hash", "collisionless": 5}, "budget": "10%"}
    )
    result = run("demo", "--rows", "3000", "--out", out)
    assert result.exit_code == 0, result.output
    names = re.findall(r"^ (\w+) +autoint +(\w+) +([\d,]+)", result.stdout, re.MULTILINE)
    assert [(name, method) for name, method, _ in names] == [(m, m) for m in METHODS]
    sizes = [int(size.replace(",", "")) for _, _, size in names]
    assert max(sizes[1:]) <= sizes[0] // 10
    assert "best possible AUC 0." in result.stdout
    page = (out / "report.html").read_text()
    assert "unified" in page and not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert (out / "auc_against_bytes.png").read_bytes().startswith(b"\x89PNG")

    # Everything that is there is taken as it is.
    again = run("demo", "--rows", "3000", "--out", out)
    assert again.stdout == result.stdout
    assert "preparing" not in again.stderr


def test_a_log_that_is_too_small_for_the_budget_is_told_before_training(tmp_path):
    result = run("demo", "--rows", "1000", "--out", tmp_path)
    assert result.exit_code == 1
    assert "the smallest hash reaches" in result.stderr
    assert "training" not in result.stderr


def test_missing_log_is_named(tmp_path):
    result = run("demo", "--data", tmp_path / "none.txt", "--out", tmp_path)
    assert result.exit_code == 1
    assert "none.txt does not exist" in result.stderr


def test_another_log_does_not_reuse_a_dataset(tmp_path):
    for name, rows in (("a.txt", "1000"), ("b.txt", "1100")):
        assert run("generate", tmp_path / name, "--rows", rows).exit_code == 0
    run("demo", "--data", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert Path(tmp_path / "out" / "real" / "dataset").is_dir()
    result = run("demo", "--data", tmp_path / "b.txt", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "prepared from other files" in result.stderr
