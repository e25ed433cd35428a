"""An artefact in several files is the one-file artefact, loaded, mapped, damaged or looked into."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from embcomp import load, save
from embcomp.cli import app
from embcomp.errors import ArtefactError, ConfigError, EmbcompError
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_folder import find_tensors
from embcomp.tables.row_types import ROW_TYPES
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables, random_batch
from tests.helpers.artefact_damage import DAMAGES
from tests.helpers.backends_under_test import CASES
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


@pytest.mark.parametrize("case", long_but(list(CASES)[::3], CASES))
def test_one_file_and_several_hold_and_answer_the_same(tmp_path, case):
    tables = awkward_tables((10, 6, 3))
    collection = pooled(CASES[case], tables)
    row_type = ROW_TYPES[sorted(CASES).index(case) % 4]
    one = save(collection, tmp_path / "one", row_type=row_type)
    several = save(collection, tmp_path / "several", row_type=row_type, max_file_size=64)
    assert several.config.tensors == one.config.tensors and several.row_error == one.row_error
    assert several.config.tables == one.config.tables
    wanted, found = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "several")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "one" / INDEX).exists()
    assert (tmp_path / "several" / INDEX).exists() == (len(wanted) > 1)
    batch = random_batch(tables, seed=3)
    for rows in ("fbgemm", "torch"):
        answers = load(tmp_path / "one", rows=rows)(batch).values()
        for mmap in (False, True):
            again = load(tmp_path / "several", rows=rows, mmap=mmap)(batch).to_dict()
            keys = load(tmp_path / "one", rows=rows)(batch).to_dict()
            assert all(torch.equal(again[key], keys[key]) for key in keys)
        assert len(answers)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "a"
    save(pooled(CASES["full"], awkward_tables((16, 6, 3))), folder, max_file_size=1000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_several_files_is_answered_from(several, tmp_path, damage, mmap):
    for seed in range(5):
        folder = tmp_path / str(seed)
        shutil.copytree(several, folder)
        DAMAGES[damage](folder, random.Random(f"{damage} {seed}"))
        with pytest.raises(EmbcompError) as caught:
            load(folder, mmap=mmap)
        assert str(folder) in str(caught.value)


def test_files_that_changed_places_are_refused(several, tmp_path):
    shutil.copytree(several, tmp_path / "a")
    names = sorted(file.name for file in several.glob("*.safetensors"))
    shutil.copy(several / names[0], tmp_path / "a" / names[1])
    shutil.copy(several / names[1], tmp_path / "a" / names[0])
    with pytest.raises(ArtefactError, match=rf"{INDEX} is damaged or was changed: it says"):
        load(tmp_path / "a")
    (tmp_path / "a" / names[1]).unlink()
    with pytest.raises(ArtefactError, match=rf"has no {names[1]}, which {INDEX} lists; copy"):
        load(tmp_path / "a", mmap=True)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}']
)
def test_an_index_that_is_none_is_refused(several, tmp_path, text):
    shutil.copytree(several, tmp_path / "a")
    (tmp_path / "a" / INDEX).write_text(text)
    with pytest.raises(ArtefactError, match=f"{INDEX} is damaged"):
        load(tmp_path / "a", verify=False)


def test_inspect_shows_every_file(several):
    shown = CliRunner().invoke(app, ["inspect", str(several), "--json"])
    found = json.loads(shown.stdout)
    sizes = {file.name: file.stat().st_size for file in several.iterdir()}
    assert found["files"] == sizes and INDEX in sizes
    config = ArtefactConfig.read(several)
    assert config.tables is not None and found["bytes"]["tables"] == config.tables.bytes
    assert set(find_tensors(several)) == set(config.tensors)


@pytest.mark.parametrize("size", ["x", 0, "10%", -1])
def test_sizes_of_files_are_bytes(tmp_path, size):
    with pytest.raises(ConfigError, match="max_file_size: expected"):
        save(pooled(CASES["full"], awkward_tables((4, 4, 4))), tmp_path / "a", max_file_size=size)
    assert not list(tmp_path.iterdir())
