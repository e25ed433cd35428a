"""The description of a prepared dataset, from what its passes found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import pyarrow as pa

from embcomp.data_pipelines.bayes_metrics import read_bayes
from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.encoding import PartRows, unseen_rates
from embcomp.data_pipelines.preparing.features import Feature, Features
from embcomp.data_pipelines.preparing.index_pass import InputIndex
from embcomp.data_pipelines.preparing.numeric_figures import numeric_features
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.vocabulary import Ranked, vocabulary_file
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    BayesMetrics,
    CategoricalFeature,
    DatasetInfo,
    FileRecord,
    NumericFeature,
    SplitInfo,
)
from embcomp.data_pipelines.splits import SPLITS
from embcomp.io.reproducible_sums import to_digits


def versions() -> dict[str, str]:
    """Return the versions that the bytes of a dataset depend on: Arrow's writer names itself."""
    return {"embcomp": version("embcomp"), "pyarrow": pa.__version__}


def describe(
    settings: PrepareSettings,
    index: InputIndex,
    counts: PartCounts,
    ranked: Sequence[Ranked],
    parts: Sequence[PartRows],
) -> DatasetInfo:
    """Return what `dataset.json` says.

    Args:
        settings: what the call was asked for.
        index: what the index pass found.
        counts: what the count pass found.
        ranked: for each categorical feature, its vocabulary.
        parts: for each part, the rows that were written.
    """
    bayes = read_bayes([file.path for file in settings.table.files], settings.rule)
    return DatasetInfo(
        name=settings.name,
        weight=WEIGHT_COLUMN if settings.features.weighted else None,
        group=settings.group,
        numeric=_numeric(settings, counts, parts),
        categorical=_categorical(settings, counts, ranked),
        splits=_splits(counts, parts, weighted=settings.features.weighted),
        split_rule=settings.rule.model_dump(),
        raw_rows=index.rows,
        bad_rows=len(counts.bad),
        dropped_rows=counts.dropped,
        sources=index.sources,
        versions=versions(),
        raw_format=settings.raw_format,
        bayes=BayesMetrics(**bayes) if bayes else None,
        extends=None if settings.growth is None else settings.growth.record,
        checksums=_checksums(settings.features, ranked, parts),
    )


def _numeric(
    settings: PrepareSettings, counts: PartCounts, parts: Sequence[PartRows]
) -> list[NumericFeature]:
    return [
        feature.model_copy(
            update={"clipped": sum(part.clipped.get(feature.name, 0) for part in parts)}
        )
        for feature in numeric_features(settings, counts)
    ]


def _categorical(
    settings: PrepareSettings, counts: PartCounts, ranked: Sequence[Ranked]
) -> list[CategoricalFeature]:
    described = []
    features, growth, before = settings.features, settings.growth, settings.before
    for place, (feature, found) in enumerate(zip(features.categorical, ranked)):
        size, room = found.used, None
        if growth is not None and not feature.hashed:
            earlier = 0 if before is None else before.categorical[place].num_embeddings
            size = growth.num_embeddings(found.used, earlier)
            room = size - FIRST_ID - found.kept
        if feature.num_embeddings is not None:
            room = feature.num_embeddings - FIRST_ID - found.kept
        figures = counts.categorical[feature.name]
        length = figures.train_values / counts.rows[0] if feature.multi_valued else 1.0
        described.append(
            CategoricalFeature(
                name=feature.name,
                num_embeddings=size,
                multi_valued=feature.multi_valued,
                min_count=feature.min_count,
                max_length=figures.max_length,
                mean_length=length,
                num_raw_values=found.raw_values,
                frequency_quantiles=found.quantiles,
                vocabulary="" if feature.hashed else vocabulary_file(feature.name, place),
                encode=_encode(feature),
                missing=figures.missing,
                room=room,
                change=found.change,
            )
        )
    return described


def _encode(feature: Feature) -> Literal["hash", "ids"] | None:
    if feature.num_embeddings is not None:
        return "ids"
    return "hash" if feature.hashed else None


def _splits(
    counts: PartCounts, parts: Sequence[PartRows], *, weighted: bool
) -> dict[str, SplitInfo]:
    return {
        split: SplitInfo(
            files=[part.files[split] for part in parts if split in part.files],
            rows=counts.rows[code],
            positives=counts.positives[code],
            weight=to_digits(counts.weights[code]) if weighted else None,
            unseen_rate=dict(unseen_rates(parts, split)),
        )
        for code, split in enumerate(SPLITS)
    }


def _checksums(
    features: Features, ranked: Sequence[Ranked], parts: Sequence[PartRows]
) -> dict[str, FileRecord]:
    rows = {
        part.files[split]: part.records[split]
        for split in SPLITS
        for part in parts
        if split in part.files
    }
    vocabularies = {
        vocabulary_file(feature.name, place): found.record
        for place, (feature, found) in enumerate(zip(features.categorical, ranked))
        if found.record is not None
    }
    return rows | vocabularies
