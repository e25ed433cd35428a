"""A long step says how far it is, how long it will take, and for whom it waits."""

from __future__ import annotations

from embcomp.training.stages import work_progress
from embcomp.training.stages.work_progress import WorkProgress


def test_a_long_step_says_how_long_it_will_take_and_a_short_one_nothing(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(work_progress.time, "monotonic", lambda: clock[0])
    progress = WorkProgress("2-codes", lines.append)
    progress.begin("short", 3)
    for _ in range(3):
        clock[0] += 1
        progress.advance()
    progress.end()
    assert lines == []
    progress.begin("codes", 100)
    for _ in range(50):
        clock[0] += 60
        progress.advance()
    assert lines[0] == "2-codes, codes: 1 of 100 blocks, 99 min left"
    assert lines[-1] == "2-codes, codes: 50 of 100 blocks, 50 min left"
    clock[0] += 29
    progress.wait([1, 3])
    clock[0] += 2
    progress.wait([1, 3])
    assert lines[-1] == "2-codes, codes: waits for rank 1, 3"
    assert len(lines) == 51
    clock[0] += 7200
    progress.end()
    assert lines[-1] == "2-codes, codes: done in 2 h 51 min"
