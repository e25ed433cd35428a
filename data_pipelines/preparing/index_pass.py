"""The first reading of the input: where its blocks of whole lines are, and what its files hold."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from embcomp.data_pipelines.importers.base import Block, RawTable
from embcomp.data_pipelines.preparing.engine import Advance, Part, map_parts
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import SourceFile
from embcomp.errors import DataError

_BLOCK_KEYS = ("file", "start", "end", "line", "row", "rows")
_ROW, _ROWS = _BLOCK_KEYS.index("row"), _BLOCK_KEYS.index("rows")
_SEALS = "index"


class InputIndex(BaseModel):
    """What the index pass found."""

    blocks: list[list[int]]
    sources: list[SourceFile]
    text_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the whole input, malformed ones included."""
        last = _block(self.blocks[-1])
        return last.row + last.rows

    def all_blocks(self) -> list[Block]:
        """Return the blocks in row order; there is at least one."""
        return [_block(row) for row in self.blocks]


def _block(row: list[int]) -> Block:
    return Block(**dict(zip(_BLOCK_KEYS, row)))


@dataclass(frozen=True, kw_only=True)
class IndexTask:
    """One raw file to look through."""

    table: RawTable
    file: int


class IndexedFile(BaseModel):
    """What one raw file holds; its rows are counted from 0."""

    blocks: list[list[int]]
    source: SourceFile
    text_bytes: int


def index_file(task: IndexTask, advance: Advance) -> IndexedFile:
    """Find the blocks of one file."""
    found = task.table.index(task.file, 0, advance)
    path = str(task.table.files[task.file].path)
    return IndexedFile(
        blocks=[[getattr(block, key) for key in _BLOCK_KEYS] for block in found.blocks],
        source=SourceFile(path=path, bytes=found.bytes, sha256=found.sha256),
        text_bytes=found.text_bytes,
    )


def index_input(settings: PrepareSettings, work: Workspace) -> InputIndex:
    """Find the blocks of all files, but for those where an earlier run did."""
    (work.scratch / _SEALS).mkdir(exist_ok=True)
    table = settings.table
    sizes = [file.path.stat().st_size for file in table.files]
    parts = [
        Part(seal=f"{_SEALS}/{file:05d}.json", task=IndexTask(table=table, file=file), size=size)
        for file, size in enumerate(sizes)
    ]
    with phase("index", sum(sizes), show=settings.progress) as advance:
        found = map_parts(
            settings.engine,
            work,
            index_file,
            parts,
            IndexedFile,
            files=lambda task, found: {},
            advance=advance,
        )
    blocks: list[list[int]] = []
    rows = 0
    for file in found:
        blocks += [[*block[:_ROW], block[_ROW] + rows, *block[_ROW + 1 :]] for block in file.blocks]
        rows += sum(block[_ROWS] for block in file.blocks)
    if not blocks:
        # Parts without rows are common where a cluster wrote them; nothing but such is not.
        raise DataError(f"{table.files[0].path} has no rows")
    return InputIndex(
        blocks=blocks,
        sources=[file.source for file in found],
        text_bytes=sum(file.text_bytes for file in found),
    )
