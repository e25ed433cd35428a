"""Columns by frequency block: searches keep bounds, follow what was planted, and shard."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embcomp import DNIS, ConfigError, DNISSearch, Full
from embcomp.backends.base import StageInputs
from embcomp.backends.dnis.optimizer import SelectionSGD, normalized
from embcomp.backends.dnis.search import multipliers
from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.layers.frequency_blocks import traffic_cuts
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from embcomp.training import load_model, train
from embcomp.training.checkpoint import saved_steps
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.loading import load_unsharded
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.schedule import StageSchedule
from tests.helpers.dnis_cases import CUTS, collection_of, holding, mixed_tables, searched
from tests.helpers.resealed import reseal
from tests.helpers.training_cases import train_on_ranks

pytestmark = pytest.mark.slow


def test_blocks_end_where_their_share_of_the_traffic_is_reached():
    counts = torch.tensor([50, 20, 10, 10, 5, 3, 1, 1])
    assert traffic_cuts(8, counts, (0.5, 0.7, 0.9)) == (1, 2, 4)
    assert traffic_cuts(8, torch.zeros(8), (0.5,)) == traffic_cuts(8, None, (0.5,))
    assert traffic_cuts(1) == ()


def test_uncounted_ids_follow_zipfs_law():
    zipf = 1 / torch.arange(1, 10_001, dtype=torch.float64)
    for found, counted in zip(traffic_cuts(10_000), traffic_cuts(10_000, zipf)):
        assert found == pytest.approx(counted, rel=0.02, abs=1)


def test_normalized_gradients_have_a_mean_size_of_one_for_each_block():
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 16, generator=random) * torch.tensor([1e3, 1, 1e-3, 1e-5, 0])[:, None]
    sizes = normalized(gradient).abs().mean(1)
    torch.testing.assert_close(sizes, torch.tensor([1.0, 1, 1, 1, 0]), rtol=2e-3, atol=0)
    assert torch.equal(normalized(gradient).sign(), gradient.sign())


def test_selections_stay_between_0_and_1_and_move_by_the_learning_rate():
    random = torch.Generator().manual_seed(0)
    alpha = torch.nn.Parameter(torch.full((3, 8), 0.5))
    optimizer = SelectionSGD([alpha], lr=0.1, decay=1.0)
    for step in range(40):
        before = alpha.detach().clone()
        alpha.grad = torch.randn(3, 8, generator=random) + 0.5
        optimizer.step()
        assert 0 <= alpha.min() <= alpha.max() <= 1
        if step < 2:
            moved = (before - alpha.detach()).abs().mean(1)
            torch.testing.assert_close(moved, torch.full((3,), 0.1 / (1 + step)))
    before = alpha.detach().clone()
    alpha.grad = None
    optimizer.step()
    assert torch.equal(alpha, before)


def test_rows_are_multiplied_by_the_selection_of_their_block():
    tables = mixed_tables()
    collection = searched(tables)
    found, form = embed_ids(collection, tables), collection.states()[0].form
    selections = form.config.selections(collection.plan.tables, form)
    for table in tables:
        block = sum((torch.arange(table.rows) >= cut).long() for cut in CUTS[table.name])
        wanted = form.rows(table.name).whole() * selections[table.name][block]
        assert torch.equal(found[table.features[0]], wanted)


def test_a_prefix_selects_whole_columns_a_part_and_nothing():
    tables = plain_tables(4, rows=(60,))
    collection = collection_of(tables, DNISSearch(cuts={"t0": (10,)}, selection="prefix"))
    with torch.no_grad():
        next(collection.combine.parameters()).copy_(torch.tensor([[1.0], [0.625]]))
    rows = collection.states()[0].form.rows("t0").whole()
    found = embed_ids(collection, tables)["f0"]
    assert torch.equal(found[:10], rows[:10])
    assert torch.equal(found[10:], rows[10:] * torch.tensor([1, 1, 0.5, 0]))


@pytest.mark.parametrize(
    ("share", "gradient"),
    [(1.0, [0, 0, 0, 1]), (0.625, [0, 0, 1, 0]), (0.5, [0, 1, 1, 0]), (0.0, [1, 0, 0, 0])],
)
def test_a_length_learns_from_the_columns_at_its_end_wherever_it_stands(share, gradient):
    alpha = torch.tensor([[share]], requires_grad=True)
    found = multipliers(alpha, 4)
    assert torch.equal(found, (4 * alpha - torch.arange(4)).clamp(0, 1))
    by_column = [torch.autograd.grad(found[0, n], alpha, retain_graph=True)[0] for n in range(4)]
    assert torch.equal(torch.cat(by_column)[:, 0], 4 * torch.tensor(gradient, dtype=torch.float32))


def test_a_search_of_prefixes_leaves_the_whole_rows_with_which_it_begins():
    tables = plain_tables(4, rows=(60,))
    collection = collection_of(tables, DNISSearch(cuts={"t0": (10,)}, selection="prefix", l1=1.0))
    (alpha,) = collection.combine.parameters()
    collection.train()(random_batch(tables, seed=0))
    optimizer = SelectionSGD([alpha], lr=0.25)
    collection.penalty().backward()
    optimizer.step()
    torch.testing.assert_close(alpha.detach(), torch.full((2, 1), 0.75))


def test_the_penalty_is_the_sum_of_what_rows_are_multiplied_by():
    tables = awkward_tables((8, 4, 8))
    collection = searched(tables, l1=0.25).train()
    collection(random_batch(tables, seed=0))
    total = sum(alpha.sum() for alpha in collection.combine.parameters())
    torch.testing.assert_close(collection.penalty(), 0.25 * total)
    collection.eval()(random_batch(tables, seed=0))
    assert collection.penalty() is None


def test_the_penalty_rests_while_what_is_selected_fits():
    tables = awkward_tables((8, 4, 8))
    form = searched(tables).states()[0].form
    specs = collection_of(tables, Full()).plan.tables
    taken = form.config.compact(specs, form).config.footprint(specs).serve_bytes
    for budget, rests in ((taken, True), (taken - 1, False)):
        collection = searched(tables, l1=0.25, serve_bytes=budget).train()
        collection(random_batch(tables, seed=0))
        assert bool(collection.penalty() == 0) is rests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantiles": (0.5, 0.5)}, "rise strictly"),
        ({"quantiles": (0.5, 1.0)}, "rise strictly"),
        ({"selection": "suffix"}, "free, prefix"),
        ({"structure": "rows"}, "block, element"),
        ({"l1": -1.0}, "l1 must be at least 0"),
        ({"search_epochs": 0}, "search_epochs must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"serve_bytes": 0}, "serve_bytes must be positive"),
        ({"cuts": {"t0": (4, 2)}}, "must rise strictly"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DNIS(**settings)


def test_cuts_of_a_table_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="cuts name other, which this method does not hold"):
        collection_of(plain_tables(4), DNIS(budget="20%", cuts={"other": (3,)}))


def test_a_search_begins_with_the_weights_that_it_was_given_and_blocks_by_count():
    tables = plain_tables(4, rows=(60, 30, 20))
    collection = collection_of(tables, Full())
    specs, full = collection.plan.tables, collection.states()[0].form
    method = DNIS(serve_bytes=200, quantiles=(0.5,), cuts={"t1": (7,), "t2": ()})
    past = StageInputs(
        before=full,
        initial=lambda: full,
        counts={"t0": torch.cat([torch.full((6,), 10), torch.full((54,), 1)])},
    )
    form = method.start_stage(method.stages()[1], specs, past)
    assert form.config.cuts == {"t0": (6,), "t1": (7,), "t2": ()}
    there = embed_ids(holding(tables, form), tables)
    for key, rows in embed_ids(collection, tables).items():
        assert torch.equal(there[key], rows)


def planted(folder, rows=(3000, 500, 500), seed=0):
    """Clicks that follow feature C1 where its value is frequent, and nothing where it is rare."""
    write_toy_dataset(folder, rows=rows, num_values=(400, 5), num_numeric=1)
    random = np.random.default_rng(seed)
    effect = random.choice([-2.5, 2.5], size=402)
    effect[20:] = 0
    for path in sorted(folder.glob("*/part-*.parquet")):
        table = pq.read_table(path)
        chance = 1 / (1 + np.exp(-effect[table["C1"].to_numpy()]))
        labels = (random.random(len(table)) < chance).astype(np.float32)
        place = table.column_names.index("label")
        pq.write_table(table.set_column(place, "label", pa.array(labels)), path)
    reseal(folder)
    return folder


def planted_config(dataset, **method):
    return parse_config(
        {
            "name": "planted",
            "data": {"path": str(dataset), "batch_size": 64, "search_share": 0.3},
            "tables": {"embedding_dim": 8, "method": {"name": "dnis", **method}, "budget": "15%"},
            "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
            "train": {"dense_optimizer": {"learning_rate": 0.01}, "epochs": 2},
        }
    )


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_rare_ids_get_fewer_columns_than_frequent_ones(tmp_path):
    dataset = planted(tmp_path / "data")
    config = planted_config(dataset, quantiles=[0.6, 0.8], learning_rate=0.03, l1=1e-4)
    report = train(config, runs=tmp_path, quiet=True)
    assert report.test["auc"] > 0.6
    info, folder = DatasetInfo.load(dataset), RunFolder(tmp_path / "planted")
    schedule = StageSchedule.of(config, info)
    place = folder.stage(1, schedule.names)
    step = saved_steps(place.checkpoints)[-1]
    tables = load_unsharded(RunContext.opened(folder.path), 1, step).tables
    form = tables.states()[0].form
    selections = form.config.selections(schedule.staged[0].tables, form)["C1"]
    assert 0 <= selections.min() <= selections.max() <= 1
    selections = selections.mean(1)
    assert selections[0] > selections[-1] + 0.2
    kept = load_model(tmp_path / "planted").tables.states()[0].form.config
    assert kept.widths["C1"][0] > kept.widths["C1"][-1]


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_four_ranks_search_and_prune_as_one_process_does(workers, tmp_path):
    dataset = write_toy_dataset(tmp_path / "data", rows=(192, 64, 64), multi_valued=["C2"]).folder
    config = planted_config(dataset, structure="element", learning_rate=0.1)
    config = parse_config(
        config.model_dump(mode="json"),
        ["tables.budget=60%", "tables.embedding_dim=4", "train.epochs=1", "data.drop_last=true"],
    )
    train(config, runs=tmp_path / "one", quiet=True)
    workers.run(4, train_on_ranks, config, tmp_path / "many")
    one, many = (load_model(tmp_path / way / "planted").state_dict() for way in ("one", "many"))
    for name, tensor in one.items():
        torch.testing.assert_close(
            many[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
