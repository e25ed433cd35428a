"""`embcomp export`: a finished run's best weights as an artefact to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.training.export.export import Export


def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder, as runs/name.")],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make; RUN/artefact by default.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The type of stored rows: fp32, fp16, int8 or int4; by table as int8,C3=fp32. "
            "The run's tables.row_types by default.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["safetensors", "pt2", "onnx", "aoti", "tables"],
        typer.Option(
            help="pt2 adds a program that runs where only torch is installed, onnx one for ONNX "
            "runtimes, aoti one compiled for this machine, for Python and C++, tables one whose tables "
            "are held elsewhere."
        ),
    ] = "safetensors",
    dim: Annotated[
        str | None,
        typer.Option(help="Columns of matryoshka tables, as C3=8,C12=4; others stay whole."),
    ] = None,
    rewrite_vocabulary: Annotated[
        bool,
        typer.Option("--rewrite-vocabulary", help="Drop pruned values from the vocabulary."),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes of the embedding tables, as 64MiB or 10%; the run's by default."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where the run's dataset is now, if it moved.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare on, at most.")] = 16_384,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Allowed difference of a probability; by type by default."),
    ] = None,
    max_file_size: Annotated[
        str, typer.Option(help="Bytes of tensors in a file; larger artefacts have several.")
    ] = "4GiB",
    opset: Annotated[
        int | None, typer.Option(help="The version of ONNX's operators; 18 by default.")
    ] = None,
) -> None:
    """Export a run's best weights, checked against the trained model on real rows."""
    from embcomp.collection.table_row_types import RowTypes
    from embcomp.errors import ConfigError
    from embcomp.serving.programs.onnx_program import OPSET
    from embcomp.training.export.export import export_run

    if opset is not None and format != "onnx":
        raise ConfigError(f"--opset is for --format onnx; the format is {format}")

    with stoppable(lambda: "no artefact was made; run it again"):
        found = export_run(
            run,
            out,
            row_type=None if dtype is None else RowTypes.parse(dtype),
            formats=[format],
            dims=_widths(dim),
            rewrite=rewrite_vocabulary,
            budget=budget,
            rows=rows,
            tolerance=tolerance,
            data=data,
            max_file_size=max_file_size,
            opset=OPSET if opset is None else opset,
        )
    print_export(found)


def _widths(text: str | None) -> dict[str, int]:
    from embcomp.errors import ConfigError

    found: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        name, equals, width = part.strip().rpartition("=")
        if not equals or not name or not width.isdigit() or name in found:
            raise ConfigError(
                f"--dim: expected TABLE=COLUMNS, comma, ... as C3=8,C12=4; got {text!r}"
            )
        found[name] = int(width)
    return found


def print_export(found: Export) -> None:
    """Print what was found, one line each."""
    from embcomp.serving.programs.forms import FILES
    from embcomp.tables.budget import format_bytes

    assert found.saved is not None
    assert found.parity is not None
    config, parity = found.saved.config, found.parity
    lines: dict[str, str] = {}
    for role, part in (("tables", config.tables), ("first_order", config.first_order)):
        if part is not None:
            types = "/".join(sorted(set(part.row_types.values())))
            line = f"{format_bytes(part.bytes)} ({part.bytes:,} bytes), rows {types}"
            errors = found.saved.row_error[role].values()
            line += f", off by {max(errors):.2g} at most" if errors else ""
            lines[role.replace("_", " ")] = line
    lines["network"] = format_bytes(config.network_bytes)
    if config.budget is not None:
        lines["budget"] = f"{config.budget:,} bytes, kept"
    lines["parity"] = (
        f"probabilities differ by {parity.max_error:.2g} at most over {parity.compared:,} rows "
        f"of {parity.split} (allowed {parity.tolerance:g})"
    )
    if parity.compared < parity.served.rows:
        lines["rewritten"] = (
            f"{parity.served.rows - parity.compared:,} more rows have values that are dropped or "
            "unseen; all rows count below"
        )
    lines["auc"] = f"{parity.served.auc:.6f}, trained {parity.trained.auc:.6f}"
    lines["log loss"] = f"{parity.served.log_loss:.6f}, trained {parity.trained.log_loss:.6f}"
    for each in found.latencies:
        lines[f"batch {each.batch}"] = (
            f"{each.microseconds:,.0f} us for {each.lookups:,} look-ups, "
            f"{each.nanoseconds_per_look_up:,.0f} ns each"
        )
    for form, error in found.program_errors.items():
        lines["program"] = f"{FILES[form][0]}, differs from the artefact by {error:.2g}"
    size = sum(file.stat().st_size for file in found.saved.path.rglob("*") if file.is_file())
    lines["folder"] = f"{found.saved.path}, {format_bytes(size)} with vocabularies"
    for key, value in lines.items():
        print(f"{key:<12} {value}")
