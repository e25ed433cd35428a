"""The forms in which an artefact's program can be written, and read back: one call for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.errors import ArtefactError, DataError, ParityError, one_line
from embcomp.serving.artefact_config import (
    PROGRAM_FILE,
    TENSORS_SUFFIX,
    ArtefactConfig,
    ProgramRecord,
)
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.artefact_integrity import check_file
from embcomp.serving.artefact_tensors import TensorReader
from embcomp.serving.exported_program import (
    Program,
    export_program,
    program_inputs,
    write_program,
)
from embcomp.serving.modules import ServingModel
from embcomp.serving.programs.aoti_package import PACKAGE_FILE, AotiPackage, write_package
from embcomp.serving.programs.compiler import why_no_compiler
from embcomp.serving.programs.mapped_tensors import shared_tensors
from embcomp.serving.programs.onnx_program import (
    ONNX_FILE,
    OPSET,
    OnnxProgram,
    check_opset,
    onnx_model,
    why_no_onnx,
    write_onnx,
)
from embcomp.serving.programs.outside_tables import (
    DENSE_FILE,
    LOOKUPS_FILE,
    ROUTE_FILE,
    TABLES_FILE,
    OutsideTables,
    write_outside_tables,
)
from embcomp.serving.programs.program_inputs import check_ids, check_inputs, words_of

Form = Literal["pt2", "onnx", "aoti", "tables"]
FILES: dict[str, tuple[str, ...]] = {
    "pt2": (PROGRAM_FILE,),
    "onnx": (ONNX_FILE,),
    "aoti": (PACKAGE_FILE,),
    "tables": (ROUTE_FILE, TABLES_FILE, DENSE_FILE, LOOKUPS_FILE),
}
"""The files of each form, the one that is opened first."""
TOLERANCE = 1e-5
"""How far a program's probability, or a weight as a share of the largest, may be from the artefact's."""


def check_forms(forms: Sequence[str], opset: int = OPSET) -> None:
    """Raise an ArtefactError or ConfigError for a form that cannot be written here, before any work."""
    unknown = [form for form in forms if form not in FILES]
    if unknown:
        raise ArtefactError(f"programs are written as {', '.join(FILES)}; got {unknown[0]!r}")
    if "onnx" in forms:
        missing = why_no_onnx()
        if missing is not None:
            raise ArtefactError(f"an ONNX program cannot be written: {missing}")
        check_opset(opset)
    if "aoti" in forms:
        missing = why_no_compiler()
        if missing is not None:
            raise ArtefactError(
                f"a package is compiled: {missing}. Nothing was written; --format pt2 needs none"
            )


def write_form(
    form: Form,
    serving: nn.Module,
    folder: Path,
    config: ArtefactConfig,
    *,
    bags: bool,
    opset: int = OPSET,
) -> ArtefactConfig:
    """Write a program beside the artefact's tensors.

    Args:
        form: which.
        serving: the artefact, loaded with `rows="torch"`.
        folder: the artefact's.
        config: its description.
        bags: whether features may have several ids, or none.
        opset: the version of ONNX's operators.

    Returns:
        The description with the program's inputs and outputs.
    """
    check_forms([form], opset)
    program = Program(serving, bags=bags)
    record = program.record()
    if form == "pt2":
        return write_program(program, folder, config)
    if form == "tables":
        write_outside_tables(lambda: Program(serving, bags=bags), folder, config)
        return config.model_copy(update={"program": record})
    shared = shared_tensors(program, folder)
    names, words = list(record.outputs), words_of(program)
    if form == "onnx":
        exported = export_program(program)
        model = onnx_model(exported, program.example(), names, shared, opset=opset)
        write_onnx(model, folder, words)
    else:
        words |= {
            "inputs": " ".join(program.example()),
            "outputs": "\t".join(names),
            "features": str(len(program.feature_names)),
            "dense": str(program.num_dense),
        }
        write_package(program, folder, shared, words)
    return config.model_copy(update={"program": record})


class CheckedProgram(nn.Module):
    """A program of another runtime, which says in one line what it was given wrong.

    Args:
        run: the program.
        record: what it takes.
        words: what its file says of its features.
    """

    def __init__(
        self,
        run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        record: ProgramRecord,
        words: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._run, self._record, self._words = run, record, words

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Look up, or score.

        Args:
            inputs: as the artefact's description says.

        Raises:
            DataError: an input is missing or of another type or shape, or an id is out of range.
        """
        check_inputs(self._record, inputs)
        check_ids(self._words, inputs)
        try:
            return self._run(inputs)
        except Exception as error:  # runtimes have no common base
            raise DataError(f"the program failed: {one_line(error)}") from error


def load_program(path: str | Path, *, form: Form | None = None, verify: bool = True) -> nn.Module:
    """Read an artefact's program.

    Args:
        path: the artefact's folder.
        form: `pt2`, `onnx`, `aoti` or `tables`; the first that the artefact has by default.
        verify: whether to check that the description, the program and the tensors that it maps are
            the ones that were written; every byte is read once for that.

    Returns:
        A module that takes and returns what `program` in `config.json` says.

    Raises:
        ArtefactError: the folder is no artefact, has no such program, or is damaged; or the program
            was compiled for another torch or processor.
    """
    folder = Path(path)
    config = ArtefactConfig.read(folder, verify=verify)
    found = [own for own in FILES if FILES[own][0] in config.files]
    wanted = form if form is not None else next(iter(found), "pt2")
    if wanted not in FILES:
        raise ArtefactError(f"programs are written as {', '.join(FILES)}; got {wanted!r}")
    if wanted not in found or config.program is None:
        raise ArtefactError(
            f"{folder} has no program{'' if form is None else f' as {form}'}; "
            f"`embcomp export --format {wanted}` makes an artefact with one"
        )
    if verify:
        for name in FILES[wanted]:
            check_file(folder, config, name)
        if wanted in ("onnx", "aoti"):
            _check_tensors(folder, config)
    return open_form(wanted, folder, config.program)


def _check_tensors(folder: Path, config: ArtefactConfig) -> None:
    for name in config.files:
        if name.endswith(TENSORS_SUFFIX):
            check_file(folder, config, name)
    with TensorReader(mapped=True) as reader:
        for name, stored in find_tensors(folder).items():
            reader.check(stored, config.tensors.get(name))


def open_form(form: str, folder: Path, record: ProgramRecord) -> nn.Module:
    """A program of an artefact, unchecked.

    Args:
        form: which.
        folder: the artefact's.
        record: what it takes.
    """
    if form == "pt2":
        return torch.export.load(folder / PROGRAM_FILE).module()
    find_tensors(folder)  # they are mapped from there, so they must be whole
    opened: OnnxProgram | OutsideTables | AotiPackage
    if form == "onnx":
        missing = why_no_onnx()
        if missing is not None:
            raise ArtefactError(f"{folder / ONNX_FILE} cannot be run: {missing}")
        opened = OnnxProgram(folder / ONNX_FILE)
    elif form == "tables":
        opened = OutsideTables(folder)
    else:
        opened = AotiPackage(folder)
    return CheckedProgram(opened, record, opened.metadata)


class FormBatch(NamedTuple):
    """Rows to compare on: (B, I) numeric values and the ids."""

    dense: Tensor
    sparse: KeyedJaggedTensor


@torch.no_grad()
def check_form(
    form: Form,
    folder: Path,
    serving: nn.Module,
    batches: Sequence[FormBatch | Batch],
    *,
    bags: bool,
) -> float:
    """The largest difference between a written program's answers and the artefact's.

    Args:
        form: which program.
        folder: the artefact's.
        serving: the artefact, loaded with `rows="torch"`.
        batches: rows to compare on.
        bags: as it was written.

    Returns:
        Of click probabilities; of a collection's, as a share of the largest weight.

    Raises:
        ParityError: it is more than `TOLERANCE`.
    """
    program = Program(serving, bags=bags)
    run = open_form(form, folder, program.record())
    error = 0.0
    for batch in batches:
        found = run(program_inputs(program, batch.dense, batch.sparse))
        if isinstance(serving, ServingModel):
            wanted = {"logits": serving(batch.dense, batch.sparse)}
            pairs = [(found[key].sigmoid(), own.sigmoid(), 1.0) for key, own in wanted.items()]
        else:
            wanted = serving(batch.sparse).to_dict()
            pairs = [
                (found[key], own, float(own.abs().amax()) if own.numel() else 1.0)
                for key, own in wanted.items()
            ]
        for own, right, scale in pairs:
            far = (own - right).abs().max() if right.numel() else torch.zeros(())
            ratio = float(far) / (scale or 1.0)
            error = ratio if not ratio <= error else error
    if not error <= TOLERANCE:
        raise ParityError(
            f"{FILES[form][0]} differs from the artefact by {error:.2g}, more than {TOLERANCE:g}; "
            "nothing was written. Please report this"
        )
    return error
