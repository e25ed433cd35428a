"""Training on several nodes, launched by the files of `examples/` as Slurm and Kubernetes would run them.

Each node is a torchrun of its own on the loopback interface: for Slurm with a c10d rendezvous, for
Kubernetes with the variables that Kubeflow's runtime sets.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helpers.training_cases import toy_config, write_dataset

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH, TRAINJOB = EXAMPLES / "train.sbatch", EXAMPLES / "trainjob.yaml"
# The fields of the API that Kubeflow Trainer serves.
SPEC = {"runtimeRef", "initializer", "trainer", "runtimePatches", "suspend", "managedBy"}
TRAINER = {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}


def test_the_batch_file_is_a_script_with_options_that_slurm_knows():
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = SBATCH.read_text().splitlines()
    options = [line.split(maxsplit=1)[1] for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z-]+=\S+", option) for option in options)
    assert "--ntasks-per-node=1" in options, "one torchrun a node"
    # Slurm reads no option behind the first command.
    assert max(at for at, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index(
        "set -euo pipefail"
    )


def test_the_train_job_has_the_fields_of_its_api():
    job = yaml.safe_load(TRAINJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert set(spec) <= SPEC and set(spec["trainer"]) <= TRAINER
    assert all(
        isinstance(word, str) for word in spec["trainer"]["command"] + spec["trainer"]["args"]
    )
    gpus = int(spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"])
    assert spec["trainer"]["numProcPerNode"] == gpus
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    for folder in ("--data", "--runs"):
        args = spec["trainer"]["args"]
        assert args[args.index(folder) + 1].startswith(mounts[0]["mountPath"] + "/")


launched = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(420)]


def marked(test):
    for mark in launched:
        test = mark(test)
    return test


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    """Everything on the loopback interface, and the commands of this environment first."""
    binaries = str(Path(sys.executable).parent)
    own = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**os.environ, **own, **variables}


def start(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(**variables),
            start_new_session=True,
        )


def kill(node: subprocess.Popen) -> None:
    """Kill a node as a power cut would: torchrun and its ranks at once."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(node.pid)
        family = [*parent.children(recursive=True), parent]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=20)
    node.wait(timeout=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset, and a config whose run is long enough to be stopped in its middle."""
    folder = tmp_path_factory.mktemp("nodes")
    settings = ["train.epochs=25", "train.checkpoint_every=25", "train.eval_every=1000"]
    settings += ["train.log_every=50", "train.rank_timeout=15"]
    config = toy_config(write_dataset(folder / "data"), *settings, "train.sharding=row_wise")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def report(runs: Path) -> dict:
    return json.loads((runs / "toy" / "report.json").read_text())


@pytest.fixture(scope="module")
def by_slurm(place):
    """The batch file on two nodes: `srun` is what starts one command on each of them."""
    binaries = place / "slurm"
    binaries.mkdir()
    srun = """
    #!/bin/bash
    # Runs a command once for each node, with its number before each line.
    while [[ $1 == --* ]]; do shift; done
    for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
        ( "$@" 2>&1 | sed -u "s/^/$node: /"; exit ${PIPESTATUS[0]} ) &
        nodes+=($!)
    done
    for node in "${nodes[@]}"; do wait "$node"; done
    """
    (binaries / "srun").write_text(textwrap.dedent(srun).lstrip())
    (binaries / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (binaries / name).chmod(0o755)
    variables = {
        "PATH": f"{binaries}:{environment()['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "PORT": free_port(),
        "DATA": str(place / "data"),
        "RUNS": str(place / "slurm_runs"),
        "CONFIG": str(place / "config.yaml"),
    }
    job = start(["bash", str(SBATCH)], place / "slurm.log", variables)
    try:
        status = job.wait(timeout=200)
    finally:
        kill(job)
    log = (place / "slurm.log").read_text()
    assert status == 0, log[-3000:]
    return place / "slurm_runs", log


@marked
def test_a_batch_job_of_two_nodes_writes_and_reports_once(by_slurm):
    runs, log = by_slurm
    assert report(runs)["world_size"] == 2
    lines = [line for line in log.splitlines() if re.search(r"\bfolder +\S", line)]
    assert len(lines) == 1, "one report of all ranks"
    assert re.match(r"\d: \[\w+0\]:folder", lines[0]), "the node and the rank stand before it"
    checkpoint = max((runs / "toy" / "checkpoints").iterdir())
    writers = sorted(path.name for path in checkpoint.rglob("*.distcp"))
    assert writers and len({name.split("_")[2] for name in writers}) == 2, writers


def pods(place: Path, runs: Path, nodes: int, name: str) -> list[subprocess.Popen]:
    """Start the job's command in as many pods, with the variables that Kubeflow's runtime sets."""
    trainer = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]
    words = {
        "criteo_autoint_unified": str(place / "config.yaml"),
        "/shared/data/criteo": str(place / "data"),
        "/shared/runs": str(runs),
    }
    command = [words.get(word, word) for word in trainer["command"] + trainer["args"]]
    port = free_port()
    return [
        start(
            command,
            place / f"{name}-{node}.log",
            {
                "PET_NNODES": str(nodes),
                "PET_NPROC_PER_NODE": "1",
                "PET_NODE_RANK": str(node),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port,
            },
        )
        for node in range(nodes)
    ]


def finish(started: list[subprocess.Popen], place: Path, name: str) -> None:
    try:
        ended = [pod.wait(timeout=150) for pod in started]
    finally:
        for pod in started:
            kill(pod)
    logs = [(place / f"{name}-{node}.log").read_text() for node in range(len(started))]
    assert ended == [0] * len(started), "\n".join(log[-2000:] for log in logs)


@marked
@pytest.mark.parametrize("lost", [0, 1], ids=["the first node", "the other node"])
def test_a_lost_node_stops_the_others_and_the_same_command_goes_on(place, by_slurm, lost):
    runs = place / f"lost_{lost}"
    started = pods(place, runs, 2, f"killed_{lost}")
    other = started[1 - lost]
    try:
        end = time.monotonic() + 120
        while not list(runs.glob("toy/checkpoints/*/checksums.json")):
            assert other.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        kill(started[lost])
        begin = time.monotonic()
        assert other.wait(timeout=60) != 0
        stopped = time.monotonic() - begin
    finally:
        for pod in started:
            kill(pod)
    assert stopped < 60
    log = (place / f"killed_{lost}-{1 - lost}.log").read_text()
    assert re.search(rf"rank {lost} |rank {lost} or its launcher died|store", log), log[-2000:]
    assert not (runs / "toy" / "report.json").exists()
    whole = report(by_slurm[0])
    # On as many nodes as there were, and on one less.
    nodes = 2 if lost else 1
    finish(pods(place, runs, nodes, f"again_{lost}"), place, f"again_{lost}")
    found = report(runs)
    assert found["world_size"] == nodes
    if nodes == 2:
        assert found["test"] == whole["test"]
    assert found["test"]["log_loss"] == pytest.approx(whole["test"]["log_loss"], rel=1e-4)
