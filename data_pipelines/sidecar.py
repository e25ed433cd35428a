"""`truth.json`: what a generator of raw data knows about the best figures that a model can reach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from embcomp.data_pipelines.splits import SplitRule
from embcomp.errors import DataError


def read_bayes(files: Sequence[Path], rule: SplitRule) -> dict[str, float] | None:
    """Return `{"auc": ..., "log_loss": ...}` of the test split from the files' sidecar, if any.

    The sidecar is `<file>.truth.json`, or `truth.json` in the files' folder. Its `split_rule`
    names the rule whose test rows the figures are of: under another rule they mean nothing and are
    left out. A sidecar without a rule is taken at its word.
    """
    candidates = [files[0].with_name(files[0].name + ".truth.json")]
    candidates.append(files[0].parent / "truth.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bayes = content.get("bayes")
        expected = content.get("split_rule")
        if bayes is None or (expected is not None and expected != rule.model_dump()):
            return None
        return {"auc": float(bayes["auc"]), "log_loss": float(bayes["log_loss"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a truth file ({error!r}); expected "
            f'{{"bayes": {{"auc": ..., "log_loss": ...}}}}'
        ) from None
