"""A slot's answers are those of one artefact or the other, whatever is swapped meanwhile."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref

import pytest
import torch

from embcomp import load, save
from embcomp.errors import ArtefactError
from embcomp.serving import ServingSlot
from embcomp.serving.fused.library import why_missing
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

TABLES = plain_tables(8, rows=(300, 200, 100))


def saved(folder, seed, case="coded", tables=TABLES):
    save(pooled(CASES[case], tables, seed=seed), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return saved(folder / "old", 1), saved(folder / "new", 2)


def test_a_swapped_artefact_answers_and_the_old_one_is_freed(two):
    old, new = two
    slot = ServingSlot(old)
    batch = random_batch(TABLES, seed=3)
    assert torch.equal(slot(batch).values(), load(old)(batch).values())
    assert not torch.equal(load(old)(batch).values(), load(new)(batch).values())
    gc.collect()
    gc.disable()  # freed at once, not when the collector comes by
    try:
        before = weakref.ref(slot.occupant.serving)
        held = slot.occupant
        taken = slot.swap(new)
        assert before() is held.serving and slot.occupant is taken and taken.path == new
        del held
        assert before() is None
    finally:
        gc.enable()
    assert torch.equal(slot(batch).values(), load(new)(batch).values())


@pytest.mark.parametrize(("count", "mmap"), [(8, False), (2, True)])
def test_threads_see_one_artefact_or_the_other(two, count, mmap):
    """No answer is wrong, mixed or missing while artefacts come and go; `benchmarks/swaps.py` at length."""
    batches = [random_batch(TABLES, seed=n, shape="ragged") for n in range(count)]
    known = [[load(path)(batch).values() for path in two] for batch in batches]
    slot, stop = ServingSlot(two[0], mmap=mmap), threading.Event()
    seen, wrong = [set() for _ in batches], []

    def serve(n):
        try:
            while not stop.is_set():
                found = slot(batches[n]).values()
                which = [torch.equal(found, answer) for answer in known[n]]
                if any(which):
                    seen[n].add(which.index(True))
                else:
                    wrong.append(n)
        except Exception as error:  # noqa: BLE001 - a failed answer is what is looked for
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for swap in range(4):
        slot.swap(two[1 - swap % 2])
    deadline = time.monotonic() + 20
    while not all(own == {0, 1} for own in seen) and not wrong and time.monotonic() < deadline:
        slot.swap(two[0])
        slot.swap(two[1])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and seen == [{0, 1}] * count


def test_what_cannot_take_over_leaves_the_old_one(two, tmp_path):
    slot = ServingSlot(two[0])
    batch = random_batch(TABLES, seed=3)
    wanted, occupant = slot(batch).values(), slot.occupant
    wider = saved(tmp_path / "wider", 1, "full", plain_tables(16, rows=(300, 200, 100)))
    fewer = saved(tmp_path / "fewer", 1, "full", TABLES[:2])
    save(unpooled(CASES["coded"], TABLES), tmp_path / "unpooled")
    shutil.copytree(two[1], tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    for path, told in (
        (wider, "wider cannot take over from .*old, which goes on: outputs of the new one"),
        (fewer, r"features of the new one are \['f0', 'f1'\], of the old one"),
        (tmp_path / "unpooled", "kinds of the new one are unpooled tables, of the old one pooled"),
        (tmp_path / "damaged", "model.safetensors is damaged"),
        (tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(ArtefactError, match=told) as caught:
            slot.swap(path)
        assert "\n" not in str(caught.value)
        assert slot.occupant is occupant and torch.equal(slot(batch).values(), wanted)


def test_an_artefact_is_tried_before_it_takes_over(two):
    tried = []

    def trial(serving):
        tried.append(serving(random_batch(TABLES, seed=3)).values())
        if len(tried) == 2:
            raise ArtefactError("it is not wanted")

    slot = ServingSlot(two[0], trial=trial)
    with pytest.raises(ArtefactError, match="it is not wanted"):
        slot.swap(two[1])
    assert slot.occupant.path == two[0]
    assert slot.swap(two[1]).path == two[1] and len(tried) == 3


@pytest.mark.skipif(why_missing() is not None, reason=f"no compiled look-up: {why_missing()}")
def test_a_look_up_holds_no_lock_of_the_interpreter(tmp_path):
    """This thread goes on while another one is inside the compiled code."""
    serving = load(saved(tmp_path / "a", 1))
    batch = random_batch(TABLES, seed=1, batch_size=400_000, shape="single")
    lookup, span = serving._fused._lookup, []

    def timed(*inputs):
        begin = time.perf_counter()
        done = lookup(*inputs)
        span.append((begin, time.perf_counter()))
        return done

    serving._fused._lookup = timed
    for _ in range(20):
        span.clear()
        thread, ticks = threading.Thread(target=serving, args=(batch,)), []
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
        ((begin, end),) = span
        if sum(begin < tick < end for tick in ticks) > 100:
            return
    raise AssertionError("the interpreter stood still during each of 20 look-ups")
