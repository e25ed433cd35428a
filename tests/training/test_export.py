"""`embcomp export`: from a finished run to an artefact that was compared with the trained model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors
import torch
from typer.testing import CliRunner

from embcomp import load, load_program
from embcomp.cli import app
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.errors import DataError
from embcomp.serving.artefact_folder import header_bytes
from embcomp.serving.exported_program import Program, program_inputs
from embcomp.serving.programs.forms import FILES
from embcomp.training import load_model, train
from embcomp.training.export import TOLERANCES, export_run
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a model with first-order tables, bags and numeric features."""
    folder = tmp_path_factory.mktemp("export")
    config = toy_config(
        write_dataset(folder / "data"),
        "tables.method={name: hash, collisionless: 0}",
        "tables.budget=50%",
        "model.batch_norm=true",
        "data.drop_last=true",
    )
    train(config, runs=folder, quiet=True)
    return folder / "toy"


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def batches(run, size=40):
    info = DatasetInfo.load(run.parent / "data")
    return list(ParquetLoader(info, "test", batch_size=size, shuffle=False, drop_last=False))


def test_a_run_becomes_an_artefact_that_answers_like_it(run, tmp_path):
    result = export(run, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "allowed 1e-05" in result.stdout and "ns each" in result.stdout
    files = {str(f.relative_to(tmp_path / "a")) for f in (tmp_path / "a").rglob("*.*")}
    assert files == {
        "config.json",
        "model.safetensors",
        "dataset.json",
        *(f"vocabulary/C{n}.parquet" for n in (1, 2, 3)),
    }
    config = json.loads((tmp_path / "a/config.json").read_text())
    sizes = header_bytes(tmp_path / "a/model.safetensors")
    assert sizes["tables"] == config["tables"]["bytes"] <= config["budget"]
    assert sizes["first_order"] == config["first_order"]["bytes"]
    assert sizes["network"] == config["network_bytes"]
    assert config["dataset"]["name"] == "toy" and len(config["dataset"]["fingerprint"]) == 64
    with safetensors.safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert all(n.startswith(("tables.", "first_order.", "network.")) for n in file.keys())
    model, serving = load_model(run), load(tmp_path / "a", verify=True)
    assert DatasetInfo.load(tmp_path / "a").categorical_names == serving.feature_names
    with torch.no_grad():
        for batch in batches(run):
            wanted = model(batch.dense, batch.sparse)
            torch.testing.assert_close(
                serving(batch.dense, batch.sparse), wanted, rtol=1e-5, atol=1e-6
            )
            plain = {k: (j.values(), j.offsets()) for k, j in batch.sparse.to_dict().items()}
            torch.testing.assert_close(serving(batch.dense, plain), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"dense values of shape \(1, 2\), got \(1, 0\)"):
        serving(None, {name: torch.tensor([1]) for name in serving.feature_names})


def test_the_default_place_is_in_the_run_and_is_never_overwritten(run):
    assert export(run, "--dtype", "int8").exit_code == 0
    before = (run / "artefact/model.safetensors").read_bytes()
    again = export(run, "--dtype", "int4")
    assert again.exit_code == 1 and "exists and is left as it is" in again.stderr
    assert (run / "artefact/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "100"], "over the budget of 100 bytes; nothing was written"),
        (["--dtype", "int4", "--tolerance", "1e-9"], "a click probability differs by"),
    ],
)
def test_a_failed_export_is_one_message_and_leaves_nothing(run, tmp_path, options, message):
    result = export(run, tmp_path / "a", *options)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_only_finished_runs_are_exported(run, tmp_path):
    result = export(tmp_path / "none")
    assert result.exit_code == 1 and "is not a run folder" in result.stderr
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_text((run / "config.yaml").read_text())
    result = export(half)
    assert result.exit_code == 1 and "is not finished" in result.stderr


def test_pt2_adds_a_program_that_scores_rows_alone(run, tmp_path):
    result = export(run, tmp_path / "a", "--format", "pt2", "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert "program.pt2, differs from the artefact by" in result.stdout
    serving = load(tmp_path / "a")
    batch = batches(run, size=11)[0]
    bags = [batch.sparse[name] for name in serving.feature_names]
    lengths = torch.stack([jagged.lengths() for jagged in bags], dim=1).long()
    ids = torch.zeros(11, 3, 5, dtype=torch.int64)
    for n, jagged in enumerate(bags):
        for row, (start, stop) in enumerate(zip(jagged.offsets(), jagged.offsets()[1:])):
            ids[row, n, : stop - start] = jagged.values()[start:stop]
    wanted = serving(batch.dense, batch.sparse)
    torch.save([{"ids": ids, "lengths": lengths, "dense": batch.dense}, wanted], tmp_path / "b.pt")
    program = (
        "import sys, torch\n"
        "inputs, wanted = torch.load('b.pt')\n"
        "found = torch.export.load('a/program.pt2').module()(inputs)['logits']\n"
        "assert (found - wanted).abs().max() < 1e-6\n"
        "assert not {'torchrec', 'fbgemm_gpu', 'embcomp'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("form", ["onnx", "tables"])
def test_other_programs_score_rows_as_the_artefact(run, tmp_path, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra embcomp[onnx] is not installed")
    result = export(run, tmp_path / "a", "--format", form, "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert f"{FILES[form][0]}, differs from the artefact by" in result.stdout
    serving, program = load(tmp_path / "a"), load_program(tmp_path / "a", form=form)
    batch = batches(run, size=11)[0]
    inputs = program_inputs(
        Program(load(tmp_path / "a", rows="torch"), bags=True), batch.dense, batch.sparse
    )
    wanted = serving(batch.dense, batch.sparse)
    torch.testing.assert_close(program(inputs)["logits"], wanted, rtol=0, atol=1e-5)


def test_an_opset_is_checked_before_anything_is_read(tmp_path):
    result = export(tmp_path / "none", "--opset", "17")
    assert result.exit_code == 1 and "--opset is for --format onnx" in result.stderr
    pytest.importorskip("onnx", reason="the extra embcomp[onnx] is not installed")
    result = export(tmp_path / "none", "--format", "onnx", "--opset", "17")
    assert result.exit_code == 1
    assert "ONNX opset 17: it lacks BitwiseAnd" in " ".join(result.stderr.split())


def test_a_model_of_single_valued_features_takes_a_matrix_of_ids(tmp_path):
    write_toy_dataset(tmp_path / "data", rows=(200, 50, 50))
    config = toy_config(tmp_path / "data", "model={name: lr}")
    train(config, runs=tmp_path, quiet=True)
    result = export(tmp_path / "toy", tmp_path / "a", "--format", "pt2")
    assert result.exit_code == 0, result.output
    described = json.loads((tmp_path / "a/config.json").read_text())
    assert described["program"]["inputs"]["ids"] == "(B, 3) int64: C1, C2, C3"
    assert described["tables"] is None
    ids, dense = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 2)
    found = torch.export.load(tmp_path / "a/program.pt2").module()({"ids": ids, "dense": dense})
    serving = load(tmp_path / "a")
    wanted = serving(dense, {f"C{n + 1}": ids[:, n] for n in range(3)})
    torch.testing.assert_close(found["logits"], wanted, rtol=0, atol=1e-6)


def test_rows_whose_type_a_method_chose_are_compared_as_such(tmp_path):
    """The types of `typed_blocks` are narrower than `--dtype`, which is that of all other rows."""
    data = write_dataset(tmp_path / "data")
    config = toy_config(data, "tables.method=typed_blocks", "tables.budget=40%")
    train(config, runs=tmp_path, quiet=True)
    found = export_run(tmp_path / config.name, tmp_path / "artefact")
    assert 1e-5 < found.parity.max_error <= TOLERANCES["int4"]
