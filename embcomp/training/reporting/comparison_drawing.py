"""Draws a comparison: AUC against serving bytes, a colour for each method."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as plotly
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from embcomp.tables.budget import format_bytes
from embcomp.training.reporting.compared_run import HEADINGS, ComparedRun

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TITLE = "AUC against the bytes of the embedding tables"
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:960px;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.3em .7em;text-align:right;"
    "border-bottom:1px solid #ddd}td:nth-child(-n+3),th:nth-child(-n+3){text-align:left}"
)


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
    runs: Sequence[ComparedRun], cells: Sequence[Sequence[str]], caption: str, path: Path
) -> None:
    """The picture and the table as one page, plotly's script included."""
    figure = plotly.Figure()
    for (method, points), colour in zip(_by_method(runs).items(), _cycled(runs)):
        figure.add_scatter(
            x=[run.serve_bytes for run in points],
            y=[run.auc for run in points],
            mode="markers+text",
            marker={"size": 12, "color": colour},
            name=method,
            text=[html.escape(run.name) for run in points],
            textposition="top center",
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
        legend_title_text="method",
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
    )
    ticks = byte_ticks([run.serve_bytes for run in runs])
    figure.update_xaxes(
        type="log",
        title="serving bytes of the embedding tables",
        tickvals=ticks,
        ticktext=[_round_bytes(size) for size in ticks],
    )
    figure.update_yaxes(title="AUC")
    drawing = figure.to_html(full_html=False, include_plotlyjs=True, div_id="auc-against-bytes")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_TITLE}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{_TITLE}</h1>\n{drawing}\n"
        f"{_table(cells)}<p>{html.escape(caption)}</p></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in cells
    )
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def byte_ticks(sizes: Sequence[int]) -> list[int]:
    """Powers of two around some sizes, few enough to be read."""
    low, high = max(min(sizes), 1).bit_length() - 1, max(*sizes, 1).bit_length()
    every = -(-(high - low) // 8) or 1
    return [2**exponent for exponent in range(low, high + 1, every)]


def _round_bytes(size: int) -> str:
    return format_bytes(size).replace(".0 ", " ")


def _by_method(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    methods: dict[str, list[ComparedRun]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _cycled(runs: Sequence[ComparedRun]) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(runs))]


def _bayes(runs: Sequence[ComparedRun]) -> list[float]:
    return sorted({run.bayes_auc for run in runs if run.bayes_auc is not None})
