"""What every serving form answers for ids that training did not see, as docs/artefacts.md says."""

from __future__ import annotations

import re

import pytest
import torch

from embcomp import Hash, load, save
from embcomp.backends import BACKENDS
from embcomp.serving.exported_program import Program, export_program
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import batch_of, plain_tables
from tests.helpers.backends_under_test import CASES
from tests.project.test_docs import ROOT

IN_RANGE = ("full", "low_dim", "low_rank", "qr", "blocks", "sparse", "coded")
HASHED = ("hash", "unified")


def test_the_page_speaks_of_every_serving_form():
    page = (ROOT / "docs" / "artefacts.md").read_text()
    table = page[page.index("## Ids that training did not see") :]
    named = set(re.findall(r"`(\w+)`", table.partition('\n\n"Refused"')[0]))
    assert {*IN_RANGE, *HASHED} <= named
    forms = {case.config.name for case in CASES.values()} & {*IN_RANGE, *HASHED}
    assert forms == {*IN_RANGE, *HASHED} and forms <= set(BACKENDS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", ["auto", "fbgemm", "torch"])
def test_ids_out_of_range_are_refused_or_hashed(case, rows, tmp_path):
    save(pooled(CASES[case], plain_tables(8)), tmp_path / "a", row_type="int8")
    serving = load(tmp_path / "a", rows=rows)
    for bad in (-1, 90, 2**31, 2**62):
        batch = batch_of({"f0": [[1]], "f1": [[bad]], "f2": [[0]]})
        if CASES[case].takes_any_id:
            found = serving(batch)["f1"]
            assert bool(found.isfinite().all()) and bool(found.any())
        else:
            with pytest.raises(ValueError, match=rf"feature 'f1': id {bad} is not in \[0, 90\)"):
                serving(batch)


def test_a_program_hashes_where_its_module_does(tmp_path):
    collection = pooled(CASES["unified"], plain_tables(8))
    save(collection, tmp_path / "a")
    program = export_program(Program(load(tmp_path / "a", rows="torch"), bags=False)).module()
    ids = torch.tensor([[-1, 10**15, 2**62], [5, 6, 7]])
    batch = batch_of({f"f{n}": [[int(row[n])] for row in ids] for n in range(3)})
    wanted = collection(batch).to_dict()
    for key, found in program({"ids": ids}).items():
        torch.testing.assert_close(found, wanted[key], rtol=0, atol=1e-6)


def test_pruned_ids_share_a_row_and_unstored_ones_give_zeros(tmp_path):
    def rows(case, feature, ids):
        save(pooled(CASES[case], plain_tables(8)), tmp_path / case)
        others = {f: [[0]] * len(ids) for f in ("f0", "f1", "f2") if f != feature}
        batch = batch_of(others | {feature: [[i] for i in ids]})
        return load(tmp_path / case)(batch)[feature]

    shared = rows("low_dim_kept", "f0", [40, 59, 33, 2])
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])
    assert not torch.equal(shared[0], shared[3])
    stored = rows("blocks", "f2", [0, 2, 3])
    assert not stored[:2].any() and stored[2].any()


def test_a_hashed_id_answers_as_the_ids_that_it_meets(tmp_path):
    case = CASES["hash"]
    assert isinstance(case.config, Hash)
    collection = pooled(case, plain_tables(8))
    save(collection, tmp_path / "a")
    serving = load(tmp_path / "a")
    ids = list(range(90, 400))
    batch = batch_of({"f0": [[0]] * 310, "f1": [[i] for i in ids], "f2": [[0]] * 310})
    found = serving(batch)["f1"]
    seen = collection.rows.embedding_bags["t1"].weight.detach()
    assert bool((found.unsqueeze(1) == seen).all(dim=2).any(dim=1).all())
