"""`program.onnx` answers as the artefact in onnxruntime, and reads its tables from the artefact's file."""

from __future__ import annotations

import collections

import pytest
import torch

from embcomp import load_program
from embcomp.errors import ArtefactError, ConfigError, DataError, ParityError
from embcomp.serving.artefact_integrity import with_checksums
from embcomp.serving.exported_program import Program, program_inputs
from embcomp.serving.programs import forms, onnx_program
from embcomp.serving.programs.forms import check_form, write_form
from embcomp.serving.programs.onnx_program import check_opset
from tests.helpers.program_cases import ANY_ID, METHODS, batches, saved

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx", reason="the extra embcomp[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra embcomp[onnx] is not installed")


def described(case, config):
    """Give the artefact the description that belongs to what was added to it."""
    text = with_checksums(config, case.folder, config.tensors).to_json()
    (case.folder / "config.json").write_text(text)


SOME = ("full", "hash", "kept", "mgqe")
MORE = ("low_dim", "qr", "qr_concat", "unified")
OTHERS = ("blocks", "coded", "coded_5_bits", "low_rank", "robe", "sparse")
CASES = [
    pytest.param((SOME, "mixed"), id="some"),
    *(
        pytest.param((methods, row_type), id=f"{methods[0]}-{row_type}", marks=pytest.mark.long)
        for row_type in ("mixed", "int4")
        for methods in (SOME, MORE, OTHERS)
        if (methods, row_type) != (SOME, "mixed")
    ),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A program of four methods, each in a row type of its own, or all in one."""
    methods, row_type = request.param
    made = saved(tmp_path_factory.mktemp("onnx") / "a", methods, row_type)
    described(made, write_form("onnx", made.serving, made.folder, made.config, bags=True))
    return made


def test_every_method_is_in_a_case():
    assert sorted((*SOME, *MORE, *OTHERS)) == sorted(METHODS)


def test_every_method_answers_as_the_artefact(case):
    error = check_form("onnx", case.folder, case.serving, batches(case.tables), bags=True)
    assert error < 1e-6


def test_gathers_and_sums_alone_and_the_tables_stay_in_the_artefacts_file(case):
    model = onnx.load(case.folder / "program.onnx", load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    used = collections.Counter(node.op_type for node in model.graph.node)
    assert not {"Loop", "Scan", "If", "EmbeddingBag"} & set(used) and used["Gather"] > 10
    lies = {tensor.name for tensor in model.graph.initializer if tensor.data_location == 1}
    assert {name for name in lies if "stored_" in name} and all(
        {entry.key: entry.value for entry in tensor.external_data}["location"]
        == "model.safetensors"
        for tensor in model.graph.initializer
        if tensor.data_location == 1
    )
    inside = [tensor for tensor in model.graph.initializer if tensor.data_location == 0]
    assert max(len(tensor.raw_data) for tensor in inside) <= 1024
    rows = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds = {kind for name, kind in rows.items() if "stored_" in name}
    quantised = {"int8", "int4"} & set(case.config.tables.row_types.values())
    assert (onnx.TensorProto.UINT8 in kinds) == bool(quantised)


def quiet():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_an_id_out_of_range_ends_the_run_where_the_method_refuses_it(case, bad):
    program = load_program(case.folder, form="onnx")
    session = onnxruntime.InferenceSession(case.folder / "program.onnx", quiet())
    batch = batches(case.tables)[-1]
    inputs = program_inputs(Program(case.serving, bags=True), batch.dense, batch.sparse)
    for n, method in enumerate(table.name for table in case.tables):
        ids = inputs["ids"].clone()
        ids[0, n, 0] = bad
        if method in ANY_ID:
            program({**inputs, "ids": ids})
            continue
        with pytest.raises(DataError, match=rf"feature 'f_{method}': id {bad} is not in \[0, "):
            program({**inputs, "ids": ids})
        with pytest.raises(Exception, match="out of data bounds"):  # its own errors have no base
            session.run(None, {"ids": ids.numpy(), "lengths": inputs["lengths"].numpy()})


def test_wrong_inputs_are_one_line(case):
    program = load_program(case.folder)
    example = Program(case.serving, bags=True).example()
    for change, message in (
        ({"ids": example["ids"].int()}, "takes ids as .* int64; it was given .* int32"),
        ({"ids": example["ids"][:, 1:]}, "takes ids as"),
        ({"lengths": example["lengths"][1:]}, "differ in their batch size: ids 3, lengths 2"),
        ({"more": example["ids"]}, "takes ids, lengths; it was given ids, lengths, more"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            program({**example, **change})
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="takes ids, lengths; it was given ids"):
        program({"ids": example["ids"]})


def test_a_program_that_answers_otherwise_is_refused(case, monkeypatch):
    run = forms.open_form("onnx", case.folder, Program(case.serving, bags=True).record())
    wrong = torch.nn.Module()
    wrong.forward = lambda inputs: {key: own + 1e-3 for key, own in run(inputs).items()}
    monkeypatch.setattr(forms, "open_form", lambda *_: wrong)
    with pytest.raises(
        ParityError, match=r"program.onnx differs from the artefact by .* nothing was"
    ):
        check_form("onnx", case.folder, case.serving, batches(case.tables)[:1], bags=True)


def test_a_damaged_or_missing_program_is_refused(case, tmp_path):
    with pytest.raises(
        ArtefactError, match="has no program as aoti; `embcomp export --format aoti`"
    ):
        load_program(case.folder, form="aoti")
    path = case.folder / "program.onnx"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1])
        with pytest.raises(ArtefactError, match="program.onnx is damaged or was changed"):
            load_program(case.folder)
        with pytest.raises(ArtefactError, match="onnxruntime .* refuses program.onnx"):
            load_program(case.folder, verify=False)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("opset", "why"), [(17, "it lacks BitwiseAnd"), (99, "the installed onnx .* ends there")]
)
def test_an_opset_without_the_operators_is_refused(opset, why):
    with pytest.raises(ConfigError, match=rf"ONNX opset {opset}: {why}.*; take 18 to \d+$"):
        check_opset(opset)


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(onnx_program, "_NEEDED", ("a_package_that_nobody_has",))
    with pytest.raises(ArtefactError, match=r"is not installed: pip install 'embcomp\[onnx\]'"):
        forms.check_forms(["onnx"])
    with pytest.raises(ArtefactError, match="programs are written as pt2, onnx, aoti, tables; got"):
        forms.check_forms(["tflite"])


@pytest.mark.parametrize("row_type", ["fp32", pytest.param("fp16", marks=pytest.mark.long)])
def test_single_valued_features_take_a_matrix_of_ids(row_type, tmp_path):
    case = saved(tmp_path / "a", ("full", "hash", "kept", "qr"), row_type=row_type)
    write_form("onnx", case.serving, case.folder, case.config, bags=False)
    every = batches(case.tables)[:1]
    assert check_form("onnx", case.folder, case.serving, every, bags=False) < 1e-6
