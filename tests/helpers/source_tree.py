"""The product's modules as text: names, imports and definitions, read with `ast`."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("models", "data_pipelines", "search")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the product by its installed name; packages by the name of their folder.

    The mapped folders are read where they lie, so a checkout without symlinks gives the same.
    """
    found = {}
    for top in ("embcomp", *MAPPED):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "embcomp" and parts[1] in MAPPED:
                continue
            name = ".".join(parts if parts[0] == "embcomp" else ("embcomp", *parts))
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def is_package(module: str) -> bool:
    """Whether a module is the `__init__` of a folder."""
    return any(other.startswith(module + ".") for other in modules())


def imports_of(module: str) -> set[str]:
    """Modules of the product that a module imports anywhere: at its top, in functions, for types."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (children & set(modules())) or {node.module}
    return {name for name in found if name.split(".")[0] == "embcomp"}
