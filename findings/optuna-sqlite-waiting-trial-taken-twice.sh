#!/usr/bin/env bash
# Two workers of one Optuna study on SQLite can both be told that they have taken the same waiting trial.
#
# Optuna 5.0.0, SQLAlchemy 2.1.9, Python 3.11 with its own sqlite3.
#
# `study.ask()` takes an enqueued trial by `storage.set_trial_state_values(id, RUNNING)`, which promises False to
# whoever comes second. RDBStorage reads the trial with SELECT ... FOR UPDATE and then writes it. SQLite has no
# FOR UPDATE, and Python's driver begins a transaction at the first change only, so two processes may both read
# WAITING before either writes, and both calls return True: the trial is run twice. Here the second process is
# held between its read and its write by an event of SQLAlchemy, no more; the first does its whole call meanwhile.
#
# Seen: first True, second True
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==5.0.0 sqlalchemy==2.1.9
cat > "$folder/check.py" <<'PY'
import multiprocessing, sys
import optuna
from optuna.trial import TrialState
from sqlalchemy import event

optuna.logging.set_verbosity(optuna.logging.ERROR)
URL = f"sqlite:///{sys.argv[1]}"


def second(has_read, may_write, answer):
    storage = optuna.storages.RDBStorage(URL)
    trial = storage.get_all_trials(storage.get_study_id_from_name("s"))[0]

    @event.listens_for(storage.engine, "before_cursor_execute")
    def hold(connection, cursor, statement, parameters, context, many):
        if statement.lstrip().upper().startswith("UPDATE TRIALS"):
            has_read.set()
            may_write.wait(20)

    answer.put(storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING))


if __name__ == "__main__":
    study = optuna.create_study(study_name="s", storage=URL)
    study.enqueue_trial({"x": 1.0})
    context = multiprocessing.get_context("spawn")
    has_read, may_write, answer = context.Event(), context.Event(), context.Queue()
    other = context.Process(target=second, args=(has_read, may_write, answer))
    other.start()
    assert has_read.wait(60)
    storage = optuna.storages.RDBStorage(URL)
    trial = storage.get_all_trials(storage.get_study_id_from_name("s"))[0]
    first = storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    may_write.set()
    found = answer.get(timeout=60)
    other.join()
    print(f"first {first}, second {found}")
    sys.exit(0 if (first, found) == (True, True) else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/study.db"
