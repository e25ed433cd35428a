"""`dataset.json`: what a prepared dataset folder says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from embcomp.data_pipelines.description import (
    DATASET_FILE,
    FilePath,
    is_file,
    read_description,
)
from embcomp.errors import DataError
from embcomp.io.atomic_files import write_atomically
from embcomp.io.digests import sha256_of_json
from embcomp.io.remote_paths import as_path

FORMAT_VERSION = 1
FILE_NAME = DATASET_FILE

MISSING_ID = 0
"""The id of a value that is absent from the raw row."""
UNSEEN_ID = 1
"""The id of a value that the train split lacks, or holds less than `min_count` times."""
FIRST_ID = 2
"""The id of the most frequent value; the others follow by descending train frequency."""
LARGEST_ID = 2**31 - 1
"""Ids are kept in 32 bits."""

NumericTransform = Literal["none", "log1p", "standard_log", "min_max"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)
    unsaid: ClassVar[tuple[str, ...]] = ()
    """Fields that are not written where they are None, so that older descriptions keep their digests."""

    @model_serializer(mode="wrap")
    def _without_unsaid(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {k: v for k, v in content.items() if v is not None or k not in self.unsaid}


class NumericFeature(_Strict):
    """A Float32 column that already went through its transform.

    `none` keeps x; `log1p` is log(1 + max(x, 0)); `standard_log` is (log1p(x) - mean) / std;
    `min_max` is (x - min) / (max - min), clipped to [0, 1]. Mean, std, min and max come from the
    train split. A missing value is written as 0. `clipped` counts the values of all splits that the
    transform cannot tell apart: negative ones under a logarithm, those outside the train split's
    range under `min_max`, those beyond float32 under `none`.
    """

    name: str
    transform: NumericTransform = "none"
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    missing: int = Field(default=0, ge=0)
    clipped: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_constants(self) -> NumericFeature:
        needed = {"standard_log": ("mean", "std"), "min_max": ("min", "max")}
        constants = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        absent = [key for key in needed.get(self.transform, ()) if constants[key] is None]
        if absent:
            raise ValueError(
                f"numeric feature {self.name!r}: transform {self.transform!r} needs {absent}"
            )
        return self


class VocabularyChange(_Strict):
    """What became of an earlier dataset's values of a feature.

    `kept` of them are in this one too, `unseen` of these not in its train split; `retired` ones are not,
    as they were unseen for too long; `new` values came.
    """

    kept: int = Field(ge=0)
    new: int = Field(ge=0)
    retired: int = Field(ge=0)
    unseen: int = Field(ge=0)


class CategoricalFeature(_Strict):
    """An Int32 column of ids, or a List(Int32) one when `multi_valued`.

    `num_embeddings` counts ids 0 (missing) and 1 (unseen or rare) too, so every id is below it.
    `frequency_quantiles` maps a share such as "0.5" to the smallest id such that the ids up to it
    carry that share of the feature's values in the train split.
    `missing` counts the rows without a value in all splits, `num_raw_values` the distinct train
    values before `min_count` was applied.
    `encode` of "hash" makes ids hashes of the values, so that there is no vocabulary: `hashed_ids`. That of
    "ids" says that values are ids already: the vocabulary has those of the train split.
    `room` counts the ids that no value has yet, in a dataset that is to grow; `change` says what became
    of the values of the dataset that it extends.
    """

    unsaid = ("room", "change", "encode")

    name: str
    num_embeddings: int = Field(ge=FIRST_ID)
    multi_valued: bool = False
    min_count: int = Field(default=1, ge=1)
    max_length: int = Field(default=1, ge=0)
    mean_length: float = Field(default=1.0, ge=0)
    num_raw_values: int = Field(default=0, ge=0)
    frequency_quantiles: dict[str, int] = Field(default_factory=dict)
    vocabulary: FilePath = ""
    missing: int = Field(default=0, ge=0)
    encode: Literal["hash", "ids"] | None = None
    room: int | None = Field(default=None, ge=0)
    change: VocabularyChange | None = None

    @property
    def is_hashed(self) -> bool:
        """Whether ids are hashes of values."""
        return self.encode == "hash"

    @property
    def holds_ids(self) -> bool:
        """Whether values are ids already."""
        return self.encode == "ids"

    @property
    def num_values(self) -> int:
        """How many values the vocabulary has."""
        return self.num_embeddings - FIRST_ID - (self.room or 0)

    @model_validator(mode="after")
    def _has_so_many_ids(self) -> CategoricalFeature:
        most, why = LARGEST_ID + 1, "as ids have 31 bits"
        if self.num_raw_values:
            idle = 0 if self.change is None else self.change.kept
            values = self.num_raw_values + FIRST_ID + (self.room or 0) + idle
            beside = "" if self.room is None else ", its room and the values kept from before"
            most, why = min(
                (most, why), (values, f"{FIRST_ID} more than its num_raw_values{beside}")
            )
        if self.num_embeddings > most:
            raise ValueError(
                f"feature {self.name!r} has num_embeddings {self.num_embeddings}, which can be "
                f"{most} at most, {why}"
            )
        if self.num_values < 0:
            raise ValueError(
                f"feature {self.name!r} has num_embeddings {self.num_embeddings} and room for "
                f"{self.room} more values, which leaves none of {FIRST_ID} ids for no value"
            )
        return self


class SplitInfo(_Strict):
    """The Parquet files of one split, relative to the folder and in row order, and their counts.

    `unseen_rate` is, by feature, the share of its values that got id 1. `weight` is the sum of the
    rows' weights; None in a dataset without weights.
    """

    unsaid = ("weight",)

    files: list[FilePath]
    rows: int = Field(ge=0)
    positives: int = Field(ge=0)
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    unseen_rate: dict[str, float] = Field(default_factory=dict)

    @property
    def label_rate(self) -> float:
        """The share of labels that are 1; NaN where there is no row."""
        return self.positives / self.rows if self.rows else float("nan")


class FileRecord(_Strict):
    """What a file of the dataset was when it was written.

    `footer_sha256` is of the Parquet footer alone, which is quick to compare. `rows` counts all
    rows, `positives` the labels that are 1; a vocabulary has none.
    """

    bytes: int = Field(ge=0)
    sha256: str
    footer_sha256: str
    rows: int = Field(ge=0)
    positives: int | None = Field(default=None, ge=0)


class SourceFile(_Strict):
    """A raw file that the dataset was made from; `sha256` is of its bytes as they lie on disk.

    `digest` is of the other three: where raw files lie is no part of the dataset's own digest.
    """

    path: str
    bytes: int = Field(ge=0)
    sha256: str
    digest: str = ""

    def own_digest(self) -> str:
        """What `digest` has to be."""
        return sha256_of_json([self.path, self.bytes, self.sha256])


class RawFormat(_Strict):
    """How the dataset's raw rows were read, so that further rows can be read alike.

    `importer` is None where it was someone's own, `options` are what it was told or found out: a
    table's schema, or what libFM tokens are. `bucketed` are the features that are numbers there.
    """

    importer: str | None
    options: dict[str, Any] = Field(default_factory=dict)
    bucketed: list[str] = Field(default_factory=list)


class Extended(_Strict):
    """The dataset whose vocabularies went on in this one.

    `day` counts the datasets of the chain, this one included; `decay` multiplied earlier counts, and
    values that were unseen in `retire_after` datasets in a row lost their ids.
    """

    name: str
    digest: str
    day: int = Field(ge=2)
    decay: float = Field(ge=0, le=1)
    retire_after: int | None = Field(default=None, ge=1)


class BayesMetrics(_Strict):
    """The best figures that any model can reach on the test split; known for generated data only."""

    auc: float
    log_loss: float


class DatasetInfo(_Strict):
    """The content of `dataset.json`.

    Of the `raw_rows` that were read, `bad_rows` were malformed and `dropped_rows` left out by the
    label rule. `checksums` has a record for each file, `digest` is the SHA-256 of all of this but
    `sources`; datasets that were prepared before there were any have neither, nor a `raw_format`.
    `weight` is the column of the rows' weights, if they have any; `extends` says which dataset's
    vocabularies went on.
    """

    unsaid = ("weight", "extends")

    format_version: int = FORMAT_VERSION
    name: str
    label: str = "label"
    weight: str | None = None
    group: str | None = None
    numeric: list[NumericFeature] = Field(default_factory=list)
    categorical: list[CategoricalFeature] = Field(default_factory=list)
    splits: dict[str, SplitInfo]
    split_rule: dict[str, object] = Field(default_factory=dict)
    raw_rows: int = Field(default=0, ge=0)
    bad_rows: int = Field(default=0, ge=0)
    dropped_rows: int = Field(default=0, ge=0)
    sources: list[SourceFile] = Field(default_factory=list)
    raw_format: RawFormat | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    bayes: BayesMetrics | None = None
    extends: Extended | None = None
    checksums: dict[FilePath, FileRecord] = Field(default_factory=dict)
    digest: str = ""
    _folder: Path | None = PrivateAttr(default=None)
    _is_as_written: bool = PrivateAttr(default=True)

    @model_validator(mode="after")
    def _names_agree(self) -> DatasetInfo:
        names = self.column_names
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"column names used twice: {double}")
        if self.group is not None and self.group not in self.categorical_names:
            raise ValueError(
                f"group {self.group!r} is not a categorical feature; there are "
                f"{self.categorical_names}"
            )
        weighted = self.weight is not None
        odd = [name for name, each in self.splits.items() if (each.weight is not None) != weighted]
        if odd:
            raise ValueError(
                f"the rows have weights in the column {self.weight!r}, but split {odd[0]!r} states "
                f"no sum of them"
                if weighted
                else f"split {odd[0]!r} states a sum of weights, but no column of them is named"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the dataset lies: set by `load` and `save`."""
        if self._folder is None:
            raise DataError(
                f"dataset {self.name!r} was not loaded from a folder; use DatasetInfo.load(folder)"
            )
        return self._folder

    @property
    def numeric_names(self) -> list[str]:
        """Names of the numeric features, in the dataset's order."""
        return [feature.name for feature in self.numeric]

    @property
    def categorical_names(self) -> list[str]:
        """Names of the categorical features, in the dataset's order."""
        return [feature.name for feature in self.categorical]

    @property
    def feature_names(self) -> list[str]:
        """Names of all features, numeric ones first."""
        return self.numeric_names + self.categorical_names

    @property
    def column_names(self) -> list[str]:
        """Names of all columns of the Parquet files, in their order."""
        weight = [] if self.weight is None else [self.weight]
        return [self.label, *weight, *self.feature_names]

    def split(self, name: str) -> SplitInfo:
        """Return one split, or raise a DataError that names those there are."""
        if name not in self.splits:
            raise DataError(
                f"dataset {self.name!r} has no split {name!r}; it has {sorted(self.splits)}"
            )
        return self.splits[name]

    @classmethod
    def load(cls, folder: str | Path) -> DatasetInfo:
        """Read `folder/dataset.json`.

        Raises:
            DataError: the file is missing, is not JSON, has another format version, disagrees
                with this schema, or names a Parquet file that is not there.
        """
        folder = as_path(folder)
        path = folder / FILE_NAME
        content = read_description(path)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version {version!r}; this embcomp reads {FORMAT_VERSION}: "
                f"prepare the dataset again, or use the embcomp that wrote it"
            )
        try:
            info = cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"{path} does not follow the schema:\n{_lines(error)}") from None
        info._folder = folder
        info._is_as_written = info._agrees(content)
        for relative in info.files():
            if not is_file(folder / relative):
                raise DataError(
                    f"{path} names {relative}, which is not in {folder}; copy the whole folder or "
                    f"prepare the dataset again"
                )
        return info

    def files(self) -> list[str]:
        """Every file that the dataset consists of, beside `dataset.json`, relative to the folder."""
        parts = [file for split in self.splits.values() for file in split.files]
        return parts + [f.vocabulary for f in self.categorical if f.vocabulary]

    def check_digest(self) -> None:
        """Raise a DataError when `dataset.json` is not as it was written."""
        if not self._is_as_written:
            raise DataError(
                f"{self.folder / FILE_NAME} was changed or damaged since it was written: its "
                f"content does not have its digest; copy it or prepare the dataset again (after an "
                f"edit of your own, take out the line of the digest)"
            )

    def _agrees(self, content: dict[str, Any]) -> bool:
        sources = all(source.digest in ("", source.own_digest()) for source in self.sources)
        return sources and self.digest in ("", _digest_of(content))

    def save(self, folder: str | Path) -> None:
        """Write `folder/dataset.json` atomically; equal content gives equal bytes."""
        folder = as_path(folder)
        kept = set(self.files())
        self.checksums = {file: each for file, each in self.checksums.items() if file in kept}
        for source in self.sources:
            source.digest = source.own_digest()
        self.digest = _digest_of(self.model_dump(mode="json"))
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / FILE_NAME, text)
        self._folder = folder
        self._is_as_written = True


def _digest_of(content: dict[str, Any]) -> str:
    return sha256_of_json({k: v for k, v in content.items() if k not in ("sources", "digest")})


def _lines(error: ValidationError) -> str:
    return "\n".join(
        f"  {'.'.join(str(part) for part in item['loc']) or '(top)'}: {item['msg']}"
        for item in error.errors()
    )
