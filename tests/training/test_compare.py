"""Comparing finished runs: the table, the page and the picture."""

from __future__ import annotations

import re
import struct

import pytest

from embcomp.errors import EmbcompError
from embcomp.training import Report, compare


def report(name: str, method: str, serve_bytes: int, auc: float | None) -> Report:
    metrics = {"auc": auc, "log_loss": 0.45}
    return Report(
        name=name,
        dataset="clicks",
        method=method,
        model="autoint",
        seed=1,
        world_size=1,
        device="cpu",
        steps=10,
        epochs=1,
        best_step=10,
        stopped="10 steps done",
        valid=metrics,
        test=metrics,
        serve_bytes=serve_bytes,
        full_bytes=64_000_000,
        compression=64_000_000 / serve_bytes,
        first_order_bytes=0,
        train_bytes=serve_bytes,
        dense_parameters=5,
        samples_per_second=123_456.7,
        train_seconds=1.0,
        wall_seconds=2.0,
        bayes={"auc": 0.82, "log_loss": 0.4},
        stages=[],
    )


@pytest.fixture
def folders(tmp_path):
    runs = [
        report("whole", "full", 64_000_000, 0.8),
        report("<small>", "hash", 6_400_000, 0.78),
        report("odd", "hash", 3_200_000, None),
    ]
    folders = [tmp_path / str(number) for number in range(len(runs))]
    for folder, run in zip(folders, runs):
        folder.mkdir()
        run.save(folder)
    return folders


def test_the_table_lists_the_runs_in_order_with_their_bytes_and_metrics(folders):
    lines = compare(folders).text().splitlines()
    assert re.split(r"  +", lines[0].strip())[:4] == ["run", "model", "method", "serve bytes"]
    assert re.split(r" +", lines[2]) == (
        ["<small>", "autoint", "hash", "6,400,000", "10.0x", "0.780000", "0.450000", "123,457"]
    )
    assert lines[3].split()[5] == "nan"
    assert lines[-1] == "clicks (test split); best possible AUC 0.820000"


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(folders, tmp_path):
    compare(folders).save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "Plotly.newPlot" in page and len(page) > 1_000_000
    assert (
        "<span>&lt;small&gt;</span></td>" in page and "<small>" not in page.split("</script>")[-1]
    )


def test_the_picture_is_a_png_and_the_same_runs_draw_the_same_bytes(folders, tmp_path):
    for name in ("a.png", "b.png"):
        compare(folders).save_png(tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    assert content == (tmp_path / "b.png").read_bytes()


def test_a_folder_without_a_finished_run_is_named(folders, tmp_path):
    with pytest.raises(EmbcompError, match="nowhere does not exist"):
        compare([*folders, tmp_path / "nowhere"])
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(EmbcompError, match="unfinished has no report.json: the run has not"):
        compare([*folders, tmp_path / "unfinished"])
    with pytest.raises(EmbcompError, match="nothing to compare"):
        compare([])
    (folders[0] / "report.json").write_text('{"name": "old"}')
    with pytest.raises(EmbcompError, match="not a report of this version"):
        compare(folders)
