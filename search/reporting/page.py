"""A search as one page that needs nothing else: the front, the choices, what they cost to find."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import plotly.graph_objects as plotly

from embcomp.io.html import (
    BLUE,
    GREY,
    ORANGE,
    byte_ticks,
    escaped,
    figure_html,
    table,
    write_page,
)
from embcomp.search.reporting.page_correlation import correlation_note, draw_correlation
from embcomp.search.reporting.results import CandidateResult, PointResult, SearchResult
from embcomp.tables.budget import format_bytes

_NAMES = {"auc": "AUC", "gauc": "grouped AUC", "log_loss": "log loss"}
_SIDES = ("top center", "bottom center", "middle right", "middle left")
_MOST_CANDIDATES = 200  # rows of the table of candidates


def write_search_page(result: SearchResult, path: Path) -> None:
    """Write the page, plotly's script included."""
    metric = _NAMES[result.objectives[0]]
    parts = [
        f"<h1>{escaped(result.name)}</h1>",
        f"<p>{_introduction(result)}</p>",
        _summary(result),
        f"<h2>{metric} against bytes</h2>",
        figure_html(_front(result), "front", first=True),
    ]
    if result.points:
        parts += [
            "<h2>What each table got</h2>",
            _heat_note(),
            figure_html(_heat_map(result), "choices"),
        ]
    if any(result.importance.values()):
        parts += ["<h2>Which choices matter</h2>", _importance_note()]
        parts.append(figure_html(_importance(result), "importance"))
    if result.correlation is not None:
        parts += ["<h2>How well the supernet ranks</h2>", correlation_note(result)]
        parts.append(figure_html(draw_correlation(result), "correlation"))
    parts += ["<h2>What the search cost</h2>", _cost(result)]
    parts += ["<h2>Candidates</h2>", _candidates(result)]
    if result.notes:
        dropped = "".join(f"<li>{escaped(note)}</li>" for note in result.notes)
        parts.append(f"<h2>Dropped choices</h2><ul>{dropped}</ul>")
    write_page(path, result.name, parts)


def _introduction(result: SearchResult) -> str:
    share = result.budget / result.full_bytes
    return (
        f"{escaped(result.model)} on {escaped(result.dataset)}, recipe {escaped(result.recipe)}; budget "
        f"{result.budget:,} bytes ({format_bytes(result.budget)}, {share:.1%} of the full tables). "
        f"Candidates came from {escaped(result.sampler)}, out of {_big(result.space_size)} between "
        f"{format_bytes(result.reachable[0])} and {format_bytes(result.reachable[1])}; each was "
        f"{_scored_by(result)}. Test data took no part in the search."
    )


def _scored_by(result: SearchResult) -> str:
    how = "scored after" if result.evaluator == "supernet" else "trained for"
    return f"{how} {escaped(result.fidelity)}"


def _summary(result: SearchResult) -> str:
    if not result.points:
        return "<p>No candidate was retrained in full.</p>"
    metric = _NAMES[result.objectives[0]]
    head = ("recipe", "bytes", f"{metric} in the search", f"{result.split} {metric} in full")
    rows = []
    for point, cells in zip(result.points, result.summary()):
        name = f'<a href="{escaped(point.recipe)}">{escaped(cells[0])}</a>'
        proposed = f"candidate {point.number} ({escaped(point.kind)})"
        rows.append([name, *map(escaped, cells[1:4]), str(len(point.runs)), proposed])
    return table([*head, "runs", "was"], rows)


def _front(result: SearchResult) -> plotly.Figure:
    metric = result.objectives[0]
    figure = plotly.Figure()
    done = [c for c in result.candidates if c.state == "complete"]
    on_front = set(result.front)
    for name, group, colour, size in (
        ("candidates", [c for c in done if c.number not in on_front], GREY, 7),
        ("front of the candidates", [c for c in done if c.number in on_front], BLUE, 10),
    ):
        group = sorted(group, key=lambda c: c.serve_bytes)
        figure.add_scatter(
            x=[c.serve_bytes for c in group],
            y=[c.values[metric] for c in group],
            mode="lines+markers" if colour == BLUE else "markers",
            line={"shape": "hv", "width": 1},
            marker={"size": size, "color": colour},
            name=f"{name} ({'supernet' if result.evaluator == 'supernet' else 'validation, short training'})",
            text=[_hover(c) for c in group],
            hovertemplate="%{text}<br>%{y:.6f}<extra></extra>",
        )
    retrained = [p for p in result.points if p.metrics(metric, result.split)]
    if retrained:
        values = [p.metrics(metric, result.split) for p in retrained]
        figure.add_scatter(
            x=[p.serve_bytes for p in retrained],
            y=[statistics.mean(v) for v in values],
            error_y={
                "type": "data",
                "array": [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
                "thickness": 1.5,
            },
            mode="markers+text",
            marker={"size": 11, "color": ORANGE, "symbol": "diamond"},
            text=[_short_name(result, p) for p in retrained],
            textposition=[_SIDES[i % len(_SIDES)] for i in range(len(retrained))],
            name=f"retrained in full ({result.split}, mean and deviation over seeds)",
            hovertemplate="%{text}<br>%{y:.6f}<extra></extra>",
        )
    figure.add_vline(x=result.budget, line_dash="dot", line_color="#666", annotation_text="budget")
    figure.update_xaxes(
        title="serving bytes of the embedding tables",
        **_bytes_axis([*(c.serve_bytes for c in done), result.budget]),
    )
    figure.update_yaxes(title=_NAMES[metric])
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    )
    return figure


def _heat_map(result: SearchResult) -> plotly.Figure:
    units = sorted(result.rows, key=lambda name: (result.rows[name], name))
    columns = [_short_name(result, point) for point in result.points]
    shares = [[point.share[unit] for point in result.points] for unit in units]
    labels = [[point.options[unit] for point in result.points] for unit in units]
    figure = plotly.Figure(
        plotly.Heatmap(
            x=columns,
            y=[f"{unit}  ({result.rows[unit]:,} rows)" for unit in units],
            z=[[math.log2(max(share, 1e-9)) for share in row] for row in shares],
            text=labels,
            customdata=shares,
            texttemplate="%{text}",
            textfont={"size": 11},
            hovertemplate="%{y}, %{x}<br>%{text}: %{customdata:.2%} of its bytes<extra></extra>",
            colorscale="Blues",
            zmin=min(math.log2(max(share, 1e-9)) for row in shares for share in row) - 0.01,
            zmax=0,
            colorbar=_share_bar(shares),
            xgap=2,
            ygap=1,
        )
    )
    figure.update_layout(
        template="plotly_white",
        height=120 + 24 * len(units),
        margin={"l": 20, "r": 20, "t": 40, "b": 20},
    )
    figure.update_xaxes(side="top", type="category")
    figure.update_yaxes(automargin=True, type="category")
    return figure


def _share_bar(shares: list[list[float]]) -> dict[str, object]:
    least = min(share for row in shares for share in row)
    ticks = range(max(-30, math.floor(math.log2(max(least, 1e-9)))), 1)
    shown = list(ticks)[:: -max(1, len(ticks) // 6)]
    return {
        "title": "share of full bytes",
        "tickvals": shown,
        "ticktext": [f"{2.0**tick:.3%}" if tick < -6 else f"{2.0**tick:.1%}" for tick in shown],
    }


def _importance(result: SearchResult) -> plotly.Figure:
    items = [(name, share) for name, share in result.importance.items() if share > 0][:40][::-1]
    figure = plotly.Figure(
        plotly.Bar(
            x=[share for _, share in items],
            y=[f"{name}  ({result.rows[name]:,} rows)" for name, _ in items],
            orientation="h",
            marker={"color": BLUE},
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    figure.update_layout(
        template="plotly_white",
        height=90 + 22 * len(items),
        margin={"l": 20, "r": 20, "t": 10, "b": 50},
    )
    figure.update_xaxes(
        tickformat=".0%", title="share of the metric's variance", rangemode="tozero"
    )
    figure.update_yaxes(automargin=True, type="category")
    return figure


def _cost(result: SearchResult) -> str:
    cost = result.cost
    stopped = sum(1 for c in result.candidates if c.state.startswith("stopped"))
    failed = sum(1 for c in result.candidates if c.state not in ("complete",)) - stopped
    return table(
        ["", "trainings", "in full trainings", "hours"],
        [
            [
                f"search ({stopped} stopped early, {failed} failed)",
                f"{cost.trainings:,}",
                f"{cost.full_trainings:.2f}",
                f"{cost.hours:.2f}",
            ],
            *_prepared(result),
            ["retraining of chosen points", f"{cost.finals:,}", "", f"{cost.finals_hours:.2f}"],
            *_ranked(result),
        ],
    )


def _prepared(result: SearchResult) -> list[list[str]]:
    cost = result.cost
    if not cost.prepared_trainings:
        return []
    return [["supernet", "1", f"{cost.prepared_trainings:.2f}", f"{cost.prepared_hours:.2f}"]]


def _ranked(result: SearchResult) -> list[list[str]]:
    ranked = result.correlation
    if ranked is None:
        return []
    cells = [f"{ranked.trainings:,}", f"{ranked.full_trainings:.2f}", f"{ranked.hours:.2f}"]
    return [["retraining of candidates to rank", *cells]]


def _candidates(result: SearchResult) -> str:
    metric = result.objectives[0]
    more = metric != "log_loss"
    worst = -math.inf if more else math.inf
    ranked = sorted(
        result.candidates,
        key=lambda c: (-1 if more else 1) * c.values.get(metric, worst),
    )[:_MOST_CANDIDATES]
    head = ["candidate (proposed as)", "state", *result.objectives, "serving bytes", "seconds"]
    rows = [
        [
            f"{c.number} ({escaped(c.kind)})",
            escaped(c.state) + (f": {escaped(c.message)}" if c.message else ""),
            *(f"{c.values[o]:,.6g}" if o in c.values else "" for o in result.objectives),
            f"{c.serve_bytes:,}",
            f"{c.seconds:.0f}",
        ]
        for c in ranked
    ]
    return table(head, rows)


def _heat_note() -> str:
    return (
        '<p class="note">A row for each table, the one with most rows on top; the darker, the '
        "larger its share of its own full bytes.</p>"
    )


def _importance_note() -> str:
    return (
        '<p class="note">How much of the difference between candidates lies between the options of '
        "one table, freed of chance (epsilon squared). Tables share a budget, so shares overlap.</p>"
    )


def _hover(candidate: CandidateResult) -> str:
    size = format_bytes(candidate.serve_bytes)
    return f"candidate {candidate.number} ({escaped(candidate.kind)}), {size}"


def _short_name(result: SearchResult, point: PointResult) -> str:
    short = point.name.removeprefix(f"{result.name}_")
    return "uniform" if point.baseline else f"point {short}"


def _bytes_axis(sizes: list[int]) -> dict[str, object]:
    """Logarithmic over a wide range; linear where all lie close to the budget."""
    low, high = min(sizes), max(sizes)
    if high >= 8 * low:
        ticks = byte_ticks(sizes)
        room = max(0.03, math.log10(high / low) * 0.06)
        ends = [math.log10(low) - room, math.log10(high) + room]
        return _axis("log", ticks, ends)
    room = max(high - low, high // 100, 1) // 8 + 1
    step = max(1, (high - low) // 5)
    ticks = list(range(low, high + 1, step))
    return _axis("linear", ticks, [low - room, high + room])


def _axis(kind: str, ticks: list[int], ends: list[float] | list[int]) -> dict[str, object]:
    close = kind == "linear" and ticks[-1] < 1.2 * ticks[0]
    texts = [f"{tick:,}" if close else format_bytes(tick) for tick in ticks]
    return {"type": kind, "tickvals": ticks, "ticktext": texts, "range": ends}


def _big(number: int) -> str:
    return f"{number:,}" if number < 10**9 else f"{number:.1e}"
