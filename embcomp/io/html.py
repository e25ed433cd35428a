"""Pages that need nothing else: one HTML file with tables and plotly's figures, its script inside.

Tables are sorted by a click on a heading; where the window is narrow their rows become lists, so that
nothing is cut off. Legends are text below a figure, which wraps, rather than a part of its drawing.
"""

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
SYMBOLS = {"circle": "●", "diamond": "◆", "square": "■", "triangle-up": "▲", "star": "★", "x": "✖"}
"""Plotly's markers that tell apart what has the same colour, and how they are written."""
BLUE, ORANGE = COLOURS[:2]
GREY = "#999999"

_MOST_LEFT = 3
_NARROW = 700  # pixels below which the rows of a table become lists
_STYLE = (
    "html{overflow-y:scroll}"  # figures are drawn before a page is long enough to have a scroll bar
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;"
    "color:#222;overflow-wrap:anywhere}h1{font-size:1.6em;line-height:1.2}h2{margin-top:2em}"
    "table{border-collapse:collapse;width:100%;font-size:14px}"
    "td,th{padding:.3em .6em;text-align:right;border-bottom:1px solid #ddd;overflow-wrap:normal}"
    "th button{all:unset;cursor:pointer;font-weight:bold}"
    "th button:focus-visible{outline:2px solid #0072B2}"
    'th[aria-sort=ascending] button::after{content:" \\25B2"}'
    'th[aria-sort=descending] button::after{content:" \\25BC"}'
    "p.note{color:#555}p.warning{border-left:4px solid #D55E00;padding-left:.8em}"
    ".wide{overflow-x:auto}.legend{display:flex;flex-wrap:wrap;gap:.2em 1.2em;margin:.3em 0 1em}"
    "td i.tone{display:inline-block;width:.8em;height:.8em;margin-right:.4em;"
    "border-radius:50%}i.bar{display:inline-block;height:.7em;background:#0072B2;margin-right:.5em}"
    + "".join(
        f".left{n} :is(td,th):nth-child(-n+{n}){{text-align:left;overflow-wrap:anywhere}}"
        for n in range(1, _MOST_LEFT + 1)
    )
    + "td:first-child{min-width:7em}"
    f"@media (max-width:{_NARROW}px){{table,thead,tbody,tr,td,th{{display:block;width:auto}}"
    "thead tr{display:flex;flex-wrap:wrap;gap:.2em 1em;border-bottom:1px solid #ddd}"
    "thead th{border:0;padding:.2em 0}tbody tr{border-bottom:2px solid #bbb;padding:.4em 0}"
    "tbody td{display:flex;justify-content:space-between;gap:1em;border:0;padding:.1em 0;"
    "text-align:right!important;overflow-wrap:anywhere}"
    "tbody td::before{content:attr(data-label);color:#555;text-align:left}tbody td:empty{display:none}}"
)
# A cell's own `data-sort`, else its first number times its unit, else its text; empty cells come last.
_SCRIPT = """
const UNITS = {KiB: 2**10, MiB: 2**20, GiB: 2**30, TiB: 2**40, min: 60, h: 3600, ms: 1e-3};
const keyOf = cell => {
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const found = text.replace(/,/g, "").match(/^[-+]?(\\d+\\.?\\d*|\\.\\d+)(e[-+]?\\d+)?\\s*([A-Za-z]*)/);
  return text === "" ? null : found ? Number(found[0].match(/^[-+.\\de]+/)[0]) * (UNITS[found[3]] ?? 1) : text;
};
const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const place = [...head.parentElement.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map(row => [keyOf(row.cells[place]), row]);
  rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : compare(a, b) * (down ? -1 : 1)));
  for (const [, row] of rows) body.append(row);
});
"""


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
        + f"<script>{_SCRIPT}</script></body></html>\n",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table that is sorted by its headings; in a narrow window its rows are lists.

    Args:
        head: headings, plain text.
        rows: cells, as HTML.
        left: how many columns stand to the left, up to 3; the others are numbers.
    """
    top = "".join(
        f'<th scope="col"><button type="button">{escaped(cell)}</button></th>' for cell in head
    )
    labels = [escaped(cell) for cell in head]
    body = "\n".join(
        "<tr>"
        + "".join(_cell(label, cell) for label, cell in zip(labels, row, strict=True))
        + "</tr>"
        for row in rows
    )
    shown = (
        f'<table class="left{left}"><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>'
    )
    return f'<div class="wide">{shown}</div>'


def _cell(label: str, content: str) -> str:
    inner = f"<span>{content}</span>" if content else ""
    return f'<td data-label="{label}">{inner}</td>'


def figure_html(figure: plotly.Figure, name: str, *, first: bool = False) -> str:
    """A figure of a page, interactive, with its legend as text.

    Args:
        figure: what to show.
        name: its id in the page; the same figure is the same bytes.
        first: whether it is the page's first figure, which brings plotly's script.
    """
    legend = _legend(figure)
    figure.update_layout(showlegend=False, autosize=True, font={"size": 12})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=first,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    return f'<div class="figure">{drawn}</div>{legend}'


def _legend(figure: plotly.Figure) -> str:
    """A word, a marker and a colour for each named trace."""
    marks = {
        trace.name: (trace.marker.color, SYMBOLS.get(str(trace.marker.symbol), "●"))
        for trace in figure.data
        if trace.name and isinstance(trace.marker.color, str)
    }
    if len(marks) < 2:
        return ""
    keys = "".join(
        f'<span><b style="color:{escaped(colour)}">{mark}</b> {name}</span>'
        for name, (colour, mark) in marks.items()
    )
    return f'<p class="legend">{keys}</p>'


_LIGHTEST, _DARKEST = (222, 235, 247), (8, 69, 148)  # of ColorBrewer's Blues
_FIRST_TONE = 0.15


def tone(place: float) -> tuple[str, str]:
    """A blue for a value, and a colour of text that can be read on it.

    The scale begins above its lightest tone, which so is no value's: where most values are the lowest,
    they still are seen.

    Args:
        place: from 0, the lowest value, to 1.
    """
    at = _FIRST_TONE + (1 - _FIRST_TONE) * min(1.0, max(0.0, place))
    mixed = [round(low + (high - low) * at) for low, high in zip(_LIGHTEST, _DARKEST)]
    return "#" + "".join(f"{part:02x}" for part in mixed), "#fff" if at > 0.5 else "#111"


def marker_of(place: int) -> tuple[str, str]:
    """A colour and a symbol of plotly's for one of many series, each pair once for the first 42."""
    symbols = list(SYMBOLS)
    return COLOURS[place % len(COLOURS)], symbols[place // len(COLOURS) % len(symbols)]


def byte_ticks(sizes: Sequence[int]) -> list[int]:
    """Powers of two around some sizes, few enough to be read."""
    low, high = max(min(sizes), 1).bit_length() - 1, max(*sizes, 1).bit_length()
    every = -(-(high - low) // 8) or 1
    return [2**exponent for exponent in range(low, high + 1, every)]
