"""A checkpoint is used whole or not at all, and reading one runs nothing that is in it."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from enum import Enum

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.errors import CheckpointError
from embcomp.training import evaluate, load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from embcomp.training.distributed.process import Process
from embcomp.training.export.export import export_run
from embcomp.training.files.checkpoint_files import CheckpointReader, write_checksums
from embcomp.training.files.random_state import random_state, restore_random_state
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

FILES = (".metadata", "__0_0.distcp", "checksums.json", "random-0.pt", "state.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    config = toy_config(write_dataset(folder / "data"), "train.max_steps=2")
    train(config, runs=folder / "runs", quiet=True)
    return config, folder / "runs"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, and the folder of its checkpoint."""
    config, runs = run
    shutil.copytree(runs, tmp_path / "runs")
    return config, tmp_path / "runs", checkpoint_folder(tmp_path / "runs/toy/checkpoints", 2)


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path, draw):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def remove(path, draw):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove])
@pytest.mark.parametrize("file", FILES)
def test_no_damage_to_a_checkpoint_is_read(copy, file, damage):
    _, runs, checkpoint = copy
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert set(before) == set(FILES)
    uses = [lambda: load_model(runs / "toy"), lambda: export_run(runs / "toy", runs / "a")]
    for seed in range(3):
        damage(checkpoint / file, random.Random(f"{file} {seed}"))
        for use in uses:
            with pytest.raises(CheckpointError) as caught:
                use()
            text = str(caught.value)
            assert str(checkpoint) in text and file in text and "\n" not in text, text
        assert not (runs / "a").exists()
        (checkpoint / file).write_bytes(before[file])


@pytest.mark.parametrize("file", FILES)
def test_training_and_evaluation_refuse_a_flipped_bit(copy, file):
    config, runs, checkpoint = copy
    flip(checkpoint / file, random.Random(file))
    with pytest.raises(CheckpointError, match=f"step-0000000002 .*{file} is damaged"):
        evaluate(runs / "toy", quiet=True)
    (runs / "toy/report.json").unlink()
    with pytest.raises(CheckpointError, match=f"{file} is damaged.*goes on from its start"):
        train(config, runs=runs, quiet=True)


def test_export_from_a_damaged_checkpoint_is_one_line(copy):
    _, runs, checkpoint = copy
    cut(checkpoint / "__0_0.distcp", random.Random(0))
    result = CliRunner().invoke(app, ["export", str(runs / "toy")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "__0_0.distcp is damaged" in result.stderr and "Traceback" not in result.output
    assert not list((runs / "toy").glob("*artefact*"))


def test_stray_folders_beside_checkpoints_are_no_checkpoints(copy):
    config, runs, checkpoint = copy
    for name in ("step-final", "step-0000000002 (copy)", "step-9", "step-0000000002.bak"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
    checkpoint.with_name("step-0000000007").write_text("a file")
    assert saved_steps(checkpoint.parent) == [2]
    (runs / "toy/report.json").unlink()
    train(config, runs=runs, quiet=True)


def test_a_checkpoint_under_another_steps_name_is_refused(copy):
    config, runs, checkpoint = copy
    checkpoint.rename(checkpoint.with_name("step-0000000009"))
    (runs / "toy/report.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-0000000009 holds .* step 2: it was renamed"):
        train(config, runs=runs, quiet=True)


def test_checkpoints_without_checksums_are_those_of_an_older_version(copy):
    _, runs, checkpoint = copy
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="If an older embcomp wrote it, finish the run with"):
        load_model(runs / "toy")


def test_a_state_without_a_key_does_not_go_on_with_defaults(copy):
    config, runs, checkpoint = copy
    state = json.loads((checkpoint / "state.json").read_text())
    del state["epoch"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_checksums(checkpoint, [name for name in FILES if name != "checksums.json"])
    (runs / "toy/report.json").unlink()
    with pytest.raises(CheckpointError, match="another version .* state.json differs in epoch"):
        train(config, runs=runs, quiet=True)


class Trap:
    """A pickle that runs something."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.sprung = True",))


@pytest.mark.parametrize("file", [".metadata", "random-0.pt"])
def test_reading_a_checkpoint_runs_nothing_that_is_in_it(copy, file):
    import builtins

    config, runs, checkpoint = copy
    if file == ".metadata":
        (checkpoint / file).write_bytes(pickle.dumps(Trap()))
    else:
        torch.save(Trap(), checkpoint / file)
    write_checksums(checkpoint, [name for name in FILES if name != "checksums.json"])
    (runs / "toy/report.json").unlink()
    with pytest.raises(CheckpointError, match="step-0000000002"):
        train(config, runs=runs, quiet=True)
    assert not hasattr(builtins, "sprung")


def test_enums_of_an_index_may_be_pickled_as_any_python_does(copy):
    _, _, checkpoint = copy
    index = FileSystemReader(checkpoint).read_metadata()

    class AsPython311(pickle._Pickler):
        def reducer_override(self, found):
            return (
                (getattr, (type(found), found.name)) if isinstance(found, Enum) else NotImplemented
            )

    content = io.BytesIO()
    AsPython311(content).dump(index)
    assert b"getattr" in content.getvalue()
    (checkpoint / ".metadata").write_bytes(content.getvalue())
    assert CheckpointReader(checkpoint).read_metadata().state_dict_metadata == (
        index.state_dict_metadata
    )


def test_an_index_gets_nothing_but_enums_by_name(copy):
    _, _, checkpoint = copy
    for owner, name in ((Metadata, "__init__"), (torch.Size, "numel")):
        got = type("Got", (), {"__reduce__": lambda self, to=(owner, name): (getattr, to)})
        (checkpoint / ".metadata").write_bytes(pickle.dumps(got()))
        with pytest.raises(pickle.UnpicklingError, match=f"{name} of .* has no place"):
            CheckpointReader(checkpoint).read_metadata()


def test_random_numbers_go_on_where_they_were():
    process = Process(0, 1, torch.device("cpu"))
    np.random.standard_normal()  # leaves a second normal number behind
    random.gauss(0, 1)
    packed = random_state(process)

    def draw():
        numbers = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist()]
        return [*numbers, random.gauss(0, 1), random.random()]

    wanted = draw()
    restore_random_state(packed)
    assert draw() == wanted
