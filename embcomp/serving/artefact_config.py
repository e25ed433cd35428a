"""`config.json` of an artefact: everything but the tensors that serving needs to know."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from typing_extensions import Self

from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.plan_document import plan_from_document, plan_to_document
from embcomp.errors import ArtefactError, EmbcompError, one_line
from embcomp.io.inner_paths import InnerPath
from embcomp.tables.row_types import RowType
from embcomp.tables.specs import TableSpec, specs_from_configs

FORMAT = "embcomp artefact"
FORMAT_VERSION = 3
_READ_VERSIONS = (2, 3)  # format 2 knew no other checksum than the CRC-32, and one file of tensors
CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
TENSORS_SUFFIX = ".safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROGRAM_FILE = "program.pt2"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogicalTable(_Strict):
    """One table as its user declared it."""

    name: str
    num_embeddings: int = Field(gt=0)
    embedding_dim: int = Field(gt=0)
    feature_names: list[str]
    pooling: Literal["sum", "mean"] = "sum"
    data_type: Literal["fp32", "fp16"] = "fp32"


class PlanEntry(_Strict):
    """A method, its settings, and the tables that it holds."""

    tables: list[str]
    method: dict[str, Any]


class TablesRecord(_Strict):
    """A compacted collection.

    Attributes:
        kind: whether bags are pooled.
        is_weighted: whether ids carry weights.
        need_indices: whether an unpooled collection hands the ids along.
        tables: the logical tables; hashes are salted by their names.
        plan: which method holds which of them.
        row_types: how each physical table is stored.
        bytes: what their tensors take in the file.
    """

    kind: Literal["pooled", "unpooled"]
    is_weighted: bool = False
    need_indices: bool = False
    tables: list[LogicalTable]
    plan: list[PlanEntry]
    row_types: dict[str, RowType]
    bytes: int = Field(ge=0)

    def configs(self) -> list[Any]:
        """The tables as TorchRec's configs."""
        return [_torchrec_config(table, self.kind) for table in self.tables]

    def resolved_plan(self, source: str) -> ResolvedPlan:
        """The method of every table.

        Args:
            source: where this stands, for errors.
        """
        document = [entry.model_dump() for entry in self.plan]
        return plan_from_document(document, specs_from_configs(self.configs()), source=source)

    @classmethod
    def of(
        cls,
        plan: ResolvedPlan,
        row_types: dict[str, RowType],
        *,
        kind: Literal["pooled", "unpooled"],
        is_weighted: bool,
        need_indices: bool,
        size: int,
    ) -> Self:
        """Describe a collection of that plan."""
        return cls(
            kind=kind,
            is_weighted=is_weighted,
            need_indices=need_indices,
            tables=[_logical_table(table) for table in plan.tables],
            plan=[PlanEntry(**entry) for entry in plan_to_document(plan)],
            row_types=row_types,
            bytes=size,
        )


class ModelRecord(_Strict):
    """A CTR model: its name in `embcomp.models.MODELS`, its settings and its inputs."""

    name: str
    settings: dict[str, Any]
    feature_names: list[str]
    embedding_dim: int
    num_dense: int
    pooling: Literal["sum", "mean"]


class DatasetRecord(_Strict):
    """The dataset that ids come from.

    Attributes:
        name: its name.
        fingerprint: the SHA-256 of its `dataset.json`.
        renumbered: features whose ids are not the dataset's own any more.
    """

    name: str
    fingerprint: str
    renumbered: list[str] = []


class ProgramRecord(_Strict):
    """What `program.pt2` takes and gives, each with its shape."""

    inputs: dict[str, str]
    outputs: dict[str, str]


class FileChecksum(_Strict):
    """A file's size and CRC-32; that of a file of tensors covers its header only."""

    bytes: int = Field(ge=0)
    crc32: str


class ArtefactConfig(_Strict):
    """The content of `config.json`.

    Attributes:
        embcomp_version: what wrote it.
        row_type: the row type asked for, or types by table and a `default`; `row_types` of the
            tables say what they got.
        tables: the collection, or the model's embedding tables where it has them.
        first_order: the model's first-order tables where it has them.
        model: the network; None for a collection alone.
        dataset: where the ids come from, where that is known.
        budget: the bytes that the embedding tables were to stay within.
        network_bytes: what the network's tensors take in the file.
        program: what `program.pt2` takes, where there is one.
        tensors: the checksum of each tensor, by its name in `model.safetensors`.
        files: the size and checksum of each file beside this one.
        digest: the SHA-256 of this file with an empty text here: of the whole artefact, as every
            other file's checksum is in it.
    """

    format: Literal["embcomp artefact"] = "embcomp artefact"
    format_version: int = FORMAT_VERSION
    embcomp_version: str
    row_type: RowType | dict[str, RowType]
    tables: TablesRecord | None = None
    first_order: TablesRecord | None = None
    model: ModelRecord | None = None
    dataset: DatasetRecord | None = None
    budget: int | None = None
    network_bytes: int = 0
    program: ProgramRecord | None = None
    tensors: dict[str, str] = {}
    files: dict[InnerPath, FileChecksum] = {}
    digest: str = ""  # the last field, so that it can be found in the text

    def to_json(self) -> str:
        """The file's text, its digest in it."""
        blank = self.model_copy(update={"digest": ""})
        text = json.dumps(blank.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        before, _, after = _parted(text)
        return before + _sha256(text) + after

    @classmethod
    def read(cls, folder: Path, *, verify: bool = True) -> ArtefactConfig:
        """Read `folder/config.json`.

        Args:
            folder: the artefact's.
            verify: whether to refuse a text that is not the one that was written.

        Raises:
            ArtefactError: the folder is no artefact, is damaged, or has another version.
        """
        path = folder / CONFIG_FILE
        if not folder.exists():
            raise ArtefactError(f"{folder} does not exist; `embcomp export` makes an artefact")
        if not path.is_file():
            raise ArtefactError(
                f"{folder} is not an artefact: it has no {CONFIG_FILE}; `embcomp export RUN` "
                "makes one of a finished run"
            )
        try:
            text = path.read_bytes().decode("utf-8")
            content = json.loads(text)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ArtefactError(
                f"{path} is not JSON ({one_line(error)}); export the run again"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ArtefactError(f"{path} does not describe an artefact of embcomp")
        version = content.get("format_version")
        if version not in _READ_VERSIONS:
            way_out = (
                "it knew tables by their places, not their names; train and export again"
                if version == 1
                else "export the run again"
            )
            known = " and ".join(map(str, _READ_VERSIONS))
            raise ArtefactError(
                f"{path} has format_version {version!r}; this embcomp reads {known}: "
                f"{way_out}, or use the embcomp that wrote it "
                f"({content.get('embcomp_version', 'unknown')})"
            )
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise ArtefactError(f"{path} is damaged: {problems}; export the run again") from None
        if verify:
            config._check_digest(text, path)
        return config

    def _check_digest(self, text: str, path: Path) -> None:
        before, stated, after = _parted(text)
        if stated == _sha256(before + after):
            return
        try:
            self._check_meaning(str(path))
        except EmbcompError:  # it says more than that something differs
            raise
        except _BROKEN:
            pass  # the digest is what can be said
        raise ArtefactError(
            f"{path} is damaged or was changed: its digest is not that of its text; copy the whole "
            "folder again, or export the run again"
        )

    def _check_meaning(self, source: str) -> None:
        """Name what this version could not make sense of, before anything is built."""
        if self.tables is None and self.model is None:
            raise ArtefactError(f"{source} describes neither tables nor a model")
        for record in (self.tables, self.first_order):
            if record is not None:
                record.resolved_plan(source)


_BROKEN = (ArithmeticError, AssertionError, LookupError, MemoryError, TypeError, ValueError)
"""What reading a damaged description may end with, beside errors of ours."""
_DIGEST = '"digest": "'


def _parted(text: str) -> tuple[str, str, str]:
    """A description's text before its digest, the digest, and the text after it."""
    before, key, rest = text.rpartition(_DIGEST)
    stated, quote, after = rest.partition('"')
    return before + key, stated, quote + after


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _logical_table(table: TableSpec) -> LogicalTable:
    return LogicalTable(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        pooling="mean" if table.mean_pooling else "sum",
        data_type="fp16" if table.data_type is DataType.FP16 else "fp32",
    )


def _torchrec_config(table: LogicalTable, kind: str) -> BaseEmbeddingConfig:
    data_type = DataType.FP16 if table.data_type == "fp16" else DataType.FP32
    if kind == "unpooled":
        return EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
            data_type=data_type,
        )
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        data_type=data_type,
        pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
    )
