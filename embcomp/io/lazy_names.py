"""Public names of a package that are imported on first use (PEP 562), and names of old."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, homes: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
        package: the package's `__name__`.
        homes: the module that defines each public name.
        renamed: what public names of old are called now; they go on working, with a warning.
    """
    old = renamed or {}

    def get(name: str) -> object:
        if name in old:
            warn_renamed(f"{package}.{name}", old[name], stacklevel=3)
            return get(old[name])
        if name not in homes:
            known = sorted(homes)
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        value = vars(import_module(homes[name]))[name]
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a public name has another name now."""
    warnings.warn(
        f"{old} is called {new} now; the old name goes away in the release after next",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
