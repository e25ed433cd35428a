"""`embcomp inspect`: its figures against what plain loops over the same ids count."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from embcomp import Full, Hash, LowDim, Unified, load, save
from embcomp.backends import Blocks, Coded
from embcomp.cli import app
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.errors import DataError
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.serving.inspection import inspect_tables
from embcomp.serving.neighbours import embeddings, nearest
from embcomp.serving.row_sharing import placed_blocks
from embcomp.testing.cases import embed_ids, pooled
from embcomp.testing.check_data import awkward_tables, plain_tables
from embcomp.training import train
from tests.helpers.backends_under_test import CASES
from tests.helpers.training_cases import toy_config


def served(config, tmp_path, tables=None, change=None, row_type="fp32"):
    """A collection's artefact, loaded to be inspected."""
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        [table.bag() for table in tables or plain_tables(8)], config
    )
    if change is not None:
        with torch.no_grad():
            change({t: bag.weight for t, bag in collection.rows.embedding_bags.items()})
    save(collection, tmp_path / "a", row_type=row_type)
    return load(tmp_path / "a", rows="torch")


def rows_of_ids(group, table):
    """For each look-up of an id, the physical table and all rows in it."""
    blocks = [placed for _, placed in placed_blocks(group, table)]
    return [(part[0][0], torch.cat([rows for _, rows in part])) for part in zip(*blocks)]


def random_counts(tables):
    random = torch.Generator().manual_seed(1)
    return {t.name: torch.randint(1, 50, (t.rows,), generator=random) for t in tables}


@pytest.mark.parametrize("case", CASES)
def test_every_method_can_be_inspected(case, tmp_path):
    tables = awkward_tables((8, 6, 3))
    save(pooled(CASES[case], tables), tmp_path / "a", row_type="int8")
    serving = load(tmp_path / "a", rows="torch")
    facts = inspect_tables(serving, random_counts(tables))
    assert [each.table for each in facts] == ["t0", "t1", "t2"]
    assert abs(sum(each.bytes for each in facts) - serving.record.bytes) <= len(facts)
    rows = embed_ids(serving, tables)
    for each, key in zip(facts, ("f0", "f2", "f1@t2")):
        table = next(t for t in serving.plan.tables if t.name == each.table)
        own = embeddings(serving, table)
        if key in rows:
            torch.testing.assert_close(own, rows[key], rtol=1e-5, atol=1e-6)
        assert each.ids == len(own)
        assert each.dead == int((own == 0).all(1).sum())
        assert each.width == int((own != 0).any(0).sum())
        if CASES[case].injective:
            assert each.collided == 0 and each.collided_traffic == 0


def test_hash_collisions_are_counted_by_ids_and_by_traffic(tmp_path):
    tables = plain_tables(8)
    serving = served(Hash(num_buckets=20, collisionless=0), tmp_path)
    counts = random_counts(tables)
    for facts in inspect_tables(serving, counts):
        traffic = counts[facts.table].tolist()
        salts = torch.tensor(table_salt(2021, facts.table))
        rows = hash_rows(torch.arange(facts.ids), salts, torch.tensor(20)).tolist()
        sizes = Counter(rows)
        assert facts.rows == len(sizes)
        assert facts.collided == sum(sizes[row] > 1 for row in rows)
        leaders = {}
        for id_ in sorted(range(facts.ids), key=lambda i: (-traffic[i], i)):
            leaders.setdefault(rows[id_], id_)
        follows = sum(traffic[i] for i in range(facts.ids) if leaders[rows[i]] != i)
        assert facts.collided_traffic == pytest.approx(follows / sum(traffic))
        assert facts.pruned == 0 and facts.shared_rows == 0


@pytest.mark.parametrize("method", [Hash(num_buckets=20, collisionless=0), Unified(num_buckets=12)])
def test_parts_count_what_a_plain_loop_over_all_ids_does(method, tmp_path, monkeypatch):
    """Ids are looked at a few at a time; those that share rows may be far from each other."""
    monkeypatch.setattr("embcomp.serving.row_sharing._CHUNK", 7)
    monkeypatch.setattr("embcomp.serving.row_sharing._ROWS_AT_ONCE", 5)
    monkeypatch.setattr("embcomp.serving.id_collisions._PART_IDS", 9)
    monkeypatch.setattr("embcomp.serving.id_collisions._AT_ONCE", 11)
    monkeypatch.setattr("embcomp.io.mapped_arrays._IN_MEMORY", 0)
    serving = served(method, tmp_path)
    counts = {name: own % 5 for name, own in random_counts(plain_tables(8)).items()}
    for facts, table in zip(inspect_tables(serving, counts), serving.plan.tables):
        columns = [rows.tolist() for _, rows in rows_of_ids(serving.groups[0], table)]
        places, own = list(zip(*columns)), counts[table.name].tolist()
        sizes, leaders = Counter(places), {}
        for id_ in sorted(range(facts.ids), key=lambda i: (-own[i], i)):
            leaders.setdefault(places[id_], id_)
        assert facts.collided == sum(sizes[place] > 1 for place in places) > 0
        follows = sum(own[i] for i in range(facts.ids) if leaders[places[i]] != i)
        assert facts.collided_traffic == pytest.approx(follows / sum(own))


class LongestMade(TorchDispatchMode):
    """Remembers the longest tensor of numbers or truths that an operation made and did not write into."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {place_of(each) for each in tree_leaves((args, kwargs))}
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and place_of(each) not in given:
                self.found = max(self.found, 0 if each.is_floating_point() else each.numel())
        return made


def place_of(value):
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


@pytest.mark.parametrize("method", [Full(), Hash(num_buckets=3000), Unified(num_buckets=3000)])
def test_nothing_as_long_as_a_table_is_in_memory_but_in_files(method, tmp_path, monkeypatch):
    monkeypatch.setattr("embcomp.serving.row_sharing._CHUNK", 64)
    monkeypatch.setattr("embcomp.serving.row_sharing._ROWS_AT_ONCE", 64)
    for name in ("inspection", "id_collisions", "neighbours"):
        monkeypatch.setattr(f"embcomp.serving.{name}._AT_ONCE", 64)
    monkeypatch.setattr("embcomp.serving.id_collisions._PART_IDS", 256)
    monkeypatch.setattr("embcomp.io.mapped_arrays._IN_MEMORY", 0)
    tables = plain_tables(4, rows=(6000, 4000))
    serving, counts = served(method, tmp_path, tables), random_counts(tables)
    with LongestMade() as longest:
        (facts, _) = inspect_tables(serving, counts)
    assert facts.ids == 6000 and facts.pruned == 0
    assert 0 < longest.found <= 2048


def test_rows_that_tables_share_are_told_and_their_bytes_shared_out(tmp_path):
    serving = served(Unified(num_buckets=30, num_chunks=1), tmp_path)
    facts = inspect_tables(serving, {})
    group = serving.groups[0]
    reached = {t.name: set(rows_of_ids(group, t)[0][1].tolist()) for t in group.tables}
    for each in facts:
        others = set().union(*(rows for name, rows in reached.items() if name != each.table))
        own = reached[each.table]
        assert each.shared_rows == pytest.approx(len(own & others) / len(own))
        assert each.collided_traffic is None and each.pruned_traffic is None
    assert sum(each.bytes for each in facts) == pytest.approx(30 * 8 * 4, abs=3)


def test_codes_are_billed_to_the_tables_that_they_stand_for(tmp_path):
    config = Coded(subvector_dim=4, num_codewords=16, codebooks="table", latent_dim=2)
    serving = served(config, tmp_path)
    facts = {each.table: each for each in inspect_tables(serving, {})}
    for name, ids in (("t0", 60), ("t1", 90), ("t2", 75)):
        codes, words, projections = ids * 2 / 2, 2 * 16 * 2 * 4, 2 * 2 * 4 * 4
        # Codewords that nobody uses are shared out evenly: a few of 8 bytes.
        assert facts[name].bytes == pytest.approx(codes + words + projections, abs=40)
    served_bytes = serving.plan.footprint.serve_bytes
    assert sum(each.bytes for each in facts.values()) == pytest.approx(served_bytes, abs=2)


def test_pruned_rows_and_their_traffic_are_told(tmp_path):
    tables = plain_tables(8)
    counts = random_counts(tables)
    serving = served(LowDim(width=5, kept={"t0": 20, "t2": 1}), tmp_path, row_type="int4")
    facts = {each.table: each for each in inspect_tables(serving, counts)}
    for name, kept, ids in (("t0", 20, 60), ("t1", 90, 90), ("t2", 1, 75)):
        share = float(counts[name][kept:].sum() / counts[name].sum())
        assert facts[name].pruned == ids - kept
        assert facts[name].pruned_traffic == pytest.approx(share)
        assert facts[name].rows == (kept if name == "t1" else kept + 1)
        assert facts[name].collided == 0 and facts[name].width == 5
    blocks = Blocks(widths={"t0": (8, 0), "t1": (4, 2), "t2": (1,)}, cuts={"t0": (7,), "t1": (10,)})
    serving = served(blocks, tmp_path / "blocks")
    facts = {each.table: each for each in inspect_tables(serving, counts)}
    assert facts["t0"].pruned == facts["t0"].dead == 53
    assert facts["t1"].pruned == 0 and facts["t1"].width == 4
    head = float(counts["t1"][:10].sum() / counts["t1"].sum())
    assert facts["t1"].mean_width == pytest.approx(2 + 2 * head)


@pytest.mark.parametrize(
    ("sharing", "within"), [("position", 4 * 16), ("all", 16), ("table", 4 * 16)]
)
def test_codes_are_counted_by_ids_and_by_traffic(sharing, within, tmp_path):
    tables = plain_tables(8)
    counts = random_counts(tables)
    serving = served(replace(CASES["coded"].config, codebooks=sharing), tmp_path)
    for facts, table in zip(inspect_tables(serving, counts), serving.plan.tables):
        codes = [rows.tolist() for _, rows in rows_of_ids(serving.groups[0], table)]
        plain, weighted = Counter(), Counter()
        for column in codes:
            for id_, code in enumerate(column):
                plain[code] += 1
                weighted[code] += int(counts[table.name][id_])
        assert len(codes) == 4
        assert facts.codebook.codewords == within
        assert facts.codebook.used == len(plain) / within
        for found, counter in (
            (facts.codebook.entropy, plain),
            (facts.codebook.traffic_entropy, weighted),
        ):
            total = sum(counter.values())
            wanted = -sum(n / total * math.log2(n / total) for n in counter.values())
            assert found == pytest.approx(wanted)


def test_dead_rows_and_norms_are_told(tmp_path):
    def change(weights):
        weights["t0"].fill_(0.5)
        weights["t0"][3:5] = 0
        weights["t0"][7] *= 3

    facts = inspect_tables(served(Full(), tmp_path, change=change), {})[0]
    length = 0.5 * 8**0.5
    assert facts.dead == 2
    assert facts.norm == pytest.approx((length * 60 / 58, length, 3 * length))


def test_neighbours_come_by_cosine_and_then_by_id(tmp_path):
    def change(weights):
        weights["t1"][40] = 2 * weights["t1"][5]
        weights["t1"][9] = weights["t1"][5]
        weights["t1"][60] = -weights["t1"][5]
        weights["t1"][2] = 0

    serving = served(Full(), tmp_path, change=change)
    table = serving.plan.tables[1]
    near = nearest(serving, table, 5, 88)
    assert [each.id for each in near[:2]] == [9, 40]
    assert near[0].cosine == pytest.approx(1) and near[0].distance == 0
    assert near[-1].id == 60 and near[-1].cosine == pytest.approx(-1)
    assert 2 not in [each.id for each in near]
    with pytest.raises(DataError, match="the embedding of id 2 of table 't1' is zero"):
        nearest(serving, table, 2, 3)
    with pytest.raises(DataError, match=r"has ids in \[0, 90\); got 90"):
        nearest(serving, table, 90, 3)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """The artefact of a run, with a vocabulary."""
    folder = tmp_path_factory.mktemp("inspect")
    write_toy_dataset(folder / "data", rows=(301, 75, 75))
    config = toy_config(folder / "data", "tables.method={name: low_dim, width: 3, kept: {C1: 9}}")
    train(config, runs=folder, quiet=True)
    result = CliRunner().invoke(app, ["export", str(folder / "toy"), str(folder / "artefact")])
    assert result.exit_code == 0, result.output
    return folder / "artefact"


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_prints_a_table_and_neighbours_by_raw_value(artefact):
    result = inspect(artefact, "--neighbours", "C2=C2-4", "--neighbours", "C1=(unseen)")
    assert result.exit_code == 0, result.output
    assert "low_dim" in result.stdout and "pruned traffic" in result.stdout
    assert "nearest to C2=C2-4" in result.stdout and "nearest to C1=(unseen)" in result.stdout


def test_json_holds_every_figure(artefact):
    result = inspect(artefact, "--json", "--neighbours", "C2=C2-4", "--count", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    first = found["tables"][0]
    counts = id_counts(DatasetInfo.load(artefact))["C1"]
    assert first["pruned"] == 62 - 9
    assert first["pruned_traffic"] == pytest.approx(counts[9:].sum() / counts.sum())
    assert sum(t["bytes"] for t in found["tables"]) == pytest.approx(
        found["bytes"]["tables"], abs=3
    )
    near = found["neighbours"]["C2=C2-4"]
    assert len(near) == 2 and all(each["value"].startswith(("C2-", "(")) for each in near)
    assert found["files"]["model.safetensors"] > sum(found["bytes"].values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("C9=1", "expected TABLE=VALUE with one of the tables C1, C2, C3; got 'C9=1'"),
        ("C2", "expected TABLE=VALUE"),
        ("C2=unheard", "'unheard' is not in the vocabulary of table 'C2', so it would get id 1"),
    ],
)
def test_values_that_are_not_there_are_named(artefact, asked, message):
    result = inspect(artefact, "--neighbours", asked)
    assert result.exit_code == 1 and message in result.stderr
