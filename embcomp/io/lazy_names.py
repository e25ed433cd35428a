"""Public names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`.

    Args:
        package: the package's `__name__`.
        homes: the module that defines each public name.
    """

    def get(name: str) -> object:
        if name not in homes:
            known = sorted(homes)
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        value = vars(import_module(homes[name]))[name]
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
