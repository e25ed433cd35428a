"""Pages that need nothing else: one HTML file with tables and plotly's figures, its script inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embcomp.io.atomic_files import write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects as plotly

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE = COLOURS[:2]
GREY = "#999999"

_MOST_LEFT = 3
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1000px;padding:0 1em;"
    "color:#222}h2{margin-top:2em}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}"
    "p.note{color:#555}.wide{overflow-x:auto}"
    + "".join(
        f".left{n} :is(td,th):nth-child(-n+{n}){{text-align:left}}"
        for n in range(1, _MOST_LEFT + 1)
    )
)


def escaped(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write one page atomically.

    Args:
        path: the file.
        title: plain text, of the browser's tab.
        parts: the body, as HTML.
    """
    write_atomically(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "</body></html>\n",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table that scrolls by itself where the window is narrow.

    Args:
        head: headings, plain text.
        rows: cells, as HTML.
        left: how many columns stand to the left, up to 3; the others are numbers.
    """
    top = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    shown = f'<table class="left{left}"><tr>{top}</tr>\n{body}</table>'
    return f'<div class="wide">{shown}</div>'


def figure_html(figure: plotly.Figure, name: str, *, first: bool = False) -> str:
    """A figure of a page, interactive.

    Args:
        figure: what to show.
        name: its id in the page; the same figure is the same bytes.
        first: whether it is the page's first figure, which brings plotly's script.
    """
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=first, div_id=name, config={"displayModeBar": False}
    )
    return f'<div class="wide">{drawn}</div>'


def byte_ticks(sizes: Sequence[int]) -> list[int]:
    """Powers of two around some sizes, few enough to be read."""
    low, high = max(min(sizes), 1).bit_length() - 1, max(*sizes, 1).bit_length()
    every = -(-(high - low) // 8) or 1
    return [2**exponent for exponent in range(low, high + 1, every)]
