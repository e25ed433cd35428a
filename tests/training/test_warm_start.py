"""Runs that begin with another run's rows: a value keeps its row, whatever its number is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torchrec import KeyedJaggedTensor

from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import UNSEEN_ID, DatasetInfo
from embcomp.errors import ConfigError
from embcomp.layers.learned_buffers import overwriting
from embcomp.training import load_model, train
from embcomp.training.checkpoint import model_state
from embcomp.training.distributed.process import process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from embcomp.training.loop import Training
from embcomp.training.reporting.console import RunConsole
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.loading import best_checkpoint
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.warm_start import check_warm_start, prepare_warm_start
from tests.helpers.long import long_but
from tests.helpers.raw_logs import vocabulary
from tests.helpers.training_cases import train_on_ranks, whole

pytestmark = pytest.mark.slow

SPLIT = {"kind": "chronological", "train": 0.8, "valid": 0.1, "test": 0.1}
FEATURES = ("user", "item", "shop")
SHORT = {"epochs": 1, "max_steps": 3}

FIXED: dict[str, dict[str, Any]] = {  # whose rows follow from ids
    "hash": {"name": "hash", "num_buckets": 20, "collisionless": 12},
    "double_hash": {"name": "double_hash", "num_buckets": 20, "collisionless": 12},
    "unified": {"name": "unified", "num_buckets": 40},
    "robe": {"name": "robe", "num_weights": 160},
    "dhe": {"name": "dhe", "hidden_dim": 3, "num_hashes": 4},
    "cafe": {"name": "cafe", "num_buckets": 20, "threshold": 1.0, "collisionless": 12},
    "adapt": {"name": "adapt", "num_buckets": 10, "every": 2, "collisionless": 12},
    "qr": {"name": "qr", "divisor": 8},
    "qr-add": {"name": "qr", "divisor": 8, "combine": "add"},
    "dnis": {"name": "dnis", "quantiles": [0.5], "budget": "60%"},
}
BY_VALUE: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "low_dim": {"name": "low_dim", "width": 4},
    "pruned": {"name": "low_dim", "kept": {"user": 40, "item": 30}},
    "coded": {"name": "coded", "subvector_dim": 2, "num_codewords": 8},
    "latents": {"name": "low_rank", "latent_dim": 2, "from_dense": False},
    "matryoshka": {"name": "matryoshka", "width_grid": 4},
    "autodim": {"name": "autodim", "budget": "60%"},
    "pq": {"name": "pq", "subvector_dim": 4, "num_codewords": 8},
    "lr2vq": {"name": "lr2vq", "subvector_dim": 4, "num_codewords": 8},
    "optembed": {"name": "optembed", "generations": 1, "population": 4, "budget": "40%"},
}
METHODS = {**FIXED, **BY_VALUE}


def log(day: int) -> pl.DataFrame:
    """Rows of a day: users and items of the days before come back, in another order of frequency."""
    rng = np.random.default_rng(day)
    rows = 500
    user = np.minimum(rng.zipf(1.3, rows), 100 + 20 * day)
    item = (rng.zipf(1.4, rows) * (2 * day + 1)) % 83
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "user": [f"u{each}" for each in user],
            "item": [f"i{each}" for each in item],
            "shop": [f"s{each}" for each in rng.integers(0, 5 + day, rows)],
            "price": rng.random(rows),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Day 1; day 2 with its numbers; day 2 numbered anew."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "shop.yaml").write_text(
        "{name: shop, label: y, categorical: [{name: user, min_count: 2}, item, shop], numeric: [price]}"
    )
    for day in (1, 2):
        log(day).write_csv(folder / f"{day}.csv")
    options = {"importer": "table", "schema": folder / "shop.yaml", "split": SPLIT}
    prepare(folder / "1.csv", folder / "day1", room="60%", **options)
    more = {"room": "60%", "extend": folder / "day1", "retire_after": 1}
    prepare(folder / "2.csv", folder / "day2", **more, **options)
    prepare(folder / "2.csv", folder / "anew", **options)
    return folder


def config_of(name: str, data: Path, *overrides: str):
    stages = "budget" in METHODS[name] or name in ("pq", "lr2vq")
    short = {"dense": SHORT, "supernet": SHORT, "low_rank": SHORT, "quantize": SHORT}
    document: dict[str, Any] = {
        "name": f"{name}-{data.name}",
        "seed": 5,
        "data": {"path": str(data), "batch_size": 64, "eval_batch_size": 64},
        "tables": {"embedding_dim": 8, "method": METHODS[name]},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"max_steps": 4, "row_optimizer": {"learning_rate": 0.5}},
    }
    if stages:
        known = parse_config(document).tables.method.settings.stages()
        document["train"]["stages"] = {e.name: short[e.name] for e in known if e.name in short}
    return parse_config(document, overrides)


@pytest.fixture(scope="module")
def first_day(data, tmp_path_factory):
    """Runs of the first day, made when they are asked for."""
    runs = tmp_path_factory.mktemp("runs")

    def of(name: str) -> Path:
        config = config_of(name, data / "day1")
        if not (runs / config.name / "report.json").exists():
            train(config, runs=runs, quiet=True)
        return runs / config.name

    return of


def begun(config, folder: Path):
    """A model and the optimizers' state as a run's last stage begins with them."""
    with quiet_libraries(), process_group("cpu") as process:
        run = RunContext.of(config, DatasetInfo.load(config.data.path), RunFolder(folder))
        check_warm_start(run)
        run.folder.create(config)
        console = RunConsole(enabled=False, name=config.name)
        prepare_warm_start(run, process, console)
        index = run.schedule.trained[-1]
        training = Training(run, index, process, console, log_sizes={})
        training.logs.close()
        state = {key: whole(value).clone() for key, value in model_state(training.sharded).items()}
        optimizers = training.optimizers.combined.state_dict()["state"]
        states = {
            f"{key}.{name}": whole(value).clone()
            for key, own in optimizers.items()
            for name, value in own.items()
        }
    model = run.build(torch.device("cpu"), run.plan_of(index)).model
    with overwriting(model):
        model.load_state_dict(state)
    return model.eval(), states


def ids_of(info: DatasetInfo) -> dict[str, dict[str, int]]:
    return {
        name: dict(zip(found["value"].to_list(), found["id"].to_list()))
        for name in FEATURES
        for found in [vocabulary(info, name)]
    }


def scores(model, ids: dict[str, dict[str, int]], rows: pl.DataFrame) -> torch.Tensor:
    values = [ids[name].get(value, UNSEEN_ID) for name in FEATURES for value in rows[name]]
    sparse = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.tensor(values, dtype=torch.int32),
        lengths=torch.ones(len(values), dtype=torch.int32),
    )
    dense = torch.tensor(rows["price"].to_numpy(), dtype=torch.float32).unsqueeze(1)
    with torch.no_grad():
        return model(dense, sparse)


def known_rows(there, here) -> pl.DataFrame:
    """Rows of all days of values that both datasets have."""
    both = pl.concat([log(1), log(2)])
    for name in FEATURES:
        both = both.filter(pl.col(name).is_in(list(there[name].keys() & here[name].keys())))
    assert both.height > 100
    return both


CASES = [(name, today) for name in METHODS for today in ("day2", "anew")]
SHORT_CASES = [
    *((name, "day2") for name in ("full", "double_hash", "qr", "pruned", "pq", "dnis")),
    *((name, "anew") for name in ("full", "pruned", "pq", "hash")),
]


@pytest.mark.parametrize(("name", "today"), long_but(SHORT_CASES, CASES))
def test_a_run_begins_where_the_other_ended(data, first_day, tmp_path, name, today):
    earlier = first_day(name)
    config = config_of(name, data / today, f"train.warm_start={earlier}")
    if today == "anew" and name in FIXED:
        with pytest.raises(ConfigError, match=r"train.warm_start: .*(other ids in|is held by)"):
            begun(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    model, states = begun(config, tmp_path / "run")
    there = ids_of(DatasetInfo.load(data / "day1"))
    here = ids_of(DatasetInfo.load(data / today))
    rows = known_rows(there, here)
    before = scores(load_model(earlier), there, rows)
    assert before.std() > 0
    torch.testing.assert_close(scores(model, here, rows), before, rtol=1e-5, atol=1e-6)
    came = CheckpointTensors(best_checkpoint(RunContext.opened(earlier)), "optim")
    learned = [key for key in came.shapes if "dnn" in key and key.endswith("exp_avg")]
    for key in learned:
        own = states[key.removeprefix("state.")]
        assert torch.equal(own, came.tensor(key))
    assert learned
    if json.loads((earlier / "report.json").read_text())["best_step"]:
        assert all(came.tensor(key).any() for key in learned)
        momenta = {key: own for key, own in states.items() if key.endswith("momentum1")}
        assert momenta and all(own.any() for key, own in momenta.items() if "first_order" in key)


def test_new_values_begin_as_unseen_ones_did_and_nothing_is_known_of_them(
    data, first_day, tmp_path
):
    earlier = first_day("full")
    config = config_of("full", data / "day2", f"train.warm_start={earlier}")
    model, states = begun(config, tmp_path / "run")
    there, here = (ids_of(DatasetInfo.load(data / name)) for name in ("day1", "day2"))
    old = load_model(earlier).state_dict()
    new_rows = model.state_dict()
    momentum = next(
        own for key, own in states.items() if ".tables." in key and "user.momentum1" in key
    )
    stored = CheckpointTensors(best_checkpoint(RunContext.opened(earlier)), "optim")
    known = next(
        stored.tensor(key) for key in stored.shapes if ".tables." in key and "user.momentum1" in key
    )
    weight = "tables.rows.embedding_bags.user.weight"
    fresh = [i for value, i in here["user"].items() if value not in there["user"]]
    kept = [(i, there["user"][v]) for v, i in here["user"].items() if v in there["user"]]
    assert fresh and kept
    for i in fresh:
        assert torch.equal(new_rows[weight][i], old[weight][UNSEEN_ID]) and momentum[i] == 0
    for i, before in kept:
        assert torch.equal(new_rows[weight][i], old[weight][before])
        assert momentum[i] == known[before]
    # No shop is rare, so that nothing was learnt of those that nobody knows.
    mean = "tables.rows.embedding_bags.shop.weight"
    fresh = [i for value, i in here["shop"].items() if value not in there["shop"]]
    counts = vocabulary(DatasetInfo.load(data / "day1"), "shop")
    wanted = (
        sum(old[mean][i] * c for i, c in zip(counts["id"], counts["count"])) / counts["count"].sum()
    )
    torch.testing.assert_close(new_rows[mean][fresh[0]], wanted)


def test_codes_of_new_values_are_those_of_the_mean_row(data, first_day, tmp_path):
    config = config_of("pq", data / "day2", f"train.warm_start={first_day('pq')}")
    model, _ = begun(config, tmp_path / "run")
    there, here = (ids_of(DatasetInfo.load(data / name)) for name in ("day1", "day2"))
    rows = log(2).filter(~pl.col("shop").is_in(list(there["shop"])))
    two = rows.filter(pl.col("shop").is_in(list(here["shop"]))).head(2)
    assert two.height == 2
    same = two.with_columns(user=pl.lit("u1"), item=pl.lit("i3"), price=pl.lit(0.5))
    assert scores(model, here, same).std() < 1e-6


def test_pruned_tables_keep_their_size_and_give_free_rows_to_new_values(data, first_day, tmp_path):
    config = config_of("pruned", data / "day2", f"train.warm_start={first_day('pruned')}")
    model, _ = begun(config, tmp_path / "run")
    there, here = (ids_of(DatasetInfo.load(data / name)) for name in ("day1", "day2"))
    for group in model.tables.states():
        for name, pruned in group.form.config.pruned_ids(group.tables, group.form).items():
            kept = set(torch.nonzero(~pruned.whole())[:, 0].tolist())
            limit = METHODS["pruned"]["kept"][name]
            assert len(kept) == limit
            stay = {i for v, i in here[name].items() if there[name].get(v, limit) < limit}
            assert stay <= kept
            retired = [v for v, i in there[name].items() if i < limit and v not in here[name]]
            new = sorted(i for v, i in here[name].items() if v not in there[name])
            free = new[: len(retired)]
            assert free and set(free) <= kept


@pytest.mark.parametrize("name", ["full", "pq"])
def test_a_run_goes_on_from_a_kill_and_reports_what_became_of_rows(
    data, first_day, tmp_path, name, monkeypatch
):
    earlier = first_day(name)
    config = config_of(name, data / "day2", f"train.warm_start={earlier}")
    report = train(config, runs=tmp_path / "whole", quiet=True)
    found = report.stages[-1]["result"]["warm_start"]
    info = DatasetInfo.load(data / "day2")
    for feature in info.categorical:
        table, change = found["tables"][feature.name], feature.change
        expected = (change.kept, change.new, change.retired)
        assert (table["kept"], table["new"], table["retired"]) == expected
        counts = vocabulary(info, feature.name)
        share = table["kept_share"] + table["new_share"]
        assert share == pytest.approx(counts["count"].sum() / info.splits["train"].rows)
    skipped = [stage["stopped"] for stage in report.stages[:-1]]
    assert skipped == [f"taken from {earlier}"] * (len(report.stages) - 1)
    assert found["steps"] == json.loads((earlier / "report.json").read_text())["best_step"]

    from embcomp.training.stages import warm_start

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, runs=tmp_path / "again", quiet=True)
    monkeypatch.undo()
    again = train(config, runs=tmp_path / "again", quiet=True)
    moved = earlier.rename(earlier.with_name("moved"))  # which nobody needs any more
    assert train(config, runs=tmp_path / "again", quiet=True) == again
    moved.rename(earlier)
    assert again.valid == report.valid and again.test == report.test
    other = config_of(name, data / "day2", f"train.warm_start={earlier}", "seed=6")
    with pytest.raises(ConfigError, match="another config"):
        train(other, runs=tmp_path / "again", quiet=True)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("full", ["model={name: fm}"], "trained another model"),
        ("full", ["tables.embedding_dim=4"], "embedding_dim of 8, this run of 4"),
        ("full", ["tables.method={name: low_dim, width: 4}"], "held by full in .* and by low_dim"),
        ("hash", ["tables.method.num_buckets=21"], r"hash \(num_buckets=20\) in .* and by hash \("),
        ("full", ["train.start_from=runs/x"], "either start_from or warm_start"),
    ],
)
def test_runs_that_cannot_begin_with_another(data, first_day, tmp_path, name, overrides, says):
    warm = f"train.warm_start={first_day(name)}"
    with pytest.raises(ConfigError, match=says):
        train(config_of(name, data / "day2", warm, *overrides), runs=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_run_cannot_begin_with_itself_or_with_what_is_not_finished(data, first_day, tmp_path):
    earlier = first_day("full")
    own = config_of("full", data / "day1", f"train.warm_start={earlier}")
    with pytest.raises(ConfigError, match="this run itself"):
        train(own, runs=earlier.parent, quiet=True)
    RunFolder(tmp_path / "begun").create(config_of("full", data / "day1"))
    config = config_of("full", data / "day2", f"train.warm_start={tmp_path / 'begun'}")
    with pytest.raises(ConfigError, match="is not finished"):
        train(config, runs=tmp_path, quiet=True)


@pytest.mark.long
def test_elements_cannot_follow_and_are_refused_by_name(data, tmp_path):
    method = "tables.method={name: dnis, structure: element, quantiles: [0.5], budget: 80%}"
    earlier = config_of("dnis", data / "day1", method, "name=elements")
    train(earlier, runs=tmp_path, quiet=True)
    warm = f"train.warm_start={tmp_path / 'elements'}"
    with pytest.raises(ConfigError, match=r"tables item, .* held by sparse, whose rows cannot"):
        train(config_of("dnis", data / "day2", method, warm), runs=tmp_path, quiet=True)


@pytest.mark.long
def test_two_ranks_go_on_as_one_process_does(workers, data, first_day, tmp_path):
    warm = f"train.warm_start={first_day('pq')}"
    config = config_of("pq", data / "day2", warm, "train.sharding=row_wise")
    train(config, runs=tmp_path / "one", quiet=True)
    workers.run(2, train_on_ranks, config, tmp_path / "two")
    one, two = (load_model(tmp_path / each / config.name) for each in ("one", "two"))
    for key, wanted in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ranks"),
    long_but([("pq", 2)], [(n, r) for n in ("pq", "lr2vq", "optembed", "pruned") for r in (2, 4)]),
)
def test_codes_that_ranks_share_follow_as_whole_ones_do(
    workers, data, first_day, tmp_path, name, ranks
):
    """Days of whole and of sharded codes begin with each other's, on any number of ranks."""
    shared = ("train.sharding=row_wise", "train.shard_codes_above=1")
    days = [config_of(name, data / "day1", "name=first", *shared)]
    for number, earlier in enumerate((first_day(name), tmp_path / "first")):
        warm = f"train.warm_start={earlier}"
        days.append(config_of(name, data / "day2", f"name=second{number}", warm, *shared))
    for config in days:
        workers.run(ranks, train_on_ranks, config, tmp_path)
    whole = config_of(name, data / "day2", f"train.warm_start={first_day(name)}")
    train(whole, runs=tmp_path, quiet=True)
    wanted = load_model(tmp_path / whole.name).state_dict()
    found, again = (load_model(tmp_path / f"second{n}").state_dict() for n in (0, 1))
    codes = [key for key in wanted if ".routes." in key]
    assert codes and list(found) == list(again) == list(wanted)
    for key, value in wanted.items():
        if key in codes:
            assert torch.equal(found[key], value), key
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
        assert again[key].shape == value.shape
