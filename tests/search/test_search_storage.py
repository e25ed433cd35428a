"""A storage that is locked, gone, torn or another search's is named at once, and left as it is."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler

from embcomp.errors import ConfigError
from embcomp.search.trials.storage import (
    JournalLock,
    StorageError,
    explained,
    open_storage,
    open_study,
    without_password,
)


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def join(storage, identity, directions=("maximize",)):
    return open_study(storage, "s", directions, RandomSampler(seed=0), NopPruner(), identity)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_of_another_space_is_refused_with_what_changed(tmp_path, kind):
    url = None if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    identity = {"budget": 100, "space": {"C1": ["a", "b"]}}
    study = join(open_storage(url, tmp_path), identity)
    study.tell(study.ask(), 0.5)
    joined = join(open_storage(url, tmp_path), identity)
    assert len(joined.trials) == 1
    with pytest.raises(ConfigError) as error:
        join(open_storage(url, tmp_path), {"budget": 50, "space": {"C1": ["a"]}})
    assert 'budget: 100 -> 50; space.C1: ["a", "b"] -> ["a"]' in str(error.value)
    with pytest.raises(ConfigError, match="began as another search"):
        join(open_storage(url, tmp_path), identity, ("maximize", "minimize"))
    assert len(join(open_storage(url, tmp_path), identity).trials) == 1


def test_a_locked_journal_is_named_within_a_second_and_kept(tmp_path):
    join(open_storage(None, tmp_path), {})
    content = (tmp_path / "study.journal").read_bytes()
    holder = JournalLock(tmp_path / "study.journal")
    assert holder.acquire()
    begun = time.monotonic()
    with pytest.raises(StorageError, match="locked by another process"):
        open_storage(None, tmp_path)
    assert time.monotonic() - begun < 1.5
    assert (tmp_path / "study.journal").read_bytes() == content
    holder.release()
    assert join(open_storage(None, tmp_path), {}).study_name == "s"


def test_a_process_that_is_killed_while_it_writes_keeps_nobody_waiting(tmp_path):
    join(open_storage(None, tmp_path), {})
    code = (
        "import sys, time; from pathlib import Path; from embcomp.search.trials.storage import JournalLock\n"
        "JournalLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "study.journal")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="locked by another process"):
            open_storage(None, tmp_path)
        holder.kill()
    assert join(open_storage(None, tmp_path), {}).study_name == "s"


def test_a_line_that_a_dying_machine_left_unfinished_is_cut_off(tmp_path):
    study = join(open_storage(None, tmp_path), {})
    study.tell(study.ask(), 0.5)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 5, "worker_')
    again = join(open_storage(None, tmp_path), {})
    again.tell(again.ask(), 0.7)
    assert len(join(open_storage(None, tmp_path), {}).trials) == 2


def test_a_locked_sqlite_is_named_within_a_second(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    join(open_storage(url, tmp_path), {})
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"study\.db: database is locked; another program"):
        open_storage(url, tmp_path)
    assert time.monotonic() - begun < 1.5
    holder.execute("ROLLBACK")
    holder.close()
    assert join(open_storage(url, tmp_path), {}).study_name == "s"


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all/study.db", "postgresql://me:secret@127.0.0.1:1/db", "what"]
)
def test_a_storage_that_is_not_there_is_named_without_its_password(tmp_path, url):
    with pytest.raises(StorageError) as error:
        open_storage(url, tmp_path)
    assert without_password(url) in str(error.value)
    assert "secret" not in str(error.value)


def test_a_journal_that_goes_away_meanwhile_is_one_message(tmp_path):
    folder = tmp_path / "search"
    study = join(open_storage(None, folder), {})
    shutil.rmtree(folder)
    with (
        pytest.raises(StorageError, match=r"Finished candidates are kept"),
        explained(None, folder),
    ):
        study.ask()


def test_our_own_mistakes_are_not_blamed_on_the_storage(tmp_path):
    with pytest.raises(ZeroDivisionError), explained(None, tmp_path):
        _ = 1 / 0
