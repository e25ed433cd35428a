"""A benchmark as one page that needs nothing else: pictures and tables for each dataset and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.graph_objects as plotly

from embcomp.benchmark.benchmark_result import BenchmarkResult, CellResult, GroupResult, Spread
from embcomp.benchmark.significance import LEVEL, PairedDifference
from embcomp.io.html import byte_ticks, escaped, figure_html, marker_of, table, write_page
from embcomp.io.live_console import duration
from embcomp.tables.budget import format_bytes

Measure = Callable[[CellResult], Spread | float | None]

FIGURES: Sequence[tuple[str, str, str, Measure]] = (
    ("auc", "AUC against bytes", "test AUC", lambda cell: cell.auc),
    ("log-loss", "Log loss against bytes", "test log loss", lambda cell: cell.log_loss),
    ("time", "Training time", "seconds of training", lambda cell: cell.training_seconds),
    ("memory", "Peak memory of training", "MiB beyond an idle process", lambda c: _mebibytes(c)),
    ("look-up", "Look-up latency", "microseconds a batch", lambda cell: cell.look_up_microseconds),
)
"""A name, a title, what stands at the axis, and what is drawn against the bytes of the tables."""


def _mebibytes(cell: CellResult) -> float | None:
    return None if cell.memory is None else cell.memory / 2**20


def write_benchmark_page(result: BenchmarkResult, path: Path) -> None:
    """Write the page, plotly's script included."""
    title = title_of(result)
    parts = [f"<h1>{escaped(title)}</h1>", f"<p>{_introduction(result)}</p>"]
    first = True
    for number, group in enumerate(result.groups):
        parts += [f"<h2>{escaped(group.title)}</h2>", f"<p>{_facts(group)}</p>"]
        if warning := group.warning():
            parts.append(f'<p class="warning">{escaped(warning)}</p>')
        for name, heading, axis, measure in FIGURES:
            figure = _figure(group, axis, measure, front=name == "auc")
            if figure is not None:
                parts.append(f"<h3>{heading}</h3>")
                parts.append(figure_html(figure, f"{name}-{number}", first=first))
                first = False
        parts += ["<h3>Quality</h3>", _quality_note(), _quality(group)]
        parts += ["<h3>Bytes and costs</h3>", _bytes_note(), _costs(group)]
        parts += ["<h3>What tuning chose</h3>", _tuned(group)]
    if result.notes:
        notes = "".join(f"<li>{escaped(note)}</li>" for note in result.notes)
        parts.append(f"<h2>Left out, failed or cut short</h2><ul>{notes}</ul>")
    write_page(path, title, parts)


def title_of(result: BenchmarkResult) -> str:
    """Which recipe, with which models, on which data."""
    recipes = dict.fromkeys(Path(group.recipe).stem for group in result.groups if group.recipe)
    groups = ", ".join(group.title for group in result.groups) or "no finished run"
    return f"Methods compared: {groups}" + (f" ({', '.join(recipes)})" if recipes else "")


def _introduction(result: BenchmarkResult) -> str:
    by = {"auc": "AUC", "log_loss": "log loss"}[result.quality]
    return (
        f"Learning rates of rows and network, and settings that matter, were tuned for each method at "
        f"each budget by validation {by}, with {result.trials} trials for each. The best was then "
        f"trained on up to {result.seeds} seeds, the same for all, and each run read the test split once. "
        f"Trainings took {duration(3600 * result.hours)}, added up."
    )


def _facts(group: GroupResult) -> str:
    return (
        f"Full tables take {format_bytes(group.full_cut)} for the vocabulary as it was prepared, "
        f"{format_bytes(group.full_uncut)} with a row for each value of the training split. The test "
        f"split has {group.positives:,} positives and {group.negatives:,} negatives, so one AUC has a "
        f"standard error of {group.standard_error:.4f} over rows (Hanley and McNeil); what methods "
        "have in common of it cancels in the paired comparisons below."
    )


def _figure(
    group: GroupResult, axis: str, measure: Measure, *, front: bool
) -> plotly.Figure | None:
    """What is measured against the bytes of the tables; None where nothing is known."""
    figure = plotly.Figure()
    sizes: list[int] = []
    drawn: list[tuple[float, float]] = []
    for place, method in enumerate(dict.fromkeys(cell.method for cell in group.cells)):
        points = [
            (cell, value)
            for cell in group.cells
            if cell.method == method and (value := measure(cell)) is not None
        ]
        points.sort(key=lambda point: point[0].tables)
        if not points:
            continue
        colour, symbol = marker_of(place)
        means = [value.mean if isinstance(value, Spread) else value for _, value in points]
        spread = [value.deviation if isinstance(value, Spread) else 0.0 for _, value in points]
        sizes += [max(1, round(cell.tables)) for cell, _ in points]
        drawn += [(cell.tables, mean) for (cell, _), mean in zip(points, means)]
        figure.add_scatter(
            x=[cell.tables for cell, _ in points],
            y=means,
            error_y={"type": "data", "array": spread, "visible": any(spread), "thickness": 1.2},
            mode="lines+markers",
            line={"width": 1, "color": colour},
            marker={"size": 9, "color": colour, "symbol": symbol},
            name=escaped(method),
            text=[_hover(cell) for cell, _ in points],
            hovertemplate="%{text}<br>%{y:.6g}<extra></extra>",
        )
    if not drawn:
        return None
    if front:
        _draw_front(figure, drawn)
    ticks = byte_ticks(sizes)
    figure.update_xaxes(
        type="log",
        title="served bytes of the tables",
        tickvals=ticks,
        ticktext=[format_bytes(tick).replace(".0 ", " ") for tick in ticks],
    )
    figure.update_yaxes(title=axis)
    figure.update_layout(
        template="plotly_white", height=440, margin={"l": 60, "r": 30, "t": 20, "b": 60}
    )
    return figure


def _draw_front(figure: plotly.Figure, points: Sequence[tuple[float, float]]) -> None:
    """A step line through what nothing with fewer bytes beats."""
    best: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((size, value))
    figure.add_scatter(
        x=[size for size, _ in best],
        y=[value for _, value in best],
        mode="lines",
        line={"shape": "hv", "width": 6, "color": "rgba(120,120,120,.25)"},
        marker={"color": "#bbbbbb"},
        name="front: the best in so many bytes",
        hoverinfo="skip",
    )


def _hover(cell: CellResult) -> str:
    return f"{escaped(cell.label)}, {format_bytes(round(cell.tables))}, {cell.seeds} seed(s)"


def _quality_note() -> str:
    return (
        '<p class="note">Mean and standard deviation over seeds. Against full and hashed tables: the '
        "mean difference of AUC on the same rows and seeds, and how often a bootstrap of both shows no "
        f"advantage (p, one-sided); bold where the method is better at p &lt; {LEVEL:g}. Shares are of the "
        "full tables of the vocabulary as prepared, and of the uncut one.</p>"
    )


def _quality(group: GroupResult) -> str:
    references = list(dict.fromkeys(name for cell in group.cells for name in cell.against))
    head = ["method", "budget", "AUC", "log loss", "seeds"]
    head += [f"AUC against {name}" for name in references]
    rows = [
        [
            *_names(cell),
            shown_spread(cell.auc),
            shown_spread(cell.log_loss),
            str(cell.seeds),
            *(_compared(cell.against.get(name)) for name in references),
            f"{round(cell.tables):,}",
            *_shares(cell),
        ]
        for cell in group.cells
    ]
    return table([*head, "bytes of tables", "of cut", "of uncut"], rows, left=2)


def _names(cell: CellResult) -> list[str]:
    return [escaped(cell.method), escaped(cell.budget or "")]


def _shares(cell: CellResult) -> list[str]:
    return [f"{cell.share_cut:.1%}", f"{cell.share_uncut:.1%}"]


def shown_spread(spread: Spread | None) -> str:
    """A mean and its deviation, for people."""
    return "" if spread is None else f"{spread.mean:.5f} ± {spread.deviation:.5f}"


def _compared(compared: PairedDifference | None) -> str:
    if compared is None:
        return ""
    text = f"{compared.difference:+.4f}, p {compared.p:.3f}"
    return f"<strong>{text}</strong>" if compared.is_better else text


def _bytes_note() -> str:
    return (
        '<p class="note">All that is served: rows, the codes, maps and masks beside them (blank where '
        "training finds how many), first-order weights and the network. Memory is the peak of a "
        "training's process beyond what it held before it began.</p>"
    )


def _costs(group: GroupResult) -> str:
    head = ["method", "budget", "bytes of tables", "codes and maps", "first order", "network"]
    head += ["all", "of cut", "of uncut", "training", "peak memory", "look-up"]
    rows = []
    for cell in group.cells:
        beside = "" if cell.beside_rows is None else f"{cell.beside_rows:,}"
        latency = cell.look_up_microseconds
        whole = round(cell.tables) + cell.first_order + cell.dense
        rows.append(
            [
                *_names(cell),
                f"{round(cell.tables):,}",
                beside,
                f"{cell.first_order:,}",
                f"{cell.dense:,}",
                f"{whole:,}",
                *_shares(cell),
                f"{cell.training_seconds:,.1f} s",
                "" if cell.memory is None else format_bytes(round(cell.memory)),
                "" if latency is None else f"{latency:,.0f} µs",
            ]
        )
    return table(head, rows, left=2)


def _tuned(group: GroupResult) -> str:
    head = ["method", "budget", "settings", "rate of rows", "rate of network", "trials"]
    rows = [
        [
            *_names(cell),
            escaped(", ".join(f"{key}={value}" for key, value in cell.settings.items())),
            f"{cell.row_learning_rate:g}",
            f"{cell.dense_learning_rate:g}",
            str(cell.trials),
            *_shares(cell),
        ]
        for cell in group.cells
    ]
    return table([*head, "of cut", "of uncut"], rows, left=3)
