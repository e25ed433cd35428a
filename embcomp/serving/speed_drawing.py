"""Draws how fast an artefact answers: latency against batch size, a colour for each that answered."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from embcomp.io.html import COLOURS
from embcomp.serving.serving_speed import SpeedReport


def draw_speed(found: SpeedReport, path: Path) -> None:
    """Write the picture as PNG: a panel for each number of callers; p50 as a line, up to p99 in light.

    Args:
        found: what was measured.
        path: the file.
    """
    callers = list(dict.fromkeys(each.threads for each in found.latencies))
    names = list(dict.fromkeys(each.answers for each in found.latencies))
    figure = Figure(figsize=(1.5 + 5 * len(callers), 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(callers), sharey=True, squeeze=False)[0]
    for axes, threads in zip(panels, callers):
        for name, colour in zip(names, COLOURS):
            own = [e for e in found.latencies if e.answers == name and e.threads == threads]
            own.sort(key=lambda each: each.batch_size)
            sizes = [each.batch_size for each in own]
            axes.plot(sizes, [each.p50 for each in own], color=colour, marker="o", label=name)
            axes.fill_between(
                sizes,
                [each.p50 for each in own],
                [each.p99 for each in own],
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rows of a call")
        axes.set_title(f"{threads} caller{'s' * (threads > 1)} at once", fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds of a call: p50 to p99")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})
