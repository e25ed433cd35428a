"""Every page in a real browser: nothing fails, nothing is asked for, nothing is cut off, tables sort."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from embcomp.benchmark.benchmark_page import FIGURES, write_benchmark_page
from embcomp.benchmark.benchmark_result import BenchmarkResult, CellResult, GroupResult, Spread
from embcomp.benchmark.significance import PairedDifference
from embcomp.io.html import escaped, table, tone, write_page
from embcomp.search.reporting.correlation import RankCorrelation, RankedCandidate
from embcomp.search.reporting.page import write_search_page
from embcomp.search.reporting.results import (
    CandidateResult,
    FinalRunResult,
    PointResult,
    SearchCost,
    SearchResult,
)
from embcomp.training.reporting.compared_run import ComparedRun
from embcomp.training.reporting.comparison import Comparison
from tests.helpers.browser import look_at

pytestmark = pytest.mark.slow
WIDTHS = (400, 1400)
METHODS: tuple[str, ...] = ("full", "hash", "double_hash", "qr", "unified", "unified, 4 chunks")
METHODS += (
    "low_dim",
    "mde",
    "mlet",
    "tt",
    "pq",
    "lr2vq",
    "optembed, widths alone",
    "dnis",
    "matryoshka",
)


def comparison() -> Comparison:
    """Many runs with long names on data whose best AUC is known."""
    return Comparison(
        [
            ComparedRun(
                name=f"criteo_autoint_{method.replace(' ', '_')}_with_a_name_that_is_long",
                dataset="criteo & <friends>",
                model="autoint",
                method=method,
                split="test",
                serve_bytes=10_000_000 >> place % 9,
                compression=2.0 ** (place % 9),
                auc=0.80 - 0.001 * place,
                log_loss=0.45 + 0.001 * place,
                samples_per_second=10_000.0 + place,
                bayes_auc=0.8135,
            )
            for place, method in enumerate(METHODS)
        ]
    )


def search_result() -> SearchResult:
    """Many tables, most of them at the least share, and a supernet that was checked."""
    units = [f"feature_{n}" for n in range(30)]
    point = {unit: 0.001 if n < 25 else 0.5 for n, unit in enumerate(units)}
    return SearchResult(
        name="internal_name",
        recipe="configs/criteo_autoint_full.yaml",
        model="autoint",
        dataset="Criteo Kaggle",
        sampler="tpe",
        objectives=["auc"],
        budget=1_000_000,
        full_bytes=10_000_000,
        fidelity="100 of 1,000 training steps",
        space_size=10**15,
        reachable=[1000, 10_000_000],
        rows=dict.fromkeys(units, 12_345_678),
        notes=["feature_1: hash ratio=0.9 is not smaller than the full table"] * 2,
        candidates=[
            CandidateResult(
                number=n,
                kind="tpe",
                state="complete" if n else "out of memory",
                values={"auc": 0.7 + 0.001 * n} if n else {},
                serve_bytes=900_000 + 5_000 * n,
                train_bytes=2_000_000,
                options=dict.fromkeys(units, "low_dim width=4"),
                seconds=12.0 + n,
                steps=100,
            )
            for n in range(12)
        ],
        front=[5, 11],
        points=[
            PointResult(
                name=f"internal_name_{n}",
                number=n,
                kind="tpe",
                baseline=n == 3,
                recipe=f"points/internal_name_{n}.yaml",
                quality=0.71,
                serve_bytes=1_000_000 - n,
                options=dict.fromkeys(units, "hash num_buckets=123456, collisionless=100"),
                share=point,
                bytes_per_rank=None,
                runs=[
                    FinalRunResult(
                        seed=s, valid={"auc": 0.7}, test={"auc": 0.7 + 0.01 * s}, seconds=9, steps=9
                    )
                    for s in range(2)
                ],
            )
            for n in range(1, 4)
        ],
        importance={unit: 0.5 / (n + 1) for n, unit in enumerate(units)},
        cost=SearchCost(trainings=12, full_trainings=1.2, hours=3.0, finals=6, finals_hours=2.0),
        evaluator="supernet",
        correlation=RankCorrelation(
            spearman=0.9,
            candidates=[
                RankedCandidate(
                    number=n,
                    kind="random",
                    serve_bytes=1000,
                    score=0.7 + 0.01 * n,
                    retrained=0.71 + 0.01 * n,
                    seed=1,
                    seconds=1,
                    steps=1,
                )
                for n in range(8)
            ],
            trainings=8,
            full_trainings=8.0,
            hours=1.0,
        ),
    )


def cell(method: str, place: int, budget: str | None) -> CellResult:
    """A line with everything known, but for the last method's memory and codes."""
    share = 1.0 if budget is None else float(budget.rstrip("%")) / 100
    last = method == METHODS[-1]
    better = PairedDifference(difference=0.0123, low=0.001, high=0.02, p=0.001, seeds=5)
    return CellResult(
        method=method,
        budget=budget,
        seeds=5,
        failures=[],
        auc=Spread(mean=0.77 - 0.001 * place, deviation=0.002),
        log_loss=Spread(mean=0.46 + 0.001 * place, deviation=0.001),
        tables=123_456_789 * share,
        beside_rows=None if last else 12_345_678,
        first_order=7_890_123,
        dense=1_234_567,
        share_cut=share,
        share_uncut=share / 14.7,
        row_learning_rate=0.01234,
        dense_learning_rate=0.001234,
        settings={"num_chunks": 4, "collisionless": 100} if place else {},
        trials=8,
        training_seconds=1234.5 + place,
        memory=None if last else 2.0**30,
        look_up_microseconds=2345.0 + place,
        against={} if budget is None else {"full": better, "hash": better},
    )


def benchmark_result() -> BenchmarkResult:
    """Fifteen methods at three budgets, on two datasets of which one is small."""
    few = [cell("full", 0, None), cell("hash", 1, "10%")]
    many = [cell("full", 0, None)]
    for budget in ("50%", "1%"):
        many += [cell(method, place, budget) for place, method in enumerate(METHODS[1:], 1)]
    groups = [
        GroupResult(
            dataset=dataset,
            digest=f"{number}" * 16,
            model="deepfm",
            recipe="configs/criteo_deepfm_full.yaml",
            positives=260,
            negatives=7740,
            full_cut=123_456_789,
            full_uncut=1_814_814_798,
            standard_error=0.019,
            is_swallowed=bool(number),
            cells=few if number else many,
        )
        for number, dataset in enumerate(["Criteo Kaggle", "Criteo 1TB"])
    ]
    notes = ["tt at 1%: the budget is below the floor of 12,345 bytes"]
    return BenchmarkResult(
        name="internal_name",
        quality="auc",
        trials=8,
        seeds=5,
        groups=groups,
        notes=notes,
        hours=123.0,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in ("report", "search", "benchmark")}
    comparison().save_html(paths["report"])
    write_search_page(search_result(), paths["search"])
    write_benchmark_page(benchmark_result(), paths["benchmark"])
    return paths


@pytest.fixture(scope="module")
def seen(pages, tmp_path_factory):
    found = look_at(pages, WIDTHS, tmp_path_factory.mktemp("browser"))
    assert len(found) == len(pages) * len(WIDTHS)
    return found


def test_no_page_fails_or_asks_for_anything(seen):
    assert {key: each["errors"] for key, each in seen.items() if each["errors"]} == {}


def test_every_figure_is_drawn_whole(seen):
    counts = {"report": 1, "search": 2, "benchmark": 2 * len(FIGURES)}
    for (name, width), each in seen.items():
        assert len(each["figures"]) == counts[name], (name, width)
        for figure in each["figures"]:
            assert figure["drawn"] and figure["marks"] and figure["texts"] > 4, (name, figure)
            assert figure["outside"] == [], (name, width, figure)


def test_nothing_is_cut_off(seen):
    assert {key: each["cut"] for key, each in seen.items() if each["cut"]} == {}


def test_every_table_sorts_by_every_heading(seen):
    for key, each in seen.items():
        assert each["tables"], key
        for table_ in each["tables"]:
            assert table_["rows"] and table_["unsorted"] == [], (key, table_)


def test_titles_name_data_and_recipes(seen):
    said = {
        "report": ("criteo & <friends>", "autoint"),
        "search": ("Criteo Kaggle", "criteo_autoint_full"),
        "benchmark": ("Criteo Kaggle", "Criteo 1TB", "criteo_deepfm_full"),
    }
    for (name, _), each in seen.items():
        assert all(text in each["title"] for text in said[name]), each["title"]
        assert "internal_name" not in each["title"]


def test_the_lightest_tone_is_no_values(pages):
    lightest = tone(-1.0)[0]
    assert lightest == tone(0.0)[0] != "#deebf7"  # the scale's own lightest is left for nothing
    shown = re.findall(r'class="tone" style="background:(#\w+)', pages["search"].read_text())
    assert len(set(shown)) == 2 and max(shown, key=shown.count) == tone(0.0)[0]


def test_numbers_sort_by_size_and_what_is_missing_comes_last(tmp_path):
    """The first click sorts upwards, the second downwards: the browser leaves the last column's order."""
    cells = ["1,000", "9 B", "2.0 KiB", "", "-5", "1.5 MiB", "-0.25 ± 0.1", "3e-3"]
    page = tmp_path / "numbers.html"
    write_page(page, "numbers", [table(["value"], [[escaped(each)] for each in cells])])
    found = look_at({"numbers": page}, (800,), tmp_path)[("numbers", 800)]
    down = ["1.5 MiB", "2.0 KiB", "1,000", "9 B", "3e-3", "-0.25 ± 0.1", "-5", ""]
    assert found["tables"][0]["first"] == down, json.dumps(found["tables"])
