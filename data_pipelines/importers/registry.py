"""The raw formats that `prepare` reads, by name. A new one is a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from embcomp.data_pipelines.importers.avazu import AvazuImporter
from embcomp.data_pipelines.importers.base import Importer, RawTable
from embcomp.data_pipelines.importers.criteo import CriteoImporter
from embcomp.data_pipelines.importers.libfm import Form, LibFMImporter
from embcomp.data_pipelines.importers.movielens import MovieLensImporter
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.data_pipelines.schema import RawFormat
from embcomp.errors import DataError, one_line

IMPORTERS: dict[str, type[Importer]] = {
    "criteo": CriteoImporter,
    "avazu": AvazuImporter,
    "movielens": MovieLensImporter,
    "libfm": LibFMImporter,
    "table": TableImporter,
}


def make_importer(name: str, schema: str | Path | None = None, form: str | None = None) -> Importer:
    """Return the importer of a name.

    Args:
        schema: the path of a schema YAML, which `table` needs and others do not take.
        form: for `libfm`, what its tokens are, where the first lines do not tell.
    """
    if name not in IMPORTERS:
        near = difflib.get_close_matches(name, IMPORTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"there is no importer {name!r}; there are {', '.join(IMPORTERS)}{hint}")
    kind = IMPORTERS[name]
    if kind is TableImporter:
        if schema is None:
            raise DataError("the `table` importer needs a schema YAML that names the columns")
        return TableImporter.from_yaml(schema)
    if schema is not None:
        raise DataError(f"the {name!r} importer knows its columns; only `table` takes a schema")
    if form is None:
        return kind()
    if kind is not LibFMImporter or form not in get_args(Form):
        raise DataError(
            f"form {form!r} is for the importer `libfm`, which knows {', '.join(get_args(Form))}"
        )
    return LibFMImporter(form=form)  # type: ignore[arg-type]


def describe_format(importer: Importer, table: RawTable, bucketed: Sequence[str]) -> RawFormat:
    """Describe how a table is read.

    Args:
        bucketed: the features that are numbers in the table, and categories in the dataset.
    """
    if IMPORTERS.get(importer.name) is not type(importer):
        return RawFormat(importer=None, bucketed=list(bucketed))
    options = importer.options(table)
    return RawFormat(importer=importer.name, options=options, bucketed=list(bucketed))


def importer_of(described: RawFormat, place: str) -> Importer | None:
    """Return the importer that reads rows as those of a dataset were; None if it was someone's own.

    Args:
        place: where the description stands, for the error.
    """
    if described.importer is None:
        return None
    if described.importer not in IMPORTERS:
        raise DataError(
            f"{place}: its raw rows were read by {described.importer!r}, which this embcomp does "
            f"not have; there are {', '.join(IMPORTERS)}"
        )
    try:
        return IMPORTERS[described.importer].with_options(described.options)
    except (ValidationError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: raw_format does not describe {described.importer!r} rows: {one_line(error)}"
        ) from None
