"""A rank that dies in the middle of a step stops the others, and they say which one it was."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

# One process imports everything and forks the ranks of all cases, which then run side by side.
RANKS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from embcomp.config.train_config import load_config
from embcomp.training import api, loop

config_path, folder = sys.argv[1], Path(sys.argv[2])
FAILURES = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raised": lambda: (_ for _ in ()).throw(KeyError("a lost feature")),
}

def run(case, rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    sys.stderr = (folder / f"{case}-{rank}.err").open("w", buffering=1)
    step = loop.Training._train_step
    def train_step(self, batches):
        if rank == 1 and self.state.step == 3:
            FAILURES[case]()
        step(self, batches)
    loop.Training._train_step = train_step
    try:
        api.train(load_config(config_path), runs=folder / case, quiet=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

children, begun = {}, time.monotonic()
for case, port in zip(FAILURES, sys.argv[3:]):
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            run(case, rank, port)
        children[pid] = (case, rank)
ended = {}
while len(ended) < 5:  # all but the frozen one
    pid, status = os.wait()
    ended["{}-{}".format(*children.pop(pid))] = (
        os.waitstatus_to_exitcode(status), time.monotonic() - begun)
for pid in children:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(ended))
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    config = toy_config(write_dataset(folder / "data"), "train.rank_timeout=6")
    (folder / "config.yaml").write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(folder / "config.yaml"), str(folder), *free_ports(3)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    texts = {path.stem: path.read_text() for path in folder.glob("*.err")}
    return json.loads(done.stdout), texts


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("killed", "rank 1 died: no sign of life"),
        ("frozen", "rank 1 died: no sign of life"),
        ("raised", "rank 1 failed with KeyError: 'a lost feature'"),
    ],
)
def test_the_others_stop_within_a_minute_and_name_the_rank(outcome, case, text):
    ended, texts = outcome
    code, seconds = ended[f"{case}-0"]
    assert code != 0
    assert seconds < 60
    assert text in texts[f"{case}-0"]
