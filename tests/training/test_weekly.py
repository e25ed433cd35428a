"""`examples/weekly.py`: structure is searched where it is due and frozen between, and nothing is done twice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.errors import ConfigError
from embcomp.training import Report
from tests.helpers.source_tree import ROOT

pytestmark = pytest.mark.slow

ROWS = 500
SETTINGS = (
    "tables={embedding_dim: 8, method: {name: pq, subvector_dim: 4, num_codewords: 8}}",
    "model={name: deepfm, hidden_units: [8]}",
    "data.batch_size=64",
    "train.max_steps=3",
)


@pytest.fixture(scope="module")
def weekly():
    spec = importlib.util.spec_from_file_location("weekly", ROOT / "examples" / "weekly.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["weekly"] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["weekly"]


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[Path]:
    """Three days of a log in which values come and go."""
    folder = tmp_path_factory.mktemp("raw")
    write_criteo_log(folder / "log.txt", SyntheticConfig(rows=3 * ROWS, scale=0.001, renewal=0.5))
    lines = (folder / "log.txt").read_bytes().splitlines(keepends=True)
    for day in range(3):
        own = lines[day * ROWS : (day + 1) * ROWS]
        (folder / f"day{day + 1}.txt").write_bytes(b"".join(own))
    return [folder / f"day{day}.txt" for day in range(1, 4)]


def test_structure_is_searched_when_it_is_due_and_goes_on_between(weekly, days, tmp_path, capsys):
    week = weekly.Week(
        recipe="criteo_autoint_pq", work=tmp_path, every=2, room="100%", settings=SETTINGS
    )
    assert [day for day in range(1, 7) if week.searches(day)] == [1, 3, 5]
    first = week.follow(days[:2])
    assert [_begun_with(report) for report in first] == ["full001", "serve001"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("report.json")}
    assert sorted(path.parent.name for path in kept) == [
        "full001",
        "full002",
        "serve001",
        "serve002",
    ]
    every = week.follow(days)
    assert [_begun_with(report) for report in every] == ["full001", "serve001", "full003"]
    assert every[:2] == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len({report.serve_bytes for report in every}) == 1  # the room held what came
    capsys.readouterr()


def _begun_with(report: Report) -> str:
    """The run whose rows the last stage began with; it alone was trained."""
    *earlier, last = report.stages
    assert {stage["steps"] for stage in earlier} == {0} and last["steps"] == 3
    (taken,) = {stage["stopped"] for stage in earlier}
    return taken.rpartition("/")[2]


def test_a_day_may_be_searched_besides(weekly, tmp_path):
    week = weekly.Week(recipe="criteo_autoint_pq", work=tmp_path, anew=[5])
    assert [day for day in range(1, 10) if week.searches(day)] == [1, 5, 8]


def test_wrong_days_are_one_line(weekly, tmp_path, capsys):
    with pytest.raises(ConfigError, match="every is 0; expected 1 day or more"):
        weekly.Week(recipe="criteo_autoint_pq", work=tmp_path, every=0)
    with pytest.raises(ConfigError, match="criteo_autoint_hash: hash is trained in one stage"):
        weekly.Week(recipe="criteo_autoint_hash", work=tmp_path)
    with pytest.raises(ConfigError, match="name the raw file of one day or more"):
        weekly.Week(recipe="criteo_autoint_pq", work=tmp_path).follow([])
    assert weekly.main([str(tmp_path / "nothing.txt"), "--work", str(tmp_path / "week")]) == 1
    said = capsys.readouterr().err
    assert "nothing.txt" in said and "Traceback" not in said
    assert weekly.main([str(tmp_path), "--recipe", "criteo_autoint_qp", "--work", "x"]) == 1
    assert "did you mean" in capsys.readouterr().err
