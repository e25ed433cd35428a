"""Paths that a description names: they stay inside the folder that it describes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator


def inner_path(path: str) -> str:
    """A relative path to something inside a folder, unchanged.

    Descriptions are files that people copy from anywhere; what they name is read, copied and
    written. Links inside a folder are its owner's own, and are followed.

    Raises:
        ValueError: it is absolute, climbs out by `..`, or names the folder itself.
    """
    parsed = PurePosixPath(path)
    if parsed.is_absolute() or ".." in parsed.parts or not parsed.parts or "\0" in path:
        raise ValueError(f"expected a relative path that stays inside the folder, got {path!r}")
    return path


def _inner_or_none(path: str) -> str:
    return inner_path(path) if path else path


InnerPath = Annotated[str, AfterValidator(inner_path)]
"""A field that names a file inside the described folder."""
OptionalInnerPath = Annotated[str, AfterValidator(_inner_or_none)]
"""The same, or an empty text for no file."""
