"""The demonstration's picture and page: AUC against bytes."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from embcomp.budget import format_bytes
from embcomp.demo import LABELS, DemoResult
from embcomp.training.report import Report

COLUMNS = ("method", "serve bytes", "compression", "AUC", "log loss", "samples/s")
PAGE_NAME = "report.html"
PICTURE_NAME = "auc_against_bytes.png"

COLORS = {"full": "#4c566a", "hash": "#c8553d", "unified": "#2a7f62"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2.5rem auto; padding: 0 1rem;
       color: #22272e; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: .25rem }
p { color: #4c566a }
table { border-collapse: collapse; width: 100%; margin: 1.5rem 0 }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid #d8dee9 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def rows(result: DemoResult) -> list[tuple[str, ...]]:
    """The table's cells, one tuple of ``COLUMNS`` for each method."""
    return [
        (
            LABELS[name],
            f"{report.serve_bytes:,} ({format_bytes(report.serve_bytes)})",
            f"{report.compression:.2f}x",
            f"{_test(report, 'auc'):.4f}",
            f"{_test(report, 'log_loss'):.4f}",
            f"{report.samples_per_second:,.0f}",
        )
        for name, report in result.reports.items()
    ]


def caption(result: DemoResult) -> str:
    """One sentence on the data, with the best possible AUC where it is known."""
    splits = result.dataset.splits
    text = (
        f"{sum(split.rows for split in splits.values()):,} rows, "
        f"{sum(f.num_embeddings for f in result.dataset.categorical):,} ids; "
        f"one epoch of AutoInt; test split of {splits['test'].rows:,} rows."
    )
    bayes = result.dataset.bayes
    if bayes is not None:
        text += f" Best possible on it: AUC {bayes.auc:.4f}, log loss {bayes.log_loss:.4f}."
    return text


def write_page(result: DemoResult, folder: Path) -> list[Path]:
    """Writes the picture and a page that holds it; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = _picture(result)
    files = {PICTURE_NAME: picture, PAGE_NAME: _page(result, picture).encode()}
    for name, content in files.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    return [folder / name for name in files]


def _test(report: Report, metric: str) -> float:
    return float((report.test or report.valid)[metric])


def _picture(result: DemoResult) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    for name, report in result.reports.items():
        size, auc = report.serve_bytes / 1024, _test(report, "auc")
        axes.scatter([size], [auc], s=90, color=COLORS[name], zorder=3)
        axes.annotate(
            f"{LABELS[name]}\n{auc:.4f}",
            (size, auc),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[name],
        )
    bayes = result.dataset.bayes
    if bayes is not None:
        axes.axhline(bayes.auc, color="#888", linestyle="--", linewidth=1)
        axes.annotate(
            f"best possible {bayes.auc:.4f}",
            (0.01, bayes.auc),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            color="#666",
        )
    sizes = [report.serve_bytes / 1024 for report in result.reports.values()]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 4)
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    axes.set_xlabel("embedding tables when served, KiB (logarithmic)")
    axes.set_ylabel("test AUC")
    axes.set_title("AUC against bytes: AutoInt, one epoch")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    # The version of matplotlib would otherwise be written into the file.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "embcomp"})
    return buffer.getvalue()


def _page(result: DemoResult, picture: bytes) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in rows(result)
    )
    data = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>embcomp: AUC against bytes</title>
<meta name="viewport" content="width=device-width">
<style>{_STYLE}</style></head>
<body>
<h1>AUC against bytes</h1>
<p>{html.escape(caption(result))}</p>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
<img alt="Test AUC of each method against the bytes of its tables"
     src="data:image/png;base64,{data}">
</body></html>
"""
