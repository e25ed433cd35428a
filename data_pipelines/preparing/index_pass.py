"""The first reading of the input: where its blocks of whole lines are, and what its files hold."""

from __future__ import annotations

from pydantic import BaseModel

from embcomp.data_pipelines.importers.base import Block
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import SourceFile
from embcomp.errors import DataError

_BLOCK_KEYS = ("file", "start", "end", "line", "row", "rows")


class InputIndex(BaseModel):
    """What the index pass found, kept for a resumed run."""

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


def index_input(settings: PrepareSettings, work: Workspace) -> InputIndex:
    """Find the blocks, unless an earlier run did."""
    return work.once("index.json", InputIndex, lambda: _index(settings))


def _index(settings: PrepareSettings) -> InputIndex:
    files = settings.table.files
    blocks: list[Block] = []
    sources: list[SourceFile] = []
    text_bytes = 0
    size = sum(file.path.stat().st_size for file in files)
    with phase("index", size, show=settings.progress) as advance:
        for number, file in enumerate(files):
            row = blocks[-1].row + blocks[-1].rows if blocks else 0
            found = settings.table.index(number, row, advance)
            blocks += found.blocks
            text_bytes += found.text_bytes
            sources.append(SourceFile(path=str(file.path), bytes=found.bytes, sha256=found.sha256))
    if not blocks:
        # Parts without rows are common where a cluster wrote them; nothing but such is not.
        raise DataError(f"{files[0].path} has no rows")
    rows = [[getattr(block, key) for key in _BLOCK_KEYS] for block in blocks]
    return InputIndex(blocks=rows, sources=sources, text_bytes=text_bytes)
