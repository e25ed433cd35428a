from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import count_pass, encode_pass, rank_pass
from embcomp.data_pipelines.preparing.encoding import plan_rounds
from embcomp.errors import DataError
from tests.helpers.raw_logs import folder_bytes, write_criteo

pytestmark = pytest.mark.slow

OPTIONS = {"importer": "criteo", "min_count": 2, "blocks_per_part": 2}


PARTS = 9
AT_ONCE = 8  # parts and features at the most, by threads
CALLED_IN = {"count_part": count_pass, "build_vocabulary": rank_pass, "encode_part": encode_pass}
"""The module in which a pass calls what does the work."""


class KilledError(BaseException):
    """Stands for a signal: no handler for errors sees it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A raw log, and the bytes of the dataset that an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("source")
    write_criteo(folder / "train.txt", 250, values=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 4000)
        prepare(folder / "train.txt", folder / "out", **OPTIONS)
    return folder / "train.txt", folder_bytes(folder / "out")


@pytest.fixture
def raw(source, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)
    return source[0]


@pytest.fixture
def whole(source):
    return source[1]


def die_after(monkeypatch, module, name: str, calls: int) -> list[int]:
    original = getattr(module, name)
    seen: list[int] = []
    lock = threading.Lock()

    def dying(*args, **options):
        with lock:  # parts are worked on in several threads
            if len(seen) == calls:
                raise KilledError
            seen.append(1)
        return original(*args, **options)

    monkeypatch.setattr(module, name, dying)
    return seen


@pytest.mark.parametrize(
    ("name", "calls"),
    [("count_part", 0), ("count_part", 3), ("build_vocabulary", 11), ("encode_part", 0)]
    + [("encode_part", 4)],
)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    raw, whole, tmp_path, monkeypatch, name, calls
):
    with monkeypatch.context() as patch:
        die_after(patch, CALLED_IN[name], name, calls)
        with pytest.raises(KilledError):
            prepare(raw, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        seen = die_after(patch, CALLED_IN[name], name, 10**6)
        news: list[str] = []
        prepare(raw, tmp_path / "out", report=news.append, **OPTIONS)
    assert news == ["going on with what an earlier, interrupted run left"]
    whole_calls = 26 if name == "build_vocabulary" else PARTS
    # What was worked on at the same time when it died is done again.
    assert 0 <= len(seen) - (whole_calls - calls) <= AT_ONCE - 1
    assert folder_bytes(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".*"))


def test_other_settings_or_a_changed_source_start_afresh(raw, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_after(patch, encode_pass, "encode_part", 2)
        with pytest.raises(KilledError):
            prepare(raw, tmp_path / "out", **OPTIONS)
    news: list[str] = []
    changed = OPTIONS | {"min_count": 3}
    info = prepare(raw, tmp_path / "out", report=news.append, **changed)
    assert news == []
    assert info.categorical[0].min_count == 3


def test_a_run_that_is_killed_for_good_leaves_no_dataset_and_resumes(raw, whole, tmp_path):
    """SIGKILL in the middle of the second pass, in a process of its own."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from embcomp.data_pipelines.preparing import encode_pass as module
        from embcomp.data_pipelines.importers import text
        from embcomp.data_pipelines.prepare import prepare
        text.BLOCK_BYTES = 4000
        original = module.encode_part
        calls = []
        def dying(*args, **options):
            calls.append(1)
            if len(calls) == 3:
                advance = options["advance"]
                options["advance"] = lambda n: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        module.encode_part = dying
        prepare(sys.argv[1], sys.argv[2], importer="criteo", min_count=2, blocks_per_part=2)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(raw), str(tmp_path / "out")], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    news: list[str] = []
    prepare(raw, tmp_path / "out", report=news.append, **OPTIONS)
    assert len(news) == 1
    assert folder_bytes(tmp_path / "out") == whole


def test_two_processes_do_not_prepare_the_same_folder(raw, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    script = textwrap.dedent(
        """
        import fcntl, os, sys
        handle = os.open(sys.argv[1], os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(partial)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(raw, tmp_path / "out", **OPTIONS)
        holder.stdin.close()
    assert partial.is_dir()
    prepare(raw, tmp_path / "out", **OPTIONS)


def test_interrupted_rounds_of_encoding_go_on(raw, whole, tmp_path, monkeypatch):
    # So little room that the ids are found in several rounds.
    monkeypatch.setattr(encode_pass, "plan_rounds", lambda sizes, room: plan_rounds(sizes, 9000))
    with monkeypatch.context() as patch:
        die_after(patch, encode_pass, "store_ids", 3)
        with pytest.raises(KilledError):
            prepare(raw, tmp_path / "out", **OPTIONS)
    prepare(raw, tmp_path / "out", **OPTIONS)
    assert folder_bytes(tmp_path / "out") == whole
