"""Runs on rows that have weights: every stage of every method, any number of ranks, what is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines.integrity import record_of
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN, sum_of
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError, DataError
from embcomp.io.reproducible_sums import to_digits
from embcomp.search.config.search_config import parse_search
from embcomp.search.prepared import directions_of, prepare_search
from embcomp.training import Report, compare, evaluate, load_model, train
from embcomp.training.build import TrainTask
from embcomp.training.distributed.process import process_group
from embcomp.training.reporting.evaluation import evaluate_batches
from tests.helpers.long import long_but
from tests.helpers.training_cases import (
    toy_config,
    train_and_load,
    train_on_ranks,
    train_with_plain_torch,
    write_dataset,
)
from tests.training.test_stages import staged_config
from tests.training.test_training_equals_torch import DENSE, ROWWISE, assert_equal
from tests.training.test_training_parts import train_pipelined

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]

WEIGHTS = (0.0, 1.0, 1.0, 2.0, 7.0)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The same rows without weights, with ones, with others, and with these times 4."""
    folder = tmp_path_factory.mktemp("datasets")
    factors = {"ones": (1.0,), "others": WEIGHTS, "fourfold": tuple(4 * w for w in WEIGHTS)}
    write_dataset(folder / "none")
    for name, weights in factors.items():
        write_dataset(folder / name, weights)
    return folder


def outcome(runs: Path, name: str) -> tuple[list[dict], dict, dict]:
    """What a run recorded, its report without times, and its weights."""
    records = [json.loads(x) for x in (runs / name / "metrics.jsonl").read_text().splitlines()]
    test = Report.load(runs / name).test
    assert test is not None
    return records, test, load_model(runs / name).state_dict()


def plain(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.startswith("weighted_")}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        map(torch.equal, found.values(), expected.values())
    )


SECOND_ORDER = ("tables.method.second_order=true", "train.row_optimizer={name: sgd, mode: dense}")


@pytest.mark.parametrize("case", long_but(["one stage", "dnis"], ["one stage", "dnis", "lr2vq"]))
def test_ones_are_no_weights_to_the_bit_in_every_stage(datasets, tmp_path, case):
    done = []
    for name in ("none", "ones"):
        more = SECOND_ORDER if case == "dnis" else ()
        config = (
            toy_config(datasets / name, "train.eval_every=5")
            if case == "one stage"
            else staged_config(datasets / name, case, *more)
        )
        train(config, runs=tmp_path / name, quiet=True)
        done.append(outcome(tmp_path / name, config.name))
    (records, test, weights), ones = done
    assert not any(key.startswith("weighted") for record in records for key in record)
    assert [plain(record) for record in ones[0]] == records
    assert plain(ones[1]) == test and equal(ones[2], weights)
    for name, value in ones[1].items():
        if name.startswith("weighted_"):
            assert value == test[name.removeprefix("weighted_")]


@pytest.mark.parametrize("case", long_but(["optembed"], ["dnis", "optembed"]))
def test_a_factor_goes_out_to_the_bit_in_every_stage(datasets, tmp_path, case):
    done = []
    for name in ("others", "fourfold"):
        more = SECOND_ORDER if case == "dnis" else ("train.monitor=weighted_log_loss",)
        config = staged_config(datasets / name, case, *more)
        report = train(config, runs=tmp_path / name, quiet=True)
        done.append(outcome(tmp_path / name, config.name))
        if case == "optembed":  # what was searched went by the weighted metric
            (search,) = [stage["result"] for stage in report.stages if stage["result"]]
            assert -5 < search["score"] < 0
    others, fourfold = done
    assert fourfold[:2] == others[:2] and equal(fourfold[2], others[2])
    assert others[1]["weighted_auc"] != others[1]["auc"]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, ROWWISE), (1, DENSE), (2, ROWWISE), (2, DENSE), (4, ROWWISE)],
    ids=["rowwise", "dense", "rowwise on 2", "dense on 2", "rowwise on 4"],
)
def test_a_step_follows_the_weighted_mean_of_the_global_batch(
    workers, datasets, tmp_path, world_size, overrides
):
    config = toy_config(datasets / "others", overrides)
    expected = train_with_plain_torch(config, world_size=world_size)
    if world_size == 1:
        found = train_and_load(config, tmp_path / "runs")
    else:
        workers.run(world_size, train_on_ranks, config, tmp_path / "runs")
        found = load_model(tmp_path / "runs" / "toy").state_dict()
    assert_equal(found, expected)
    test = Report.load(tmp_path / "runs" / "toy").test
    again = evaluate(tmp_path / "runs" / "toy", quiet=True)
    assert again.weighted is not None
    assert test["weighted_auc"] == pytest.approx(again.weighted.auc, rel=1e-6)
    assert test["weighted_log_loss"] == pytest.approx(again.weighted.log_loss, rel=1e-6)


def test_overlapped_steps_take_the_weights_of_their_own_batch(workers, datasets, tmp_path):
    config = toy_config(datasets / "others", ROWWISE, "train.sharding=table_wise")
    workers.run(2, train_pipelined, config, tmp_path)
    found = load_model(tmp_path / "toy").state_dict()
    assert_equal(found, train_with_plain_torch(config, world_size=2))


def changed(folder: Path, source: Path, rows) -> Path:
    """A dataset whose test rows are others, made of those of another one."""
    info = DatasetInfo.load(source)
    for file in info.files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((source / file).read_bytes())
    (name,) = info.splits["test"].files
    table = rows(pq.read_table(source / name))
    pq.write_table(table, folder / name, write_page_checksum=True)
    split = info.splits["test"]
    split.rows, split.positives = len(table), int(np.asarray(table["label"]).sum())
    split.weight = to_digits(sum_of(np.asarray(table[WEIGHT_COLUMN])))
    info.checksums[name] = record_of(folder / name, split.positives)
    info.save(folder)
    return folder


def without_zeros(table: pa.Table) -> pa.Table:
    return table.filter(pa.array(np.asarray(table[WEIGHT_COLUMN]) > 0))


def repeated(table: pa.Table) -> pa.Table:
    """Each row as often as its weight says, with the weight 1."""
    times = np.asarray(table[WEIGHT_COLUMN]).astype(int)
    more = table.take(pa.array(np.repeat(np.arange(len(table)), times)))
    place = more.schema.get_field_index(WEIGHT_COLUMN)
    return more.set_column(place, WEIGHT_COLUMN, pa.array(np.ones(len(more), np.float32)))


def test_an_evaluation_counts_rows_as_if_left_out_or_repeated(datasets, tmp_path):
    source = datasets / "others"
    train(toy_config(source), runs=tmp_path, quiet=True)
    places = {
        "left": changed(tmp_path / "left", source, without_zeros),
        "more": changed(tmp_path / "more", source, repeated),
        "same": source,
    }
    task = TrainTask(load_model(tmp_path / "toy"))
    with process_group("cpu") as process:
        found = {
            name: evaluate_batches(task, ParquetLoader(place, "test", batch_size=8), process)
            for name, place in places.items()
        }
    weighted = found["same"].weighted
    assert weighted is not None and weighted != found["same"].metrics
    for other in (found["left"].weighted, found["more"].metrics):
        for name in ("auc", "log_loss", "calibration", "label_rate", "gauc"):
            assert getattr(other, name) == pytest.approx(getattr(weighted, name), rel=1e-6)


@pytest.mark.parametrize("monitor", ["auc", "weighted_auc", "weighted_log_loss"])
def test_the_monitor_says_which_metric_chooses(datasets, tmp_path, monitor):
    config = toy_config(datasets / "others", f"train.monitor={monitor}", "train.eval_every=1")
    report = train(config, runs=tmp_path, quiet=True)
    records, _, _ = outcome(tmp_path, "toy")
    valid = [record for record in records if record["kind"] == "valid"]
    sign = -1 if monitor.endswith("log_loss") else 1
    best = max(valid, key=lambda record: sign * record[monitor])
    assert report.valid[monitor] == pytest.approx(best[monitor], abs=1.1e-6)


def test_what_asks_for_weights_that_there_are_none_of_is_refused(datasets, tmp_path):
    config = toy_config(datasets / "none", "train.monitor=weighted_auc")
    with pytest.raises(ConfigError, match=r"weighted_auc needs weights.*--weight, or monitor auc"):
        train(config, runs=tmp_path, quiet=True)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml().replace("weighted_auc", "auc"))
    search = parse_search(
        {
            "name": "s",
            "recipe": str(tmp_path / "recipe.yaml"),
            "budget": "50%",
            "objectives": ["weighted_log_loss"],
            "groups": [{"choices": [{"method": "low_dim", "width": [2, 4]}]}],
        }
    )
    assert directions_of(search) == ["minimize"]
    with pytest.raises(ConfigError, match=r"weighted_log_loss needs.*take log_loss"):
        prepare_search(search)


def test_a_train_split_that_weighs_nothing_is_refused_before_the_first_step(tmp_path):
    config = toy_config(write_dataset(tmp_path / "data", (0.0,)))
    with pytest.raises(DataError, match=r"all rows of the train split .* weight 0") as info:
        train(config, runs=tmp_path / "runs", quiet=True)
    assert "\n" not in str(info.value) and not (tmp_path / "runs").exists()


SCHEMA = "{name: shop, label: y, numeric: [x], categorical: [u], weight: w}"


def run_command(*words) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_from_a_table_to_scores_and_a_comparison(tmp_path):
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "y": rng.integers(0, 2, 400),
            "x": rng.random(400),
            "u": [f"u{n}" for n in rng.integers(0, 9, 400)],
            "w": rng.choice([0.0, 0.5, 3.0], 400),
        }
    )
    frame.write_parquet(tmp_path / "raw.parquet")
    (tmp_path / "x.yaml").write_text(SCHEMA)
    prepared = ("prepare", "table", tmp_path / "raw.parquet", tmp_path / "data")
    run_command(*prepared, "--schema", tmp_path / "x.yaml", "--split", "chronological")
    (tmp_path / "toy.yaml").write_text(toy_config(tmp_path / "data").to_yaml())
    shown = run_command("train", tmp_path / "toy.yaml", "--runs", tmp_path)
    assert shown.count("weighted: auc") == 2
    run_command("export", tmp_path / "toy", tmp_path / "artefact")
    raw = frame[360:].with_columns(
        pl.when(pl.int_range(40) == 7).then(None).otherwise("w").alias("w")
    )
    evaluated = json.loads(run_command("evaluate", tmp_path / "toy"))
    for name, rows in (("test", frame[360:]), ("odd", raw), ("bare", frame[360:].drop("w"))):
        rows.write_parquet(tmp_path / f"{name}.parquet")
        out = tmp_path / "out" / f"{name}.parquet"
        scored = json.loads(
            run_command("score", tmp_path / "artefact", tmp_path / f"{name}.parquet", out)
        )
        columns = pl.read_parquet(out)
        plain_metrics = plain(scored["metrics"])
        assert plain_metrics == {key: evaluated[key] for key in plain_metrics}
        if name == "test":
            assert scored["metrics"] == {key: evaluated[key] for key in scored["metrics"]}
            assert columns["weight"].to_list() == rows["w"].to_list()
        elif name == "odd":
            assert scored["labelled_and_weighted"] == 39 < scored["labelled"] == 40
            assert columns["weight"].null_count() == 1 and columns["logit"].null_count() == 0
        else:
            assert "weight" not in columns.columns
            assert "labelled_and_weighted" not in scored and len(plain_metrics) == len(
                scored["metrics"]
            )
    table = compare([tmp_path / "toy"])
    assert table.headings()[-2:] == ("weighted AUC", "weighted log loss")
    assert table.cells()[0][-1] == f"{evaluated['weighted_log_loss']:.6f}"
    assert "weighted AUC" in run_command("compare", tmp_path / "toy", "--out", tmp_path / "page")
    assert "weighted AUC" in (tmp_path / "page" / "report.html").read_text()
