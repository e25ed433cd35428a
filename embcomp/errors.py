"""The errors that a user can cause. Each says what was expected, what came, where, and the way out."""

from __future__ import annotations


class EmbcompError(ValueError):
    """Base of every error that is the input's fault; the command line prints it without a traceback."""


class ConfigError(EmbcompError):
    """A configuration that cannot run: an unknown key, a wrong type, an impossible combination."""


class DataError(EmbcompError):
    """Input data that cannot be read or does not agree with its description."""


class BudgetError(EmbcompError):
    """A byte budget that no configuration of the method can meet; the text names the floor.

    Args:
        fact: what cannot be, and the floor.
        way_out: what to change, for those who have nothing better to say.
    """

    def __init__(self, fact: str, way_out: str = "") -> None:
        super().__init__(f"{fact} {way_out}" if way_out else fact)
        self.fact = fact


class CheckpointError(EmbcompError):
    """A checkpoint or run folder that does not belong to the run that asks for it."""


class ArtefactError(EmbcompError):
    """An exported folder that is missing, damaged, of another version, or not what was asked for."""


class ParityError(EmbcompError):
    """An artefact that does not answer as the trained model does."""


_LONGEST_REASON = 300


def one_line(error: BaseException) -> str:
    """What a library's error says, in one line of bounded length, to be quoted in one of ours."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
