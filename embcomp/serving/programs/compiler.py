"""Whether AOTInductor has a C++ compiler here: the one that `CXX` names, else g++."""

from __future__ import annotations

import os
import shutil


def why_no_compiler() -> str | None:
    """Why nothing can be compiled ahead of time here, in one line; None where it can."""
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name) is not None:
        return None
    return (
        f"no C++ compiler: {name} is not on the path; install one (Debian: g++), or set CXX to the one "
        "there is"
    )
