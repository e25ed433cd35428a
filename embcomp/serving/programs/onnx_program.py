"""`program.onnx`: a serving module for ONNX runtimes, its tables left in the artefact's own files.

The dynamo exporter translates the same program that `program.pt2` holds: gathers and sums, no
EmbeddingBag, whose translation is a loop. Three things are done by hand. Tensors that lie in
`model.safetensors` as they are become external data there, so no table is stored twice and a runtime
maps it. The two halves in front of an int8 or int4 row are decoded by arithmetic, as ONNX has no view of
bytes as another type. And an id out of range ends the run, which the exporter would leave out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import ArtefactError, ConfigError, one_line
from embcomp.io.tensor_files import StoredTensor

if TYPE_CHECKING:
    import onnx_ir

ONNX_FILE = "program.onnx"
OPSET = 18
"""The ONNX operators that a program is made of, unless a caller asks for newer ones."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LACKS = {
    17: "BitwiseAnd, which hashes, packed codes and int4 rows are read with",
    16: "BitwiseAnd and LayerNormalization",
}
_CHECK, _TRACE = "refuses: ", "pkg.torch.onnx.stack_trace"
_EMBEDDED = (1 << 31) - (1 << 20)
"""Bytes of tensors that a file may hold itself: it is a protocol buffer, of less than 2 GiB."""


def why_no_onnx() -> str | None:
    """Why no ONNX program can be made here, or None."""
    for name in _NEEDED:
        try:
            __import__(name)
        except ImportError:
            return f"{name} is not installed: pip install 'embcomp[onnx]'"
    return None


def check_opset(opset: int) -> None:
    """Raise a ConfigError unless programs can be made of that version's operators."""
    import onnx

    newest = int(onnx.defs.onnx_opset_version())
    if not OPSET <= opset <= newest:
        lacks = _LACKS.get(opset, "operators that every method needs") if opset < OPSET else None
        why = f"it lacks {lacks}" if lacks else f"the installed onnx {onnx.__version__} ends there"
        raise ConfigError(f"ONNX opset {opset}: {why}; take {OPSET} to {newest}")


def onnx_model(
    exported: torch.export.ExportedProgram,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    shared: Mapping[str, StoredTensor],
    *,
    opset: int = OPSET,
) -> onnx_ir.Model:
    """Translate a program.

    Args:
        exported: as `export_program` makes it; its graph is changed.
        inputs: an example, in the order of the program's inputs.
        outputs: names of what it returns, in order.
        shared: its tensors that lie in the artefact's files.
        opset: the version of ONNX's operators.

    Raises:
        ConfigError: the opset is not one of those that programs can be made of.
        ArtefactError: ONNX has no operator for something that a method does.
    """
    check_opset(opset)
    guard_outputs(exported)
    sizes = {"ids": {0: "batch"}, "lengths": {0: "batch"}, "dense": {0: "batch"}}
    if "lengths" in inputs:
        sizes["ids"][2] = "bag"
    try:
        with _quietly():
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=outputs,
                custom_translation_table=_translations(),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = one_line(_root(error))
        raise ArtefactError(f"ONNX opset {opset} cannot say what a method does: {reason}") from None
    assert made is not None
    model = made.model
    _name_checks(model)
    _share(model, shared, exported.state_dict)
    _check_operators(model, opset)
    return model


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def guard_outputs(exported: torch.export.ExportedProgram) -> None:
    """Make every output depend on the program's assertions, which translators drop as unused.

    An assertion becomes a look-up in a list of one zero, at 0 where it holds and at 1 where it does not,
    which no runtime answers; what it finds is added to the outputs.

    Args:
        exported: its graph is changed.
    """
    graph = exported.graph_module.graph
    asserts = [node for node in graph.nodes if node.target is torch.ops.aten._assert_async.msg]
    found: list[torch.fx.Node] = []
    for node in asserts:
        condition, message = node.args
        with graph.inserting_before(node):
            ops = torch.ops.aten
            place = _called(graph, ops.bitwise_not.default, condition)
            place = _called(graph, ops._to_copy.default, place, dtype=torch.int64)
            place = _called(graph, ops.reshape.default, place, [1])
            zero = _called(graph, ops.zeros_like.default, place, dtype=torch.float32)
            looked = _called(graph, ops.index_select.default, zero, 0, place)
        looked.meta["stack_trace"] = f"{_CHECK}{message}"  # what the exporter hands on
        found.append(looked)
        graph.erase_node(node)
    if not found:
        return
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        total = found[0]
        for each in found[1:]:
            total = _called(graph, torch.ops.aten.add.Tensor, total, each)
        guarded = tuple(
            _called(graph, torch.ops.aten.add.Tensor, each, total) for each in output.args[0]
        )
    output.args = (guarded,)
    for spec, node in zip(exported.graph_signature.output_specs, guarded):
        spec.arg.name = node.name
    exported.graph_module.recompile()


def _called(graph: torch.fx.Graph, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A call in the graph, with the shape that its value has."""
    made = graph.call_function(target, args, kwargs)
    values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args]
    made.meta["val"] = target(*values, **kwargs)
    return made


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter has no translation for, or none that holds for our types."""
    import onnx_ir
    from onnxscript import opset18 as op

    # A half of high byte h and low byte l is `first[h] + step[h] * l`, exact in float32.
    high_bytes = np.arange(256, dtype=np.uint16) << 8
    first = high_bytes.view(np.float16).astype(np.float32)
    step = (high_bytes + np.uint16(1)).view(np.float16).astype(np.float32)
    odd = ~(np.isfinite(first) & np.isfinite(step))  # infinities and NaN, which no row has
    first[odd] = step[odd] = 0.0
    step -= first

    def halves_of(self: Any, dtype: int) -> Any:
        if self.dtype != onnx_ir.DataType.UINT8:
            raise ArtefactError(
                "it looks at the bits of numbers as those of another type, as int8, int16 and alpt do; "
                "take another form"
            )
        low = op.Cast(op.Slice(self, [0], [1 << 30], [1], [2]), to=1)
        high = op.Cast(op.Slice(self, [1], [1 << 30], [1], [2]), to=6)
        begins = op.Constant(value=onnx_ir.tensor(first))
        steps = op.Constant(value=onnx_ir.tensor(step))
        value = op.Add(op.Gather(begins, high), op.Mul(op.Gather(steps, high), low))
        return op.Cast(value, to=10)

    def shifted(self: Any, other: int) -> Any:
        return by_each(self, op.Constant(value=onnx_ir.tensor(other, dtype=self.dtype)))

    def by_each(self: Any, other: Any) -> Any:
        if self.dtype == onnx_ir.DataType.UINT8:  # the exporter's own answers with int8
            return op.BitShift(self, other, direction="RIGHT")
        # Arithmetic, by a logical shift of the bits with the sign taken off.
        sign = op.Sub(0, op.Cast(op.Less(self, 0), to=7))
        bits = op.Cast(op.BitwiseXor(self, sign), to=13)
        bits = op.BitShift(bits, op.Cast(other, to=13), direction="RIGHT")
        return op.BitwiseXor(op.Cast(bits, to=7), sign)

    aten = torch.ops.aten
    return {
        aten.view.dtype: halves_of,
        aten.__rshift__.Scalar: shifted,
        aten.__rshift__.Tensor: by_each,
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporter and optimizer tell of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


def _name_checks(model: onnx_ir.Model) -> None:
    """Give the look-ups that stand for assertions their messages as names, which runtimes quote."""
    given: Counter[str] = Counter()
    for node in model.graph:
        _, is_check, message = node.metadata_props.get(_TRACE, "").partition(_CHECK)
        if is_check and node.op_type == "Gather":
            given[message] += 1  # several routes may check the same features
            node.name = message if given[message] == 1 else f"{message} ({given[message]})"
        node.metadata_props.clear()  # where in our sources it comes from


def _share(
    model: onnx_ir.Model, shared: Mapping[str, StoredTensor], own: Mapping[str, Tensor]
) -> None:
    """Leave tensors in the artefact's files, those that are what they were.

    The exporter's optimizer folds batch norms into the weights before them, whose names it keeps.
    """
    import onnx_ir

    kept = 0
    for name, value in model.graph.initializers.items():
        held = value.const_value
        assert held is not None
        lies = shared.get(name)
        if lies is None or held.numpy().ctypes.data != own[name].data_ptr():
            kept += held.nbytes
            continue
        assert tuple(held.shape.numpy()) == lies.shape and held.nbytes == lies.nbytes, name
        value.const_value = onnx_ir.ExternalTensor(
            location=lies.file.name,
            offset=lies.start,
            length=lies.nbytes,
            dtype=held.dtype,
            shape=held.shape,
            name=name,
            base_dir=lies.file.parent,
        )
    if kept > _EMBEDDED:
        raise ArtefactError(
            f"an ONNX file holds less than 2 GiB of tensors, and {kept:,} bytes of what the methods "
            "learnt beside their rows would lie in it; nothing was written. Serve it as pt2 or aoti"
        )


def _check_operators(model: onnx_ir.Model, opset: int) -> None:
    import onnx

    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise ArtefactError(
                f"the program would need operators of {node.domain}: {node.op_type}"
            )
        try:
            onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            raise ConfigError(
                f"ONNX opset {opset} lacks {node.op_type}, which a method needs; take a later one"
            ) from None


def write_onnx(model: onnx_ir.Model, folder: Path, words: Mapping[str, str]) -> None:
    """Write `program.onnx` into an artefact's folder.

    Args:
        model: as `onnx_model` makes it.
        folder: the artefact's.
        words: what the file is to say of itself beside.
    """
    import onnx_ir

    model.producer_name = "embcomp"
    model.metadata_props.update(words)
    onnx_ir.save(model, folder / ONNX_FILE)


class OnnxProgram:
    """A program in onnxruntime, on the CPU: takes inputs by name, and returns outputs by name.

    Args:
        path: the file; the artefact's tensors are beside it.

    Raises:
        ArtefactError: onnxruntime refuses the file; in one line.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it logs as an error it raises as well
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common base
            raise ArtefactError(
                f"onnxruntime {onnxruntime.__version__} refuses {path.name}: {one_line(error)}"
            ) from error
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        self._outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it."""
        found = self.session.run(None, {name: own.numpy() for name, own in inputs.items()})
        return {name: torch.from_numpy(own) for name, own in zip(self._outputs, found)}
