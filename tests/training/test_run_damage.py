"""What a run wrote about itself is read as it was written, or named."""

from __future__ import annotations

import random
import shutil

import pytest

from embcomp.errors import CheckpointError, EmbcompError
from embcomp.training import Report, evaluate, load_model, train
from embcomp.training.files.run_checksums import (
    announce_file,
    check_file,
    read_checked,
    read_sealed_json,
    sealed_json,
    write_checked,
)
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

METHOD = (
    "tables.method={name: optembed, budget: 60%, generations: 1, population: 2, mutants: 1, "
    "crossovers: 1}"
)
STAGED = (METHOD, "data.search_share=0.2", "train.max_steps=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in stages, whose tables were pruned by a search."""
    folder = tmp_path_factory.mktemp("run")
    config = toy_config(write_dataset(folder / "data"), *STAGED)
    train(config, runs=folder / "runs", quiet=True)
    return config, folder / "runs"


def change(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def written(runs):
    names = ("config.yaml", "report.json", "checksums.json", "forms.json", "done.json")
    found = [path for name in names for path in (runs / "toy").rglob(name)]
    # Checkpoints and starts are read by what goes on from them, and have tests of their own.
    others = [path for path in found if not {"checkpoints", "start"} & set(path.parts)]
    return sorted(str(path.relative_to(runs)) for path in others)


def test_a_missing_file_of_a_run_is_named(run, tmp_path):
    _, runs = run
    for name in ("dataset.json", "config.yaml"):
        shutil.copytree(runs, tmp_path / name)
        (tmp_path / name / "toy" / name).unlink()
        with pytest.raises(EmbcompError, match=name) as found:
            evaluate(tmp_path / name / "toy", quiet=True)
        assert "\n" not in str(found.value)


def test_no_changed_file_of_a_run_is_used(run, tmp_path):
    _, runs = run
    shutil.copytree(runs, tmp_path / "runs")
    files = written(tmp_path / "runs")
    assert sum(name.endswith("done.json") for name in files) == 2
    for file in files:
        path = tmp_path / "runs" / file
        before = path.read_bytes()
        for seed in range(4):
            change(path, random.Random(f"{file} {seed}"))
            try:
                with pytest.raises(EmbcompError) as caught:
                    use_all(tmp_path / "runs")
            finally:
                path.write_bytes(before)
            assert path.name in str(caught.value) or path.parent.name in str(caught.value)
    use_all(tmp_path / "runs")


def use_all(runs):
    """Whatever reads a run: every file at least once."""
    from embcomp.data_pipelines.schema import DatasetInfo
    from embcomp.training.reporting.stage_result import read_stage_result
    from embcomp.training.run_folder import RunFolder
    from embcomp.training.stages.schedule import StageSchedule

    folder = RunFolder(runs / "toy")
    Report.load(folder.path)
    schedule = StageSchedule.of(folder.config(), DatasetInfo.load(folder.config().data.path))
    for index, stage in enumerate(schedule.stages[:-1]):
        assert read_stage_result(folder.stage(index, schedule.names))[0].name == stage.name
    load_model(folder.path)


@pytest.mark.parametrize(
    "file",
    [
        "forms.json",
        "start/model.safetensors",
        "start/model.safetensors.index.json",
        "start/*/00000000.safetensors",
        "done.json",
    ],
)
def test_a_stage_does_not_begin_with_what_was_changed(run, tmp_path, file):
    config, runs = run
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs/toy/report.json").unlink()
    stages = tmp_path / "runs/toy/stages"
    paths = sorted(stages.glob(f"*/{file}"))
    if file != "done.json":
        stage = stages / paths[-1].relative_to(stages).parts[0]
        shutil.rmtree(stage / "checkpoints")
    content = bytearray(paths[-1].read_bytes())
    content[-9] ^= 1
    paths[-1].write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{paths[-1].name} is (missing or )?damaged"):
        train(config, runs=tmp_path / "runs", quiet=True)


def test_a_config_that_was_changed_by_hand_scores_nothing(run, tmp_path):
    _, runs = run
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs/toy/config.yaml"
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged or was changed .* purpose"):
        evaluate(tmp_path / "runs/toy", quiet=True)
    (tmp_path / "runs/toy/checksums.json").unlink()
    evaluate(tmp_path / "runs/toy", quiet=True)


def test_files_that_are_written_again_are_checked_by_themselves(tmp_path):
    path = tmp_path / "progress.json"
    path.write_text(sealed_json({"round": 3, "scores": [0.1]}))
    assert read_sealed_json(path) == {"round": 3, "scores": [0.1]}
    path.write_text(path.read_text().replace("3", "4", 1))
    with pytest.raises(CheckpointError, match="progress.json is damaged .* begins again"):
        read_sealed_json(path)


def test_a_writer_that_is_killed_after_the_checksum_leaves_no_doubt(tmp_path):
    write_checked(tmp_path / "a.json", "old")
    (tmp_path / "a.json").unlink()
    write_checked(tmp_path / "a.json", "new")
    assert read_checked(tmp_path / "a.json") == "new"
    (tmp_path / "b").write_bytes(b"123")
    announce_file(tmp_path / "c", tmp_path / "b")
    with pytest.raises(CheckpointError, match="c is missing"):
        check_file(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "c")
    check_file(tmp_path / "c")
