"""What whoever prepared a dataset should hear about its values."""

from __future__ import annotations

from embcomp.data_pipelines.schema import FIRST_ID, DatasetInfo, NumericFeature


def value_news(info: DatasetInfo) -> list[str]:
    """Say which numbers a transform could not represent, and which ids no split shares."""
    return clipped_news(info) + unseen_news(info) + growth_news(info)


def growth_news(info: DatasetInfo) -> list[str]:
    """Say what changed since the dataset that this one extends, and where room is short."""
    if info.extends is None:
        return []
    changes = [feature.change for feature in info.categorical if feature.change is not None]
    room = sum(feature.room or 0 for feature in info.categorical)
    kept, new = sum(each.kept for each in changes), sum(each.new for each in changes)
    retired = sum(each.retired for each in changes)
    line = (
        f"day {info.extends.day}, after {info.extends.name}: {kept:,} values kept, {new:,} new, "
        f"{retired:,} retired; room for {room:,} more"
    )
    return [line]


def clipped_news(info: DatasetInfo) -> list[str]:
    """Say, for each feature, what became of values that its transform could not represent."""
    rows = sum(split.rows for split in info.splits.values())
    return [_news(f, rows - f.missing) for f in info.numeric if f.clipped]


def _news(feature: NumericFeature, values: int) -> str:
    share = f"{feature.name}: {feature.clipped:,} of {values:,} values"
    if feature.transform in ("log1p", "standard_log"):
        return (
            f"{share} are negative, and {feature.transform} makes 0 of them; to keep them apart "
            f"take none, min_max or bucket (--numeric {feature.name}=none)"
        )
    if feature.transform == "min_max":
        return (
            f"{share} lie outside the range of the train split, {feature.min:g} to "
            f"{feature.max:g}, and are clipped to it"
        )
    return (
        f"{share} are beyond the numbers of float32 and are clipped to the largest; take another "
        f"transform (--numeric {feature.name}=log1p)"
    )


def unseen_news(info: DatasetInfo) -> list[str]:
    """Name the features of which a split holds no value that the train split knows."""
    return [
        f"{feature.name}: no value of the {name} split is known from train; are its values written "
        f"in another way there, as 3.0 for 3?"
        for name, split in info.splits.items()
        for feature in info.categorical
        if split.unseen_rate.get(feature.name) == 1.0 and feature.num_embeddings > FIRST_ID
    ]
