"""`program.pt2` equals the module that it was made of, and runs where only torch is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import torch

from embcomp import BackendConfig, Full, load, save
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.errors import ArtefactError
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.exported_program import Program, export_program, program_inputs, write_program
from embcomp.serving.programs.program_inputs import id_limits
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES, EACH_METHOD
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torchrec", "fbgemm_gpu", "embcomp", "safetensors"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
program = torch.export.load("program.pt2").module()
for batch in torch.load("batches.pt"):
    found = program(batch["inputs"])
    for key, wanted in batch["outputs"].items():
        assert found[key].shape == wanted.shape
        assert (found[key] - wanted).abs().max() < 1e-6, key
"""


# What is compacted is a serving form of another line of the list, and tracing takes seconds.
SERVING = [c for c in CASES if type(CASES[c].config).compact is BackendConfig.compact]


@pytest.mark.parametrize(
    ("case", "bags"),
    long_but(
        [*((case, True) for case in SERVING if case in EACH_METHOD), ("full", False)],
        [*((case, True) for case in SERVING), ("full", False), ("qr_add", False)],
    ),
)
def test_a_program_answers_as_its_module(case, bags, tmp_path):
    tables = awkward_tables((8, 6, 3))
    save(pooled(CASES[case], tables), tmp_path / "a", row_type="int8")
    serving = load(tmp_path / "a", rows="torch")
    program = Program(serving, bags=bags)
    exported = export_program(program).module()
    for size, shape in ((1, "single"), (7, "ragged"), (4, "empty")):
        if bags or shape == "single":
            batch = random_batch(tables, seed=size, batch_size=size, shape=shape)
            found = exported(program_inputs(program, torch.zeros(size, 0), batch))
            wanted = serving(batch).to_dict()
            assert list(found) == list(wanted)
            for key, rows in wanted.items():
                torch.testing.assert_close(found[key], rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_program_takes_the_ids_that_its_tables_have(case, tmp_path):
    """Whatever is refused or clamped inside a route."""
    tables = plain_tables(8)
    save(pooled(CASES[case], tables), tmp_path / "a")
    limits = id_limits(Program(load(tmp_path / "a", rows="torch"), bags=True))
    assert all(limits.get(f"f{n}", table.rows) == table.rows for n, table in enumerate(tables))


def test_a_program_runs_where_only_torch_is(tmp_path):
    tables = awkward_tables((8, 6, 3))
    save(pooled(CASES["unified"], tables), tmp_path / "a", row_type="int8")
    config = ArtefactConfig.read(tmp_path / "a")
    serving = load(tmp_path / "a", rows="torch")
    program = Program(serving, bags=True)
    described = write_program(program, tmp_path, config)
    assert described.program.inputs["ids"] == "(B, 3, L) int64: f0, f1, f2"
    assert described.program.outputs["f2"] == "(B, 6) float32"
    batches = []
    for size in (1, 3, 50):
        batch = random_batch(tables, seed=size, batch_size=size)
        inputs = program_inputs(program, torch.zeros(size, 0), batch)
        batches.append({"inputs": inputs, "outputs": serving(batch).to_dict()})
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_nothing_in_a_program_is_pickled(tmp_path):
    save(pooled(CASES["full"], plain_tables(4)), tmp_path / "a", row_type="fp16")
    program = Program(load(tmp_path / "a", rows="torch"), bags=False)
    write_program(program, tmp_path, ArtefactConfig.read(tmp_path / "a"))
    with zipfile.ZipFile(tmp_path / "program.pt2") as archive:
        for entry in archive.infolist():
            start = archive.read(entry)[:2]
            assert start[:1] != b"\x80", f"{entry.filename} looks like a pickle"
            assert start != b"PK", f"{entry.filename} is an archive, as torch.save makes them"


def test_a_program_refuses_ids_that_its_module_refuses(tmp_path):
    collection = CompressedEmbeddingBagCollection([t.bag() for t in plain_tables(4)], Full())
    save(collection, tmp_path / "a")
    program = Program(load(tmp_path / "a", rows="torch"), bags=False)
    exported = export_program(program).module()
    inputs = program.example(rows=4)
    exported(inputs)
    inputs["ids"][2, 1] = 90
    with pytest.raises(RuntimeError, match=r"an id of f0, f1, f2 is not in \[0, num_embeddings\)"):
        exported(inputs)


def test_what_has_no_program_says_so(tmp_path):
    tables = plain_tables(4)
    save(unpooled(CASES["full"], tables), tmp_path / "unpooled")
    with pytest.raises(ArtefactError, match="ServingEmbeddingCollection has no program"):
        Program(load(tmp_path / "unpooled", rows="torch"), bags=False)
    save(pooled(CASES["full"], tables, is_weighted=True), tmp_path / "weighted")
    with pytest.raises(ArtefactError, match="weighted tables have no program"):
        Program(load(tmp_path / "weighted", rows="torch"), bags=False)
    save(pooled(CASES["full"], tables), tmp_path / "pooled")
    with pytest.raises(ArtefactError, match='rows="torch"'):
        Program(load(tmp_path / "pooled", rows="fbgemm"), bags=False)


def test_exporting_leaves_the_module_as_it_was(tmp_path):
    tables = awkward_tables((8, 6, 3))
    for case in ("qr_mult", "unified_projected"):
        save(pooled(CASES[case], tables), tmp_path / case)
        serving = load(tmp_path / case, rows="torch")
        batch = random_batch(tables, seed=1)
        export_program(Program(serving, bags=True))
        fresh = load(tmp_path / case, rows="torch")
        assert torch.equal(serving(batch).values(), fresh(batch).values())
