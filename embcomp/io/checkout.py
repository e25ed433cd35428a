"""Where embcomp lies, and the checkout around it."""

from __future__ import annotations

from pathlib import Path

import embcomp


def package_folder() -> Path:
    """Return the folder of the package `embcomp`."""
    return Path(embcomp.__file__).resolve().parent


def checkout_root() -> Path:
    """Return the folder around the package: of a checkout, its root."""
    return package_folder().parent
