"""One sweep on each launcher: joblib, submitit on this machine and on a Slurm, a Ray cluster of four nodes.

On Ray a worker is lost half-way (kill -9); its job goes on elsewhere and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import tiny

pytestmark = pytest.mark.slow
QEXP = [sys.executable, "-m", "qexp", "-m"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def index(out: Path) -> list[dict[str, str]]:
    try:
        with (out / "index.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def completed(out: Path) -> dict[str, int]:
    files = list(out.glob("*/record.json"))
    return {f.parent.name: f.stat().st_mtime_ns for f in files if json.loads(f.read_text())["status"] == "completed"}


def wait_for(what: str, out: Path, seconds: float, *, so_many: int, status: str) -> list[dict[str, str]]:
    """Return the lines of the index of a status, once there are so many."""
    deadline = time.monotonic() + seconds
    while len(found := [line for line in index(out) if line["status"] == status]) < so_many:
        assert time.monotonic() < deadline, f"{what}: {index(out)}"
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_on_one_machine(launcher: str, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="pip install 'qexp[dev]'")
    words = [*tiny(tiny_folder, tmp_path, "method=rtn,nonsense", "eval=none"), f"hydra/launcher={launcher}"]
    words[words.index("method=rtn,nonsense")] = "bits=w4a16g32,w4a16g64"  # 64 does not divide 32
    done = subprocess.run([*QEXP, *words], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, done.stderr
    assert len(completed(tmp_path)) == 1 and "does not divide" in done.stderr
    assert [line["status"] for line in index(tmp_path)] == ["completed"]


@pytest.fixture
def ray_address() -> Iterator[str]:
    """A cluster of four node processes with a processor each, all on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="pip install 'qexp[ray]'")
    store = {"object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1, **store)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_ray_cluster_survives_the_death_of_a_worker(ray_address: str, tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=gptq,rtn", "seed=range(6)")
    words += ["hydra/launcher=ray", f"hydra.launcher.ray.init.address={ray_address}"]
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen([*QEXP, *words], stdout=log, stderr=log)
        wait_for("half of the jobs", tmp_path, 400, so_many=5, status="completed")
        victim = kill_one_that_runs(tmp_path)
        before = completed(tmp_path)
        assert sweep.wait(400) == 0, (tmp_path / "log").read_text()[-3000:]
    lines = index(tmp_path)
    assert len(lines) == 12 and {line["status"] for line in lines} == {"completed"}
    after = completed(tmp_path)
    assert {run: after[run] for run in before} == before, "a completed run was computed again"
    assert victim["run"] not in before
    assert next(line for line in lines if line["run"] == victim["run"])["pid"] != victim["pid"]
    assert len({line["pid"] for line in lines}) >= 3, "the nodes did not share the work"


def kill_one_that_runs(out: Path) -> dict[str, str]:
    """Kill (-9) the process of a job in the middle of it and return the job's line; it is halted first, to be sure."""
    while True:
        (line, *_) = wait_for("a running job", out, 100, so_many=1, status="running")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line["pid"]), signal.SIGSTOP)
            time.sleep(0.1)
            if line in index(out) and not (out / line["run"] / "record.json").exists():
                os.kill(int(line["pid"]), signal.SIGKILL)
                return line
            os.kill(int(line["pid"]), signal.SIGCONT)


SLURM = """
ClusterName=qexp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm of one machine: its own controller and node daemon on the loopback, no accounting."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'qexp[slurm]'")
    if not (shutil.which("slurmctld") and shutil.which("slurmd")) or os.getuid() != 0:
        pytest.skip("no slurmctld and slurmd, or not root (apt-get install slurm-wlm)")
    folder, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    controller, node = free_ports(2)
    file = folder / "slurm.conf"
    file.write_text(SLURM.format(folder=folder, host=host, controller=controller, node=node))
    monkeypatch.setenv("SLURM_CONF", str(file))
    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen(words, stdout=log, stderr=log)
            for words in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
        ]
        try:
            deadline = time.monotonic() + 30
            while "idle" not in subprocess.run(["sinfo"], capture_output=True, text=True, check=False).stdout:
                if time.monotonic() > deadline:
                    pytest.skip(f"Slurm does not start here: {(folder / 'log').read_text()[-300:]}")
                time.sleep(0.2)
            yield
        finally:
            for daemon in daemons:
                daemon.terminate()
                daemon.wait(20)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def test_slurm_runs_a_sweep_as_an_array(slurm: None, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ("mem_gb=1", "cpus_per_task=1", "timeout_min=5", "array_parallelism=2")
    words = [*tiny(tiny_folder, out, "method=rtn", "seed=0,1,2,3", "eval=none"), "hydra/launcher=slurm"]
    words += [f"hydra.launcher.{setting}" for setting in small]
    done = subprocess.run([*QEXP, *words], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(completed(out)) == 4 and {line["status"] for line in index(out)} == {"completed"}
    assert len(list(out.glob(".sweeps/*/.submitit/*_[0-3]"))) == 4, "each job was a task of the array"
