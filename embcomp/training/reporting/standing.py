"""Where an unfinished run stands, read from its folder alone: no config, no dataset, no torch."""

from __future__ import annotations

from pathlib import Path


def standing_of(folder: Path) -> str:
    """What of a run is kept, and how to go on with it.

    Args:
        folder: the run's folder, which may not exist.
    """
    if (folder / "report.json").exists():
        return f"{folder} is finished"
    for place in reversed([folder, *_stage_folders(folder)]):
        stage = "" if place == folder else f" of stage {place.name}"
        if (place / "done.json").exists():
            return f"{folder} has finished stage {place.name}; the same command goes on after it"
        steps = sorted((place / "checkpoints").glob("step-*"))
        if steps:
            step = int(steps[-1].name.removeprefix("step-"))
            return f"{folder} is kept up to step {step}{stage}; the same command goes on from there"
        if (place / "progress.json").exists():
            return (
                f"{folder} is kept with what{stage} has found; the same command goes on from there"
            )
    return f"{folder} has no checkpoint yet; the same command begins again"


def _stage_folders(folder: Path) -> list[Path]:
    """The folders of a run's stages, in the order of the stages."""
    found = [path for path in folder.glob("stages/*-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[0]))
