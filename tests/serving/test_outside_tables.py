"""A program without its tables answers as the artefact, whoever holds them, and the flat file is as documented."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from embcomp import load_program
from embcomp.errors import ArtefactError
from embcomp.io.tensor_files import tensors_of_file
from embcomp.serving.artefact_integrity import with_checksums
from embcomp.serving.programs.flat_tables import FlatTables
from embcomp.serving.programs.forms import check_form, write_form
from embcomp.tables.row_types import ROW_TYPES, unpack
from tests.helpers.program_cases import METHODS, batches, saved
from tests.helpers.source_tree import ROOT

pytestmark = pytest.mark.slow


SOME = ("full", "hash", "kept", "unified", "blocks", "coded_5_bits")
CASES = [
    pytest.param(SOME, id="some"),
    pytest.param(tuple(METHODS), id="all", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Tables of some methods, or of all, each in a row type of its own."""
    made = saved(tmp_path_factory.mktemp("outside") / "a", request.param)
    config = write_form("tables", made.serving, made.folder, made.config, bags=True)
    text = with_checksums(config, made.folder, config.tensors).to_json()
    (made.folder / "config.json").write_text(text)
    return made


def test_every_method_answers_as_the_artefact(case):
    assert check_form("tables", case.folder, case.serving, batches(case.tables), bags=True) < 1e-6
    load_program(case.folder)


def test_neither_program_holds_a_table(case):
    route = torch.export.load(case.folder / "route.pt2").state_dict
    dense = torch.export.load(case.folder / "dense.pt2").state_dict
    assert not [name for name in {**route, **dense} if "stored_" in name]
    assert not [name for name in route if "combines" in name]
    assert not [name for name in dense if "routes" in name]


def test_the_reader_in_the_documentation_reads_every_row(case):
    """The page's own code, on a file of tables in all four types."""
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "memmap" in b]
    assert len(code.splitlines()) <= 30
    names: dict = {}
    exec(compile(code, "programs.md", "exec"), names)  # noqa: S102
    tables = names["read_tables"](case.folder / "tables.bin")
    stored = tensors_of_file(case.folder / "model.safetensors")
    assert list(tables) == FlatTables(case.folder / "tables.bin").names
    assert set(tables) == {name for name in stored if name.startswith("tables.rows.")}
    types = case.config.tables.row_types
    assert set(types.values()) == set(ROW_TYPES)
    whole = np.fromfile(case.folder / "model.safetensors", np.uint8)
    for name, table in tables.items():
        lies = stored[name]
        raw = torch.from_numpy(whole[lies.start : lies.start + lies.nbytes].copy())
        right = unpack(raw.view(lies.dtype).view(lies.shape), table["dim"], types[name[12:]])
        found = names["rows_of"](table, np.arange(lies.shape[0]))
        np.testing.assert_array_equal(found, right.numpy())
        assert table["rows"].ctypes.data % 4096 == 0


def test_look_ups_name_tables_that_are_in_the_file(case):
    described = json.loads((case.folder / "lookups.json").read_text())
    tables = FlatTables(case.folder / "tables.bin")
    assert {each["table"] for each in described["lookups"]} == set(tables.names)
    assert described["program"]["outputs"].keys() == {f"f_{table.name}" for table in case.tables}
    route = torch.export.load(case.folder / "route.pt2").module()
    ids = torch.zeros(2, len(case.tables), 3, dtype=torch.int64)
    asked = route({"ids": ids, "lengths": torch.full((2, len(case.tables)), 3)})
    assert {name: own.shape[:2] for name, own in asked.items()} == {
        each["name"]: (2, 3) for each in described["lookups"]
    }


def test_a_file_that_is_not_whole_is_refused(case, tmp_path):
    content = (case.folder / "tables.bin").read_bytes()
    for wrong in (content[:-1], b"another " + content[8:], content[:70], b"", content + b"x"):
        (tmp_path / "tables.bin").write_bytes(wrong)
        with pytest.raises(ArtefactError, match="tables.bin (is no file of flat|cannot be read)"):
            FlatTables(tmp_path / "tables.bin")


def test_a_single_valued_program_without_its_tables(tmp_path):
    case = saved(tmp_path / "a", ("full", "unified", "blocks"), row_type="fp16")
    write_form("tables", case.serving, case.folder, case.config, bags=False)
    every = batches(case.tables)[:1]
    assert check_form("tables", case.folder, case.serving, every, bags=False) < 1e-6
