"""What any reader of a `dataset.json` has to settle first: is it JSON, and where do its paths lead."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator

from embcomp.errors import DataError, one_line
from embcomp.io.inner_paths import inner_path

DATASET_FILE = "dataset.json"


def _inside(path: str) -> str:
    """Return a path that cannot leave the dataset's folder."""
    if path:
        inner_path(path)
    if PurePosixPath(path) == PurePosixPath(DATASET_FILE):
        raise ValueError(f"{path!r} is the description itself; expected a Parquet file")
    os.fsencode(path)  # a UnicodeEncodeError, which is a ValueError, for what no file is called
    return path


FilePath = Annotated[str, AfterValidator(_inside)]
"""A file of the dataset, relative to its folder and in it; symbolic links are followed."""


def read_description(path: Path) -> Any:
    """Read the JSON values of a `dataset.json`.

    Raises:
        DataError: it is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent} is not a prepared dataset: it has no {path.name}; make one with "
            f"`embcomp prepare`"
        ) from None
    except NotADirectoryError:
        raise DataError(f"{path.parent} is a file; a prepared dataset is a folder") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({one_line(error)}); prepare the dataset again"
        ) from None


def is_file(path: Path) -> bool:
    """Whether a file is there; a name too long for any file is none."""
    try:
        return path.is_file()
    except OSError:
        return False
