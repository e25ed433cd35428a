"""`embcomp export --rewrite-vocabulary` and `--dim`: smaller tables, and what stays the same."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typer.testing import CliRunner

from embcomp import Full, LowDim, load
from embcomp.backends.low_dim import low_dim_form
from embcomp.cli import app
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.preparing.lookup import ValueIndex
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.errors import ConfigError
from embcomp.layers import block_work, kept_ids, row_sources
from embcomp.layers.row_sources import as_rows
from embcomp.serving.artefact_folder import header_bytes
from embcomp.serving.serving_features import as_features
from embcomp.testing.check_data import batch_of, plain_tables, random_batch
from embcomp.training import load_model, train
from embcomp.training.export import renumbered_vocabulary, vocabulary_rewrite
from embcomp.training.export.vocabulary_rewrite import Renumbering, renumbered
from tests.helpers.handover_cases import CountedRows
from tests.helpers.training_cases import toy_config

pytestmark = pytest.mark.slow

KEPT = {"C1": 20, "C3": 5}


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose tables of C1 and C3 (bags) keep some rows; with first-order tables."""
    folder = tmp_path_factory.mktemp("rewrite")
    write_toy_dataset(folder / "data", rows=(301, 75, 200), multi_valued=["C3"])
    config = toy_config(
        folder / "data",
        "tables.method={name: low_dim, width: 5, kept: {C1: 20, C3: 5}}",
    )
    train(config, runs=folder, quiet=True)
    return folder / "toy"


def test_a_share_is_one_of_the_whole_tables_whatever_was_dropped(run, tmp_path):
    full = (62 + 32 + 10) * 8 * 4
    result = export(run, tmp_path / "a", "--rewrite-vocabulary", "--budget", "50%")
    assert result.exit_code == 0, result.output
    assert f"{full // 2:,} bytes, kept" in result.stdout


@pytest.fixture(scope="module")
def rewritten(run):
    result = export(run, run.parent / "rewritten", "--rewrite-vocabulary", "--format", "pt2")
    assert result.exit_code == 0, result.output
    assert "more rows have values that are dropped or unseen" in result.stdout
    return run.parent / "rewritten"


def test_ids_are_numbered_anew_in_their_old_order():
    pruned = torch.tensor([0, 1, 0, 1, 1, 0, 0]).bool()
    found = Renumbering.of(as_rows(pruned), torch.tensor([9, 4, 8, 3, 1, 7, 6]))
    assert found.stays.ids(0, found.size).tolist() == [0, 1, 2, 5, 6]
    assert found.new_ids(torch.arange(7)).tolist() == [0, 1, 2, 1, 1, 3, 4]
    assert found.weights.whole().tolist() == [0, 0.5, 0, 3 / 8, 1 / 8, 0, 0]
    assert found.dropped == 2
    unseen_only = Renumbering.of(as_rows(torch.zeros(4).bool()), torch.tensor([1, 0, 2, 1]))
    assert unseen_only.weights.whole().tolist() == [0, 1, 0, 0]


def test_nothing_pruned_is_left(run, rewritten):
    config = json.loads((rewritten / "config.json").read_text())
    ids = {table["name"]: table["num_embeddings"] for table in config["tables"]["tables"]}
    # The first ids are kept, 0 and 1 among them.
    assert ids == {"C1": 20, "C2": 32, "C3": 5}
    assert config["dataset"]["renumbered"] == ["C1", "C3"]
    assert header_bytes(rewritten / "model.safetensors")["tables"] == (20 + 32 + 5) * 5 * 4
    info = DatasetInfo.load(rewritten)
    for feature in info.categorical:
        assert feature.num_embeddings == ids[feature.name]
        frame = pl.read_parquet(rewritten / feature.vocabulary)
        assert frame["id"].to_list() == list(range(2, feature.num_embeddings))
    old = DatasetInfo.load(run.parent / "data")
    before, after = id_counts(old), id_counts(info)
    assert after["C1"][2:].tolist() == before["C1"][2:20].tolist()
    # How many train rows are missing is known in proportion only.
    assert abs(after["C1"][1] - before["C1"][1] - before["C1"][20:].sum()) < 5


def test_raw_values_are_encoded_as_the_page_says(run, rewritten):
    old, new = DatasetInfo.load(run.parent / "data"), DatasetInfo.load(rewritten)
    for before, after in zip(old.categorical, new.categorical):
        frame = pl.read_parquet(old.folder / before.vocabulary)
        values = pl.concat([frame["value"], pl.Series(["never seen", None])])
        index = ValueIndex(rewritten / after.vocabulary, 0, after.num_embeddings - 2)
        found = index.ids(values)
        kept = KEPT.get(after.name, before.num_embeddings)
        wanted = [id_ if id_ < kept else 1 for id_ in frame["id"].to_list()]
        assert found.tolist() == [*wanted, 1, 0]


def test_rows_without_dropped_values_are_scored_as_before(run, rewritten):
    info = DatasetInfo.load(run.parent / "data")
    model, serving = load_model(run), load(rewritten)
    program = torch.export.load(rewritten / "program.pt2").module()
    unchanged = 0
    with torch.no_grad():
        for batch in ParquetLoader(info, "test", batch_size=1, shuffle=False, drop_last=False):
            bags = {key: jagged.values().long() for key, jagged in batch.sparse.to_dict().items()}
            encoded = {
                key: torch.where(ids < KEPT.get(key, 99), ids, 1) for key, ids in bags.items()
            }
            plain = {key: (ids, torch.tensor([0, len(ids)])) for key, ids in encoded.items()}
            found, wanted = serving(batch.dense, plain), model(batch.dense, batch.sparse)
            if all(bool((encoded[key] == bags[key]).all()) for key in bags) and not any(
                bool((bags[key] == 1).any()) for key in KEPT
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
                unchanged += 1
            ids = torch.zeros(1, 3, 4, dtype=torch.int64)
            for n, key in enumerate(encoded):
                ids[0, n, : len(encoded[key])] = encoded[key]
            inputs = {
                "ids": ids,
                "lengths": torch.tensor([[len(ids) for ids in encoded.values()]]),
                "dense": batch.dense,
            }
            torch.testing.assert_close(program(inputs)["logits"], found, rtol=0, atol=1e-6)
    assert 20 < unchanged < 180


def test_the_unseen_row_is_the_mean_of_what_was_dropped(run, rewritten):
    info = DatasetInfo.load(run.parent / "data")
    counts = id_counts(info)["C1"]
    model, serving = load_model(run), load(rewritten)
    ids = torch.arange(62)
    features = {"C2": (torch.zeros(0).long(), torch.zeros(63).long()), "C1": ids}
    features["C3"] = features["C2"]
    merged = [1, *range(20, 62)]
    weights = torch.from_numpy(counts[merged] / counts[merged].sum()).float()
    for role in ("tables", "first_order_tables"):
        trained = dict(model.named_children())[role]
        served = dict(serving.network.named_children())[role]
        batch = as_features(features, ["C1", "C2", "C3"], is_weighted=False, device=ids.device)
        before = trained(batch)["C1"].detach()
        after = served({**features, "C1": torch.ones(62).long()})["C1"][0]
        torch.testing.assert_close(after, weights @ before[merged], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_rewritten_says_why(run, tmp_path):
    dataset = run.parent / "data"
    config = toy_config(dataset, "name=whole")
    train(config, runs=tmp_path, quiet=True)
    result = export(tmp_path / "whole", tmp_path / "a", "--rewrite-vocabulary")
    assert result.exit_code == 1 and "no table has pruned rows" in result.stderr
    config = toy_config(
        dataset,
        "name=hashed",
        "tables.method={name: low_dim, width: 5, kept: {C1: 20}}",
        "tables.first_order={name: hash, ratio: 0.5, collisionless: 0}",
    )
    train(config, runs=tmp_path, quiet=True)
    result = export(tmp_path / "hashed", tmp_path / "a", "--rewrite-vocabulary")
    assert result.exit_code == 1
    assert "C1 are also held by hash, whose rows follow from the old ids" in result.stderr
    for dim, message in (
        ("C1", "expected TABLE=COLUMNS"),
        ("C1=3,C1=4", "expected TABLE=COLUMNS"),
        ("C9=3", "no table is called C9; the tables are C1, C2, C3"),
        ("C1=3", "low_dim: C1 cannot be cut to fewer columns"),
    ):
        result = export(run, tmp_path / "a", "--dim", dim)
        assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "a").exists()


@dataclass(frozen=True, kw_only=True)
class Nested(Full):
    """Whole rows of which every prefix serves."""

    def slice_columns(self, tables, form, widths):
        weights = {table.name: form.rows(table.name) for table in tables}
        return low_dim_form(tables, weights, {}, widths)


def test_slices_are_the_leading_columns_of_the_tables_that_were_named():
    tables = plain_tables(8)
    torch.manual_seed(0)
    plan = {"t0": Nested(), "t1": Nested(), "t2": Full()}
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan).eval()
    batch = random_batch(tables, seed=1)
    cut = collection.sliced({"t0": 3, "t1": 8})
    whole, found = collection(batch), cut(batch)
    assert torch.equal(found["f0"][:, :3], whole["f0"][:, :3]) and not found["f0"][:, 3:].any()
    assert torch.equal(found["f1"], whole["f1"]) and torch.equal(found["f2"], whole["f2"])
    assert cut.footprint.serve_bytes == 4 * (60 * 3 + 90 * 8 + 75 * 8)
    with pytest.raises(ConfigError, match="no table is called t9"):
        collection.sliced({"t9": 3})
    with pytest.raises(ConfigError, match="full: t2 cannot be cut"):
        collection.sliced({"t2": 3})


def test_a_renumbered_form_keeps_every_kept_row():
    """Also where the kept ids are scattered, and id 1 itself was pruned."""
    tables = plain_tables(8)
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], Full()).eval()
    random = np.random.default_rng(0)
    masks = {"t0": torch.from_numpy(random.random(60) < 0.3), "t2": torch.ones(75).bool()}
    masks["t0"][1] = False
    form = collection.states()[0]
    weights = {t.name: form.form.rows(t.name) for t in form.tables}
    pruned_form = low_dim_form(form.tables, weights, masks, {"t1": 5})
    assert set(pruned_form.config.kept) == {"t0"}
    pruned = collection._with_states([GroupState(tables=form.tables, form=pruned_form)])
    numbering = Renumbering.of(as_rows(~masks["t0"]), None)
    after = renumbered(pruned, {"t0": numbering})
    assert after.plan.methods["t0"] == LowDim(widths={"t0": 8, "t1": 5, "t2": 8})
    kept = torch.nonzero(masks["t0"])[:, 0]
    kept = kept[kept >= 2]

    def rows(lookup, ids):
        none = torch.zeros(len(ids), dtype=torch.int32)
        lengths = torch.cat([torch.ones_like(none), none, none])
        keys = ["f0", "f1", "f2"]
        return lookup(KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths))["f0"]

    assert torch.equal(rows(after, numbering.new_ids(kept)), rows(pruned, kept))
    assert not rows(after, torch.tensor([1])).any()
    single = {f"f{n}": [[5], [1]] for n in (1, 2)}
    batch = batch_of({"f0": [[0], [0]], **single})
    for key in ("f1", "f2"):
        assert torch.equal(after(batch)[key], pruned(batch)[key])


@pytest.mark.parametrize("counted", [True, False])
def test_renumbering_holds_bits_and_a_block_of_anything_else(counted, monkeypatch):
    ids, random = 3000, torch.Generator().manual_seed(0)
    pruned, table = torch.rand(ids, generator=random) < 0.7, torch.randn(ids, 4, generator=random)
    counts = (1000 / torch.arange(1, ids + 1)).long()
    for module, name in ((vocabulary_rewrite, "_CHUNK"), (kept_ids, "_AT_ONCE")):
        monkeypatch.setattr(module, name, 256)
    monkeypatch.setattr(block_work, "_ROWS_AVERAGED", 256)
    monkeypatch.setattr(row_sources, "_AT_ONCE", 256 * 16)
    monkeypatch.setattr(CountedRows, "most_rows", 0)
    found = Renumbering.of(CountedRows(pruned), counts if counted else None)
    numbers = CountedRows(torch.arange(ids))
    rows = vocabulary_rewrite._moved(CountedRows(table), numbers, found)
    moved = torch.cat([rows.read(a, min(a + 50, len(rows))) for a in range(0, len(rows), 50)])
    assert 0 < CountedRows.most_rows <= 256
    kept = torch.tensor([n for n in range(ids) if n < 2 or not pruned[n]])
    others = [1, *(n for n in range(2, ids) if pruned[n])]
    weights = counts[others].double() if counted else torch.ones(len(others)).double()
    mean = weights @ table[others].double() / weights.sum()
    torch.testing.assert_close(moved[1], mean.float())
    assert torch.equal(moved[2:], table[kept[2:]]) and torch.equal(moved[0], table[0])
    merged = counts[kept].clone()
    merged[1] = counts[others].sum()
    shares = (merged.cumsum(0).double() / int(counts.sum())).numpy()
    wanted = {share: int(np.searchsorted(shares, float(share))) for share in ("0.1", "0.5", "0.9")}
    assert vocabulary_rewrite._quantiles(dict.fromkeys(wanted, 0), counts, found) == wanted


def test_a_renumbered_vocabulary_is_read_and_written_in_parts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(renumbered_vocabulary, "_AT_ONCE", 7)
    info = DatasetInfo.load(run.parent / "data")
    path = info.folder / info.categorical[0].vocabulary
    before, asked = pl.read_parquet(path), []

    def new_ids(ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return torch.where(ids % 3 == 0, 1, ids * 10)

    vocabulary = renumbered_vocabulary.RenumberedVocabulary(path, new_ids)
    vocabulary.write(tmp_path / "new.parquet")
    left = before.filter(pl.col("id") % 3 != 0)
    assert vocabulary.values() == left.height < before.height and max(asked) <= 7
    after = pl.read_parquet(tmp_path / "new.parquet")
    assert after.equals(left.with_columns((pl.col("id") * 10).cast(pl.Int32)))


def test_one_matryoshka_training_is_exported_at_other_widths(run, tmp_path):
    method = "tables.method={name: matryoshka, width_grid: 2}"
    config = toy_config(run.parent / "data", "name=nested", method)
    train(config, runs=tmp_path, quiet=True)
    whole = load_model(tmp_path / "nested")
    sizes = []
    for dim in ("C1=4,C2=2", "C1=2"):
        result = export(tmp_path / "nested", tmp_path / dim, "--dim", dim)
        assert result.exit_code == 0, result.output
        sizes.append(header_bytes(tmp_path / dim / "model.safetensors")["tables"])
    assert sizes == [4 * (62 * 4 + 32 * 2 + 10 * 8), 4 * (62 * 2 + 32 * 8 + 10 * 8)]
    ids = {name: torch.arange(10) for name in ("C1", "C2", "C3")}
    batch = as_features(ids, list(ids), is_weighted=False, device=torch.device("cpu"))
    served = load(tmp_path / "C1=4,C2=2").tables(batch)
    trained = whole.tables(batch)
    for name, width in (("C1", 4), ("C2", 2), ("C3", 8)):
        assert torch.equal(served[name][:, :width], trained[name][:, :width])
        assert not served[name][:, width:].any()
