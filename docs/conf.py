"""Sphinx settings: `make docs`."""

project = "embcomp"
author = "The embcomp authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
master_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "embcomp"
myst_heading_anchors = 3
