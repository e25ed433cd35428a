"""What a search's trials stand for: candidates that an evaluator scores."""

from __future__ import annotations

from typing import Any

from optuna.trial import Trial
from typing_extensions import override

from embcomp.config.train_config import is_loss
from embcomp.search.attempts import KIND, RETRY_OF, latest_attempts, number_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.evaluators.base import Evaluator, Rung, Task, TrialHandle, TrialResult
from embcomp.search.evaluators.trial_pruning import falls_behind
from embcomp.search.samplers.optuna_sampler import RepairedSampler
from embcomp.search.space.repair import Repair
from embcomp.search.trials.trial_queue import TrialQueue
from embcomp.search.trials.worker import RUNGS, RunningTrial, TrialRunner


class CandidateJobs(TrialRunner):
    """The trials of a search.

    Args:
        config: the search.
        queue: its study.
        sampler: the study's sampler.
        repair: the limits.
        evaluator: scores candidates.
    """

    def __init__(
        self,
        config: SearchConfig,
        queue: TrialQueue,
        sampler: RepairedSampler,
        repair: Repair,
        evaluator: Evaluator,
    ) -> None:
        self._config, self._queue, self._sampler = config, queue, sampler
        self._repair, self._evaluator = repair, evaluator
        self._sign = -1 if is_loss(config.quality) else 1

    @override
    def ready(self) -> bool:
        tried = self._sampler.tried(self._queue.study)
        return self._sampler.source.ready(len(tried), tried)

    @override
    def start(self, trial: Trial, slot: int) -> TrialHandle | None:
        if self._sampler.exhausted and RETRY_OF not in trial.user_attrs:
            return None
        candidate = self._sampler.encoding.decode(trial.params)
        cost = self._repair.costs.of(candidate)
        assert cost.serve <= self._repair.budget and self._repair.devices.fits(candidate)
        # A study without parameters, as that of `gradient`, asks its sampler for nothing.
        kind = self._sampler.kinds.get(trial.number, self._config.sampler.name)
        trial.set_user_attr(KIND, trial.user_attrs.get(KIND) or kind)
        trial.set_user_attr("serve_bytes", cost.serve)
        trial.set_user_attr("train_bytes", cost.train)
        trial.set_user_attr("options", self._repair.space.labels(candidate))
        return self._evaluator.start(Task(number=number_of(trial), candidate=candidate, slot=slot))

    @override
    def why_ended(self) -> str:
        return self._sampler.exhausted_because

    @override
    def is_behind(self, hand: RunningTrial, rung: Rung) -> bool:
        rungs = self._config.fidelity.rungs
        if rungs is None:
            return False
        if len(self._config.objectives) == 1:
            hand.trial.report(rung.quality, rung.step)
            return hand.trial.should_prune()
        key = str(rung.step)
        peers = [
            self._point(trial.user_attrs[RUNGS][key], trial.user_attrs["serve_bytes"])
            for trial in latest_attempts(self._queue.study)
            if key in trial.user_attrs.get(RUNGS, {}) and trial.number != hand.trial.number
        ]
        point = self._point(rung.quality, hand.trial.user_attrs["serve_bytes"])
        return falls_behind(point, peers, rungs.reduction)

    def _point(self, quality: float, serve_bytes: int) -> tuple[float, ...]:
        costs = (float(serve_bytes),) if "bytes" in self._config.objectives else ()
        return (-self._sign * quality, *costs)

    @override
    def values(self, trial: Trial, outcome: TrialResult) -> list[float]:
        known: dict[str, Any] = {
            self._config.quality: outcome.quality,
            "bytes": trial.user_attrs["serve_bytes"],
            "latency": outcome.latency,
        }
        return [float(known[name]) for name in self._config.objectives]

    @override
    def line(self, trial: Trial, outcome: TrialResult, what: str) -> str:
        score = "" if outcome.quality is None else f"{self._config.quality} {outcome.quality:.6f}"
        size = f"{trial.user_attrs['serve_bytes']:,} bytes"
        parts = [what, outcome.message, score, size, f"{outcome.seconds:.0f} s"]
        kind = trial.user_attrs[KIND]
        return f"candidate {number_of(trial)} ({kind}): {', '.join(p for p in parts if p)}"
