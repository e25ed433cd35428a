"""Tables whose rows are read where they lie answer, are compacted and are written as those in memory."""

from __future__ import annotations

import pytest
import torch

from embcomp import save
from embcomp.backends import Matryoshka
from embcomp.backends.base import MethodState
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.sourced import SourcedTables
from embcomp.collection.table_row_types import RowTypes
from embcomp.io.tensor_writing import write_tensors
from embcomp.layers.block_work import MemoryWork
from embcomp.layers.row_sources import ComputedRows
from embcomp.serving.artefact_parts import ArtefactPart
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

pytestmark = pytest.mark.slow

LONGEST = 64  # rows that may be read at once: no whole table is


def elsewhere(rows):
    """Rows that are not in memory, and not to be read whole."""

    def read(start, stop):
        assert stop - start <= LONGEST
        return rows.read(start, stop).clone()

    return ComputedRows(rows.shape, rows.dtype, read)


def sourced(collection):
    states = []
    for each in collection.states():
        tensors = {n: t for n, t in each.form.tensors.items() if not n.startswith("rows.")}
        for name in each.form.tensors.keys() - tensors.keys():
            tensors[name] = elsewhere(each.form.rows(name.removeprefix("rows.")))
        form = MethodState.of(each.form.config, tensors)
        states.append(GroupState(tables=each.tables, form=form))
    return SourcedTables.of_states(
        collection.embedding_bag_configs(),
        collection.plan,
        states,
        is_weighted=collection.is_weighted(),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 rows at most, so that small tables have several."""
    monkeypatch.setattr("embcomp.layers.block_work.block_rows", lambda columns: LONGEST)
    monkeypatch.setattr("embcomp.layers.row_sources._AT_ONCE", LONGEST)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_they_answer_as_the_collection(case, weighted):
    tables = awkward_tables((10, 6, 3))
    collection = pooled(CASES[case], tables, is_weighted=weighted)
    own = sourced(collection)
    for shape in ("single", "ragged", "empty"):
        batch = random_batch(tables, seed=5, shape=shape, weighted=weighted)
        with torch.no_grad():
            wanted, found = collection(batch), own(batch)
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found.values(), wanted.values(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_they_are_written_block_by_block_as_the_collection_is_whole(case, tmp_path, monkeypatch):
    collection = pooled(CASES[case], plain_tables(6))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryWork, "write", None)  # long results are not made in memory
        compacted = sourced(collection).compact()
    for row_type in ROW_TYPES:
        saved = save(collection, tmp_path / row_type, row_type=row_type)
        part = ArtefactPart.of(compacted, RowTypes.of(row_type), "tables")
        assert part.record == saved.config.tables
        (tmp_path / f"{row_type}-blocks").mkdir()
        checksums = write_tensors(
            tmp_path / f"{row_type}-blocks", "model.safetensors", part.tensors, file_bytes=1 << 30
        )
        assert checksums == saved.config.tensors
        assert part.row_error == saved.row_error["tables"]
        written = (tmp_path / f"{row_type}-blocks/model.safetensors").read_bytes()
        assert written == (tmp_path / row_type / "model.safetensors").read_bytes()


def test_tables_are_cut_where_they_lie():
    tables = [table.bag() for table in awkward_tables((8, 8, 8))]
    collection = CompressedEmbeddingBagCollection(tables, Matryoshka()).eval()
    batch = random_batch(awkward_tables((8, 8, 8)), seed=1)
    wanted = collection.sliced({"t0": 2, "t2": 4})(batch)
    assert torch.equal(
        sourced(collection).sliced({"t0": 2, "t2": 4})(batch).values(), wanted.values()
    )
