"""What methods share that cluster trained tables: who runs k-means, and sizes measured on the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from typing_extensions import Self, override

from embcomp.backends.base import SearchContext
from embcomp.backends.codebooks.clustering import id_weights
from embcomp.backends.codebooks.kmeans import Clustering, missing_for
from embcomp.backends.codebooks.measured_size import Size, TrainedSample, choose_size
from embcomp.backends.codebooks.vector_quantized import VectorQuantized
from embcomp.backends.stages import Stage
from embcomp.errors import ConfigError
from embcomp.io.constraints import Positive
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import TableSpec, by_name

MEASURE = Stage(
    name="size", purpose="choose the size that quantises the trained tables best", kind="search"
)
"""The stage in which a `measured` size is chosen."""

_MEASURED = 24  # sizes at most, those that are expected to lose least


@dataclass(frozen=True, kw_only=True)
class Clustered(VectorQuantized):
    """Full tables that are clustered once they are trained.

    Args:
        clustering: what runs k-means: `torch`, or `faiss` where it is installed.
        choose: how a budget's size is chosen: as `expected` of trained tables before there are
            any, or as `measured` on them, in a stage of its own; then what is planned is a bound.
        target_bytes: what a `measured` size may take; what a budget comes to.
    """

    clustering: Clustering = "torch"
    choose: Literal["expected", "measured"] = "expected"
    target_bytes: Annotated[int | None, Positive()] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_bytes is not None and not self.learns_size:
            raise ConfigError(
                f"{self.name}: target_bytes bounds a size that is measured; add choose: measured, or "
                "give a budget in its place"
            )
        if self.learns_size and self.target_bytes is None and self._sized_by_hand():
            raise ConfigError(
                f"{self.name}: choose: measured chooses {', '.join(self._sized_by_hand())} itself; give "
                "a budget alone"
            )

    def _sized_by_hand(self) -> list[str]:
        """The settings that are given of those that a measured size has."""
        chosen = ("subvector_dim", "num_codewords", "latent_dim")
        return [key for key in chosen if self.__dict__.get(key) is not None]

    def _open(self) -> Self:
        """This method with no size, to choose one as expected."""
        given = dict.fromkeys(self._sized_by_hand())
        return replace(self, choose="expected", target_bytes=None, **given)  # type: ignore[arg-type]

    @property
    def learns_size(self) -> bool:  # type: ignore[override]
        """Whether the serving form is found by training, so that its predicted bytes are a bound."""
        return self.choose == "measured"

    @override
    def missing(self) -> str | None:
        return missing_for(self.clustering)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        if not self.learns_size:
            return super().largest_within(tables, budget)
        found = self._open().largest_within(tables, budget)
        if found is None:
            return None
        full = sum(table.full_bytes for table in tables if found.keeps_full(table))
        return replace(found, choose="measured", target_bytes=max(1, budget - full))

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        if not self.learns_size:
            return super().smallest(tables)
        least = self._open().smallest(tables)
        found = self.largest_within(tables, least.serve_bytes(tables))
        assert found is not None, "the smallest size fits itself"
        return found

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        small = [table for table in tables if not self.keeps_full(table)]
        return super().footprint(tables) + self._spare(small)

    def _spare(self, tables: Sequence[TableSpec]) -> Footprint:
        """What a measured size may take beyond the planned one."""
        left = (self.target_bytes or 0) - self.coded_bytes(tables) if tables else 0
        if left <= 0:
            return Footprint()
        bound = TensorFootprint(
            name=f"{tables[0].name}.spare",
            role="codes",
            rows=1,
            columns=left,
            itemsize=1,
            train_columns=0,
            lookup=False,
            trained=False,
        )
        return Footprint((bound,))

    def settled(self, results: Mapping[str, Mapping[str, Any]]) -> Self:
        """This method in the size that was measured to be best, once one was.

        Args:
            results: what earlier search stages found, by stage.
        """
        found = results.get(MEASURE.name)
        if found is None:
            return self
        return self._open()._sized(
            found["subvector_dim"], found["num_codewords"], found["latent_dim"]
        )

    def sizes_to_measure(self, tables: Sequence[TableSpec]) -> list[Size]:
        """For each width of sub-vectors and latents the most codewords that fit.

        Args:
            tables: the group, without those that stay full.
        """
        limit = max(self.coded_bytes(tables), self.target_bytes or 0)
        found: list[tuple[float, int, Size]] = []
        for alike in self._open().sizes(tables):
            costs = ((each, each.coded_bytes(tables)) for each in alike)
            fitting = next(((each, cost) for each, cost in costs if cost <= limit), None)
            if fitting is None:
                continue
            sized, cost = fitting
            size = Size(
                subvector_dim=sized.width,
                num_codewords=sized.codewords,
                latent_dim=sized.expected_latent,
                bytes=cost,
            )
            found.append((sized.expected_distortion(tables), len(found), size))
        return [size for _, _, size in sorted(found, key=lambda each: each[:2])[:_MEASURED]]

    @override
    def search(
        self, stage: Stage, tables: Sequence[TableSpec], context: SearchContext
    ) -> Mapping[str, Any]:
        tables = by_name(tables)
        sample = TrainedSample.of(
            tables,
            {table.name: context.form.rows(table.name) for table in tables},
            id_weights(tables, context.counts),
            seed=self.seed,
            work=context.work,
        )

        def error(size: Size) -> float:
            return sample.error(
                replace(self, subvector_dim=size.subvector_dim).layout(tables),
                latent=size.latent_dim,
                codewords=size.num_codewords,
                scaled=self.scaled,
                seed=self.seed,
                backend=self.clustering,
            )

        choice = choose_size(self.sizes_to_measure(tables), error)
        for line in choice.lines():
            context.say(line)
        return choice.document()
