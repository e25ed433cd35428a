"""Pages opened in a headless Chromium, at several widths at once, and what a reader would see of them.

A page is shown in a frame as wide as a window would be, with a script of ours before its own: it forbids
every request, keeps errors, clicks the tables' headings, measures what is drawn, and tells the page around
the frames, whose text Chromium prints.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_WATCH = """
window.probeErrors = [];
for (const name of ["error", "warn"]) console[name] = (...words) => probeErrors.push(`console.${name}: ${words.join(" ")}`);
addEventListener("error", event => probeErrors.push(`error: ${event.message}`));
addEventListener("unhandledrejection", event => probeErrors.push(`rejected: ${event.reason}`));
addEventListener("securitypolicyviolation", event => probeErrors.push(`asks for ${event.blockedURI || event.violatedDirective}`));
"""
_LOOK = """
addEventListener("load", () => setTimeout(() => {
  const found = {name: NAME, width: innerWidth, title: document.title, figures: [], tables: [], cut: []};
  const visible = element => { const r = element.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
  const texts = function*(root) {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node; node = walk.nextNode();) {
      const range = document.createRange(); range.selectNodeContents(node);
      for (const rect of range.getClientRects()) if (node.textContent.trim() && rect.width) yield [node.textContent.trim(), rect];
    }
  };
  for (const [text, rect] of texts(document.body))
    if (rect.right > innerWidth + 1 || rect.left < -1) found.cut.push(`${text.slice(0, 40)} ends at ${Math.round(rect.right)}`);
  for (const box of document.querySelectorAll("body, .wide, .figure, .legend, td"))
    if (box.scrollWidth > box.clientWidth + 1) found.cut.push(`${box.tagName}.${box.className} holds ${box.scrollWidth} in ${box.clientWidth}`);
  for (const figure of document.querySelectorAll(".plotly-graph-div")) {
    const svg = figure.querySelector("svg.main-svg");
    const frame = figure.getBoundingClientRect();
    const outside = [];
    if (svg) for (const text of figure.querySelectorAll("svg text")) {
      const r = text.getBoundingClientRect();
      if (text.textContent.trim() && (r.right > frame.right + 1 || r.left < frame.left - 1 || r.bottom > frame.bottom + 1 || r.top < frame.top - 1))
        outside.push(text.textContent);
    }
    found.figures.push({id: figure.id, drawn: !!svg && visible(svg), marks: figure.querySelectorAll(".point, .js-line").length, texts: figure.querySelectorAll("svg text").length, outside});
  }
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0], heads = [...table.querySelectorAll("th")];
    const column = place => [...body.rows].map(row => row.cells[place].textContent.trim());
    const unsorted = [];
    heads.forEach((head, place) => {
      const button = head.querySelector("button");
      if (!button || !visible(button)) { unsorted.push(head.textContent + " has no button"); return; }
      const before = column(place).sort().join("|");
      button.click(); const up = column(place), upMark = head.getAttribute("aria-sort");
      button.click(); const down = column(place), downMark = head.getAttribute("aria-sort");
      const full = each => each.filter(text => text !== "");
      if (upMark !== "ascending" || downMark !== "descending") unsorted.push(head.textContent + " has no mark");
      if (up.slice().sort().join("|") !== before) unsorted.push(head.textContent + " lost rows");
      if (new Set(full(up)).size === full(up).length && full(up).join("|") !== full(down).reverse().join("|")) unsorted.push(head.textContent);
    });
    found.tables.push({rows: body.rows.length, columns: heads.length, unsorted, first: column(0)});
  }
  found.errors = probeErrors.concat(performance.getEntriesByType("resource").map(each => `loads ${each.name}`));
  parent.postMessage(JSON.stringify(found), "*");
}, 1500));
"""
_AROUND = """<!doctype html><meta charset="utf-8"><body>
<script>
const told = [];
addEventListener("message", event => {
  told.push(JSON.parse(event.data));
  if (told.length === COUNT) {
    const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
    document.body.append(out);
  }
});
</script>
FRAMES
</body>"""


def find_browser() -> str:
    """Chromium's path; skips the test where there is none, or fails it in CI, which installs one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "no Chromium here; `apt-get install chromium` brings one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def look_at(
    pages: Mapping[str, Path], widths: Sequence[int], folder: Path
) -> dict[tuple[str, int], dict[str, Any]]:
    """What a browser sees of each page at each width.

    Args:
        pages: the pages, by name.
        widths: of windows, in pixels.
        folder: for the pages as they are shown.
    """
    frames = []
    for name, path in pages.items():
        for width in widths:
            frames.append(_frame(name, path, width, folder))
    around = folder / "around.html"
    around.write_text(
        _AROUND.replace("COUNT", str(len(frames))).replace("FRAMES", "\n".join(frames)),
        encoding="utf-8",
    )
    command = [
        *(find_browser(), "--headless", "--disable-gpu", "--dump-dom"),
        *(["--no-sandbox"] if os.getuid() == 0 else []),  # Chromium has no sandbox for root
        *("--disable-dev-shm-usage", "--virtual-time-budget=30000", "--window-size=1600,1000"),
        *("--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"),
        around.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, f"the pages did not load: {done.stdout[-500:]}\n{done.stderr[-2000:]}"
    seen = json.loads(html.unescape(told[1]))
    return {(each["name"], each["width"]): each for each in seen}


def _frame(name: str, path: Path, width: int, folder: Path) -> str:
    shown = folder / f"{name}-{width}.html"
    watch = _WATCH + _LOOK.replace("NAME", json.dumps(name))
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><script>{watch}</script>'
    )
    text = path.read_text(encoding="utf-8")
    assert text.count("<head>") >= 1
    shown.write_text(text.replace("<head>", f"<head>{head}", 1), encoding="utf-8")
    return f'<iframe src="{shown.name}" width="{width}" height="2000" style="border:0"></iframe>'
