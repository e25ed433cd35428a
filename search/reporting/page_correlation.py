"""Scores of a supernet against those of retrained candidates, as a part of a search's page."""

from __future__ import annotations

import plotly.graph_objects as plotly

from embcomp.io.html import BLUE, escaped
from embcomp.search.reporting.results import SearchResult
from embcomp.tables.budget import format_bytes


def correlation_note(result: SearchResult) -> str:
    """What the figure shows, and the coefficient."""
    assert result.correlation is not None
    ranked = result.correlation
    failed = [c for c in ranked.candidates if c.retrained is None]
    count = len(ranked.candidates) - len(failed)
    lost = f" {len(failed)} more failed." if failed else ""
    return (
        f"<p>Spearman's rank correlation {escaped(ranked.text())} between scores by the "
        f"supernet and validation scores after retraining, of {count} candidates, one seed "
        f"each.{lost}</p>"
        '<p class="note">The candidates are the best, the worst, and those closest to even steps '
        "of the score between them, scored on search-validation rows, and on the validation split "
        "after retraining. What differs by less than the spread over seeds is no "
        "order.</p>"
    )


def draw_correlation(result: SearchResult) -> plotly.Figure:
    """One point for each retrained candidate."""
    assert result.correlation is not None
    shown = [c for c in result.correlation.candidates if c.retrained is not None]
    figure = plotly.Figure(
        plotly.Scatter(
            x=[c.score for c in shown],
            y=[c.retrained for c in shown],
            mode="markers",
            marker={"size": 10, "color": BLUE},
            text=[
                f"candidate {c.number} ({escaped(c.kind)}), {format_bytes(c.serve_bytes)}"
                for c in shown
            ],
            hovertemplate="%{text}<br>%{x:.6f} by the supernet<br>%{y:.6f} retrained<extra></extra>",
        )
    )
    metric = result.objectives[0].replace("_", " ")
    figure.update_layout(
        template="plotly_white", height=420, margin={"l": 70, "r": 20, "t": 20, "b": 60}
    )
    figure.update_xaxes(title=f"{metric} by the supernet")
    figure.update_yaxes(title=f"{metric} retrained in full")
    return figure
