"""Draws a comparison: AUC against serving bytes, a colour for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as plotly
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from embcomp.io.html import (
    COLOURS,
    byte_ticks,
    escaped,
    figure_html,
    marker_of,
    table,
    write_page,
)
from embcomp.tables.budget import format_bytes
from embcomp.training.reporting.compared_run import ComparedRun

_TITLE = "AUC against the bytes of the embedding tables"


def write_png(runs: Sequence[ComparedRun], caption: str, path: Path) -> None:
    """The picture as PNG."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (method, points), colour in zip(_by_method(runs).items(), _cycled(runs)):
        sizes = [run.serve_bytes for run in points]
        axes.scatter(sizes, [run.auc for run in points], s=60, color=colour, label=method, zorder=3)
        for run in points:
            place = (run.serve_bytes, run.auc)
            axes.annotate(run.name, place, xytext=(7, 4), textcoords="offset points", fontsize=9)
    for value in _bayes(runs):
        axes.axhline(value, color="#888", linestyle="--", linewidth=1)
        axes.annotate(
            f"best possible {value:.4f}",
            (0.01, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
            color="#666",
        )
    axes.set_xscale("log", base=2)
    axes.margins(x=0.15, y=0.12)
    ticks = byte_ticks([run.serve_bytes for run in runs])
    axes.set_xticks(ticks, map(_round_bytes, ticks))
    axes.set_xlabel("serving bytes of the embedding tables")
    axes.set_ylabel("AUC")
    axes.set_title(f"{_TITLE}\n{caption}", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(title="method", frameon=False)
    # No date and no version inside: the same runs draw the same bytes.
    figure.savefig(path, metadata={"Software": None})


def write_html(
    runs: Sequence[ComparedRun], lines: Sequence[Sequence[str]], caption: str, path: Path
) -> None:
    """The picture and the table as one page, plotly's script included.

    Args:
        runs: what is drawn.
        lines: of the table, headings first.
        caption: where the metrics come from.
        path: the page.
    """
    figure = plotly.Figure()
    for place, (method, points) in enumerate(_by_method(runs).items()):
        colour, symbol = marker_of(place)
        figure.add_scatter(
            x=[run.serve_bytes for run in points],
            y=[run.auc for run in points],
            mode="markers",
            marker={"size": 12, "color": colour, "symbol": symbol},
            name=escaped(method),
            text=[escaped(run.name) for run in points],
            customdata=[
                (format_bytes(run.serve_bytes), run.compression, run.log_loss, run.model)
                for run in points
            ],
            hovertemplate="%{text} (%{customdata[3]})<br>AUC %{y:.6f}, log loss "
            "%{customdata[2]:.6f}<br>%{customdata[0]}, %{customdata[1]:.1f}x smaller"
            "<extra></extra>",
        )
    for value in _bayes(runs):
        figure.add_hline(
            y=value,
            line_dash="dash",
            line_color="#888",
            annotation_text=f"best possible {value:.4f}",
        )
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"l": 60, "r": 30, "t": 20, "b": 60},
    )
    ticks = byte_ticks([run.serve_bytes for run in runs])
    figure.update_xaxes(
        type="log",
        title="serving bytes of the tables",
        tickvals=ticks,
        ticktext=[_round_bytes(size) for size in ticks],
    )
    figure.update_yaxes(title="AUC")
    title = title_of(runs)
    parts = [
        f"<h1>{escaped(title)}</h1>",
        figure_html(figure, "auc-against-bytes", first=True),
        table(lines[0], [[escaped(cell) for cell in line] for line in lines[1:]], left=3),
        f"<p>{escaped(caption)}</p>",
    ]
    write_page(path, title, parts)


def title_of(runs: Sequence[ComparedRun]) -> str:
    """Which models on which data are compared, for people."""
    models = dict.fromkeys(run.model for run in runs)
    datasets = dict.fromkeys(run.dataset for run in runs)
    return f"{', '.join(models)} on {', '.join(datasets)}: {_TITLE}"


def _round_bytes(size: int) -> str:
    return format_bytes(size).replace(".0 ", " ")


def _by_method(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    methods: dict[str, list[ComparedRun]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _cycled(runs: Sequence[ComparedRun]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]


def _bayes(runs: Sequence[ComparedRun]) -> list[float]:
    return sorted({run.bayes_auc for run in runs if run.bayes_auc is not None})
