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
    tone,
    write_page,
)
from embcomp.search.reporting.page_correlation import correlation_note, draw_correlation
from embcomp.search.reporting.results import CandidateResult, PointResult, SearchResult
from embcomp.tables.budget import format_bytes

_NAMES = {"auc": "AUC", "gauc": "grouped AUC", "log_loss": "log loss"}
_SIDES = ("top center", "bottom center", "middle right", "middle left")
_MOST_CANDIDATES = 200  # rows of the table of candidates
_LEAST_SHARE = 1e-9


def write_search_page(result: SearchResult, path: Path) -> None:
    """Write the page, plotly's script included."""
    metric, title = _NAMES[result.objectives[0]], title_of(result)
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f"<p>{_introduction(result)}</p>",
        _summary(result),
        f"<h2>{metric} against bytes</h2>",
        figure_html(_front(result), "front", first=True),
    ]
    if result.points:
        parts += ["<h2>What each table got</h2>", _choices_note(), _choices(result)]
    if any(result.importance.values()):
        parts += ["<h2>Which choices matter</h2>", _importance_note(), _importance(result)]
    if result.correlation is not None:
        parts += ["<h2>How well the supernet ranks</h2>", correlation_note(result)]
        parts.append(figure_html(draw_correlation(result), "correlation"))
    parts += ["<h2>What the search cost</h2>", _cost(result)]
    parts += ["<h2>Candidates</h2>", _candidates(result)]
    if result.notes:
        dropped = "".join(f"<li>{escaped(note)}</li>" for note in result.notes)
        parts.append(f"<h2>Dropped choices</h2><ul>{dropped}</ul>")
    write_page(path, title, parts)


def title_of(result: SearchResult) -> str:
    """What was searched on which data, for people; a search's own name says neither."""
    recipe = Path(result.recipe).stem
    return f"{recipe} on {result.dataset}: tables in {format_bytes(result.budget)}"


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
    figure.add_vline(
        x=result.budget,
        line_dash="dot",
        line_color="#666",
        annotation={"text": "budget", "xanchor": "right"},
    )
    figure.update_xaxes(
        title="serving bytes of the tables",
        **_bytes_axis([*(c.serve_bytes for c in done), result.budget]),
    )
    figure.update_yaxes(title=_NAMES[metric])
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"l": 60, "r": 30, "t": 20, "b": 60},
    )
    return figure


def _choices(result: SearchResult) -> str:
    """A row for each unit of tables, most rows first: what each point chose, and a tone for its bytes."""
    units = sorted(result.rows, key=lambda name: (-result.rows[name], name))
    logs = [math.log2(max(p.share[u], _LEAST_SHARE)) for p in result.points for u in units]
    low, high = min(logs), max(0.0, *logs)
    rows = [
        [
            escaped(unit),
            f"{result.rows[unit]:,}",
            *(_choice(point, unit, low, high) for point in result.points),
        ]
        for unit in units
    ]
    return table(["tables", "rows", *(_short_name(result, p) for p in result.points)], rows)


def _choice(point: PointResult, unit: str, low: float, high: float) -> str:
    share = point.share[unit]
    at = (math.log2(max(share, _LEAST_SHARE)) - low) / (high - low) if high > low else 1.0
    colour, _ = tone(at)
    size = f"{share:.1%}" if share >= 0.01 else f"{share:.3%}"
    return (
        f'<i class="tone" style="background:{colour}"></i>{escaped(point.options[unit])} ({size})'
    )


def _importance(result: SearchResult) -> str:
    """A row for each unit whose choice explains something, with a bar."""
    items = [(name, share) for name, share in result.importance.items() if share > 0][:40]
    most = max(share for _, share in items)
    rows = [
        [
            escaped(name),
            f"{result.rows[name]:,}",
            f'<i class="bar" style="width:{8 * share / most:.2f}em"></i>{share:.1%}',
        ]
        for name, share in items
    ]
    return table(["tables", "rows", "share of the metric's variance"], rows)


def _cost(result: SearchResult) -> str:
    cost = result.cost
    stopped = sum(1 for c in result.candidates if c.state.startswith("stopped"))
    failed = sum(1 for c in result.candidates if c.state not in ("complete",)) - stopped
    return table(
        ["part", "trainings", "in full trainings", "hours"],
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


def _choices_note() -> str:
    return (
        '<p class="note">A row for each table, the one with most rows on top: what it is stored as, and '
        "its share of its own full bytes; the darker, the larger.</p>"
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
