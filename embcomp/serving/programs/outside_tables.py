"""A program without its tables: a route, a dense part, and the tables in a flat file for whoever holds them.

    route.pt2     ids -> for each look-up the ids of physical rows, -1 where there is none
    tables.bin    the physical tables (`flat_tables` has the layout)
    dense.pt2     for each look-up the rows -> logits, or embeddings
    lookups.json  which table each look-up reads

A key-value store or a parameter server answers between the two programs: it takes a table's name and ids of
rows, and gives rows as float32, zeros for a negative id. What methods learnt beside their rows (codes, bitmaps)
is in the route; the network is in the dense part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.collection.assembled import build_groups
from embcomp.errors import ArtefactError
from embcomp.serving.artefact_config import ArtefactConfig, TablesRecord
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.exported_program import (
    Program,
    Rectangle,
    RectangleTables,
    export_module,
    open_sizes,
)
from embcomp.serving.programs.flat_tables import FlatTable, FlatTables, write_flat
from embcomp.serving.programs.program_inputs import words_of

ROUTE_FILE = "route.pt2"
DENSE_FILE = "dense.pt2"
TABLES_FILE = "tables.bin"
LOOKUPS_FILE = "lookups.json"


@dataclass(frozen=True)
class GivenRows(Rectangle):
    """A batch whose physical rows were looked up elsewhere.

    Args:
        rows: for each look-up, (B, L, ids per value, dim) float32.
    """

    rows: Mapping[str, Tensor]


class _TablesElsewhere(nn.Module):
    """A collection's methods with names for their look-ups."""

    def __init__(self, tables: RectangleTables, role: str) -> None:
        super().__init__()
        self.names: list[dict[str, str]] = []
        self.owners: dict[str, str] = {}
        self.per_value: dict[str, int] = {}
        for group in tables.single.groups:
            if group.backend.needs_context:
                raise ArtefactError(
                    f"{group.config.name} makes embeddings of ids and rows together, so that its rows "
                    "cannot be looked up elsewhere; export it as pt2"
                )
            owners = {
                key: table.name for table in group.backend.physical_tables for key in table.keys
            }
            names = {}
            for key in group.backend.keys:
                names[key] = f"{role}.{len(self.owners)}"
                self.owners[names[key]] = f"{role}.rows.{owners[key]}"
                self.per_value[names[key]] = group.backend.ids_per_value
            self.names.append(names)


class Route(nn.Module):
    """Ids to physical rows' ids.

    Args:
        program: made of the artefact; its tables lose what a route does not need.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.bags = program.bags
        self.tables = nn.ModuleList(_tables(program).values())
        self._elsewhere = [_TablesElsewhere(own, role) for role, own in _tables(program).items()]
        for own in _tables(program).values():
            own.single.rows = own.single.unpooled_rows = None
            own.single.combines = nn.ModuleList()

    @property
    def owners(self) -> dict[str, str]:
        """The table of each look-up."""
        return {name: own for each in self._elsewhere for name, own in each.owners.items()}

    @property
    def per_value(self) -> dict[str, int]:
        """How many rows each look-up reads for a value."""
        return {name: own for each in self._elsewhere for name, own in each.per_value.items()}

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ids of rows.

        Args:
            inputs: `ids`, and `lengths` with bags, as the whole program takes them.

        Returns:
            For each look-up, (B, L, ids per value) int64; L is 1 without bags.
        """
        ids = inputs["ids"]
        batch = Rectangle.of(inputs, bags=self.bags)
        found: dict[str, Tensor] = {}
        for tables, elsewhere in zip(self.tables, self._elsewhere):
            assert isinstance(tables, RectangleTables)
            for index, names in enumerate(elsewhere.names):
                keys, each = tables.single.physical(index, tables.ids_of(index, batch))
                shape = (ids.shape[0], batch.ids.shape[2], each.shape[2])
                for key, own in zip(keys, each):
                    found[names[key]] = own.reshape(shape)
        return found


class _GivenTables(RectangleTables):
    """Rectangle tables whose rows come from outside."""

    elsewhere: _TablesElsewhere

    @classmethod
    def of(cls, tables: RectangleTables, role: str) -> _GivenTables:
        """The same tables; they lose what is not needed any more."""
        made = cls.__new__(cls)
        made.__dict__ = dict(tables.__dict__)
        made._modules = dict(tables._modules)
        made.elsewhere = _TablesElsewhere(tables, role)
        made.single.rows = made.single.unpooled_rows = None
        made.single.routes = nn.ModuleList()
        return made

    def embeddings(self, index: int, batch: Rectangle) -> Tensor:
        assert isinstance(batch, GivenRows)
        found = {}
        for key, name in self.elsewhere.names[index].items():
            rows = batch.rows[name]  # (B, L, ids per value, dim)
            found[key] = rows.flatten(0, 1).sum(dim=1)
        return self.single.combined(index, found, self.ids_of(index, batch))


class Dense(nn.Module):
    """Physical rows to logits, or embeddings.

    Args:
        program: made of the artefact; its tables are replaced.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        for role, own in _tables(program).items():
            given = _GivenTables.of(own, role)
            if program.network is None:
                program.tables = given
            else:
                child = {"tables": "tables", "first_order": "first_order_tables"}[role]
                program.network.add_module(child, given)
        self.program = program

    def forward(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score, or pool.

        Args:
            inputs: `rows`, a mapping from look-up to (B, L, ids per value, dim) float32; `lengths` with
                bags and `dense` where there are numeric features, as the whole program takes them.
        """
        program, rows = self.program, inputs["rows"]
        first = next(iter(rows.values()))
        size, length = first.shape[0], first.shape[1]
        filled = None
        if program.bags:
            filled = torch.arange(length, device=first.device) < inputs["lengths"].unsqueeze(2)
        ids = torch.zeros(size, len(program.feature_names), length, dtype=torch.int64)
        batch = GivenRows(ids, filled, rows)
        if program.network is None:
            return program.tables(batch).to_dict()
        dense = inputs["dense"] if program.num_dense else torch.zeros(size, 0)
        return {"logits": program.network(dense, batch)}


def _tables(program: Program) -> dict[str, RectangleTables]:
    if program.network is None:
        return {"tables": program.tables}
    children = dict(program.network.named_children())
    found = {"tables": children.get("tables"), "first_order": children.get("first_order_tables")}
    return {role: own for role, own in found.items() if isinstance(own, RectangleTables)}


def write_outside_tables(make: Any, folder: Path, config: ArtefactConfig) -> None:
    """Write the four files into an artefact's folder.

    Args:
        make: makes the artefact's `Program`; it is called twice, as both parts change theirs.
        folder: the artefact's.
        config: its description.
    """
    route = Route(make())
    tables = _flat(folder, config)
    write_flat(folder / TABLES_FILE, tables)
    whole = make()
    inputs = whole.example()
    asked = {name: own for name, own in inputs.items() if name != "dense"}
    dims = {table.name: table.dim for table in tables}
    owners = route.owners
    length = inputs["ids"].shape[2] if whole.bags else 1
    given: dict[str, Any] = {name: own for name, own in inputs.items() if name != "ids"}
    given["rows"] = {
        name: torch.zeros(len(inputs["ids"]), length, route.per_value[name], dims[owners[name]])
        for name in owners
    }
    _write(route, asked, folder / ROUTE_FILE, bags=whole.bags)
    _write(Dense(make()), given, folder / DENSE_FILE, bags=whole.bags)
    described = {
        "format": "embcomp look-ups",
        "version": 1,
        "program": whole.record().model_dump(),
        "features": words_of(whole),
        "lookups": [
            {
                "name": name,
                "table": owners[name],
                "ids": f"(B, {'L' if whole.bags else 1}, {route.per_value[name]}) int64",
                "dim": dims[owners[name]],
            }
            for name in owners
        ],
    }
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    (folder / LOOKUPS_FILE).write_text(text, encoding="utf-8")


def _write(module: nn.Module, example: dict[str, Any], path: Path, *, bags: bool) -> None:
    free = torch.export.Dim.DYNAMIC
    sizes = open_sizes({name: own for name, own in example.items() if name != "rows"})
    if "rows" in example:
        sizes["rows"] = {
            name: {0: free, 1: free} if bags else {0: free} for name in example["rows"]
        }
    exported = export_module(module, (example,), (sizes,))
    exported.example_inputs = None  # it would be pickled
    packed = io.BytesIO()  # on a disk that is full, torch's own writer ends the process
    torch.export.save(exported, packed)
    path.write_bytes(packed.getbuffer())


def _flat(folder: Path, config: ArtefactConfig) -> list[FlatTable]:
    stored = find_tensors(folder)
    found = []
    records: dict[str, TablesRecord | None] = {
        "tables": config.tables,
        "first_order": config.first_order,
    }
    for role, record in records.items():
        if record is None:
            continue
        dims = _dims(record, str(folder))
        for name, row_type in record.row_types.items():
            full = f"{role}.rows.{name}"
            found.append(FlatTable(name=full, dim=dims[name], row_type=row_type, rows=stored[full]))
    return found


def _dims(record: TablesRecord, source: str) -> dict[str, int]:
    groups = build_groups(record.resolved_plan(source), unpooled=record.kind == "unpooled")
    return {t.name: t.embedding_dim for group in groups for t in group.backend.physical_tables}


class OutsideTables:
    """The two programs with the flat file between them: what a serving system is to do, in Python.

    Args:
        folder: the artefact's.
    """

    def __init__(self, folder: Path) -> None:
        described = json.loads((folder / LOOKUPS_FILE).read_text(encoding="utf-8"))
        self._owners = {each["name"]: each["table"] for each in described["lookups"]}
        self._route = torch.export.load(folder / ROUTE_FILE).module()
        self._dense = torch.export.load(folder / DENSE_FILE).module()
        self._tables = FlatTables(folder / TABLES_FILE)
        self.metadata: dict[str, str] = described["features"]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the route, look up, run the dense part."""
        asked = self._route({name: own for name, own in inputs.items() if name != "dense"})
        given: dict[str, Any] = {name: own for name, own in inputs.items() if name != "ids"}
        given["rows"] = {
            name: self._tables.rows(self._owners[name], own) for name, own in asked.items()
        }
        return self._dense(given)
