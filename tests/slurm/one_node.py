"""`make test-slurm`: a small grid through a SLURM of one node, started here and stopped again; one job is killed.

    python tests/slurm/one_node.py                 # the test
    python tests/slurm/one_node.py tiny paper      # both tables of any profile and grid, through such a SLURM

The daemons listen on loopback, at free ports, with keys, state and logs in a temporary folder; a SLURM that the machine
has is not touched. The grid runs with `profiles/slurm` as a reader would start it. Once a training has written a
checkpoint its SLURM job is killed; Snakemake has to submit it again, and the training has to go on from the
checkpoint. The same grid then runs on local cores: summary and segmentations must be equal, to the last bit.
"""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data_cache"
SECONDS = 3600  # until a run of the grid is given up
PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
STEPS = {"steps": 300, "log_every": 10}  # of each training: checkpoints, and time to be killed between two of them
GRID = {"seeds": 1, "fractions": [100], "table1": {"lams": [1, 0.25], "frozen": [0]},
        "table2": {"controls": ["prior", "random"], "methods": ["vjepa", "vjepa_ll"], "lam": 0.25, "frozen": [0]}}

# config_overrides: the node says it has what profiles/slurm asks for, however small the machine.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
KillWait=2
MinJobAge=36000
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000
PartitionName=main Nodes={host} Default=YES
"""


class Failed(Exception):
    """One sentence that says what was expected and did not come."""


def install() -> None:
    """Install Debian's packages of SLURM where they are missing."""
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool)]
    if missing:
        if os.geteuid() or not shutil.which("apt-get"):
            raise Failed(f"{', '.join(missing)} not installed; on Debian or Ubuntu: sudo apt-get install "
                         f"{' '.join(missing)}, then run this again (it needs root for nothing else)")
        print("installing", *missing, flush=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
        if subprocess.run(command, **quiet).returncode:
            subprocess.run(["apt-get", "update", "-qq"], **quiet)
            if subprocess.run(command, **quiet).returncode:
                raise Failed(f"apt-get could not install {' '.join(missing)}")


def wait(what: str, done, seconds: float = 60):
    """What `done` returns, once it is true."""
    end = time.monotonic() + seconds
    while not (value := done()):
        if time.monotonic() > end:
            raise Failed(f"{what}: not seen within {seconds:g} s")
        time.sleep(0.2)
    return value


def ask(*command: str) -> str:
    """What a SLURM command prints; empty where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def slurm(folder: Path):
    """A SLURM of one node without accounting, for as long as the block runs."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    with socket.socket() as a, socket.socket() as b:
        for free in (a, b):
            free.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, user=getpass.getuser(), folder=folder))
    if ask("slurmd", "-V").split()[-1] > "23":  # slurm-wlm 22.05.8 does not know this line, later ones want it
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    conf, srun = folder / "slurm.conf", folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')  # the plugin takes it from jobs
    srun.chmod(0o755)
    os.environ |= {"SLURM_CONF": str(conf), "PATH": f"{srun.parent}:{os.environ['PATH']}"}
    munged = ["munged", "-F", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"]
    daemons = []

    def start(*command):
        with open(folder / f"{command[0]}.out", "wb") as log:
            # in a session of its own: Ctrl-C reaches this script alone, which then stops things in order;
            # setpriv: should this script be killed, its daemons end too
            daemons.append(psutil.Popen(["setpriv", "--pdeathsig", "TERM", *command], stdout=log, stderr=log,
                                        stdin=subprocess.DEVNULL, start_new_session=True))

    try:
        start(*munged)
        wait("munged", (folder / "munge.socket").exists)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", host)
        wait("SLURM's node", lambda: ask("sinfo", "--noheader", "--format=%T") == "idle")
        print(ask("sinfo", "--version"), "is up on", ask("sinfo", "--noheader", "--format=node %N"), flush=True)
        yield
    finally:
        if len(daemons) == 3:
            ask("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
            with contextlib.suppress(Failed):
                wait("the end of all jobs", lambda: not ask("squeue", "--noheader"), 15)
        for daemon in reversed(daemons):
            daemon.terminate()
        psutil.wait_procs(daemons, timeout=10)
        for process in psutil.process_iter():  # whatever is left of daemons and jobs
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(conf):
                    process.kill()
        print("SLURM is stopped", flush=True)


def snakemake(folder: Path, name: str, target: str, *options: str, watch=None):
    """Make a target of the grid with the profile `name`; what `watch` returns, which is called meanwhile."""
    command = [sys.executable, "-m", "snakemake", *target.split(), "--nolock", *options,
               "--config", f"profile={folder}/{name}.yaml", f"grid={folder}/grid.yaml", "seed=0"]
    log, begun = folder / f"{name}-{target.replace(' ', '-')}.log", time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
    try:
        seen = watch(process) if watch else None
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"snakemake {target}: not done after {SECONDS} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its SLURM jobs are cancelled with SLURM
            process.wait()
    if process.returncode:
        raise Failed(f"snakemake {target}: exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    print(f"{name}: snakemake {target}: {time.monotonic() - begun:.0f} s", flush=True)
    return seen


def training(runs: Path) -> tuple[Path, psutil.Process] | None:
    """A run that has a checkpoint and is not finished, and the process that holds its lock."""
    for folder in [f.parent for f in runs.glob("*/checkpoint.pt") if not f.with_name("run.json").exists()]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(folder / "lock") in [f.path for f in process.open_files()]:
                    return folder, process
    return None


def kill_one(name: str, snakemake: subprocess.Popen) -> tuple[str, str]:
    """Kill the SLURM job of a training that has written a checkpoint -> job id, name of the run."""
    found = wait("a training to kill", lambda: training(CACHE / "runs" / name) or snakemake.poll() is not None, SECONDS)
    if found is True:
        raise Failed("Snakemake ended before a training with a checkpoint was seen")
    run, process = found
    job = process.environ()["SLURM_JOB_ID"]
    ask("scancel", "--full", "--signal=KILL", job)
    wait("the end of the killed training", lambda: not process.is_running() or process.status() == "zombie")
    if (run / "run.json").exists():
        raise Failed(f"{run.name} was finished before it could be killed: give STEPS more steps")
    step = (run / "history.csv").read_text().splitlines()[-1].split(",")[0]
    print(f"killed SLURM job {job}, which trained {run.name}: step {step} of {STEPS['steps']} was saved", flush=True)
    return job, run.name


def see_retried(job: str, run: str) -> None:
    """See that the killed job was submitted again, that nothing else failed, and the training went on."""
    lines = [line.split("|") for line in ask("squeue", "--states=all", "--noheader", "--format=%i|%T|%k").splitlines()]
    for number, state, comment in sorted(lines, key=lambda line: int(line[0])):
        print(f"  job {number:>3} {state:10} {comment}")
    purpose, failed = {n: c for n, _, c in lines}, [n for n, state, _ in lines if state != "COMPLETED"]
    again = [n for n, c in purpose.items() if n != job and c == purpose[job]]
    if failed != [job] or len(again) != 1:
        raise Failed(f"job {job} alone should fail and one do its work again; failed: {failed}, again: {again}")
    notebooks = [f.read_text() for f in CACHE.glob("notebooks/test-slurm*/*.ipynb")]
    if not any("goes on where it stopped" in text and run in text for text in notebooks):
        raise Failed(f"no notebook says that {run} went on from its checkpoint")
    print(f"job {again[0]} did the work of job {job}, from its checkpoint on", flush=True)


def results(name: str) -> dict:
    """Everything that must not depend on where the grid ran: tables without timings, and all segmentations."""
    summary = json.loads(next(CACHE.glob(f"notebooks/{name}*/summary.json")).read_text())
    found = {"missing": summary["missing"]}
    for table in ("table1", "rows"):
        for row in summary[table]:
            found[f"{table}, {row['cell']}, {row['fraction']} %"] = row | {"seconds": None}
    for file in (CACHE / "runs" / name).glob("*/segmentation-*.npz"):
        with np.load(file) as arrays:
            found |= {f"{file.parent.name}/{file.name}, {which}": arrays[which].tobytes() for which in ("best", "last")}
    return found


def see_equal(a: dict, b: dict) -> None:
    """See that two runs of the grid have the same results, and that there are some."""
    tables, masks = (sum(isinstance(v, kind) for v in a.values()) for kind in (dict, bytes))
    if not tables or not masks or a["missing"]:
        raise Failed(f"the grid has {tables} rows, {masks} segmentations, missing: {a['missing']}")
    if differ := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
        shown = "\n".join(f"{k}: {str(a.get(k))[:200]} | {str(b.get(k))[:200]}" for k in differ)
        raise Failed(f"SLURM | local cores differ in {len(differ)} of {len(a)} results:\n{shown}")
    print(f"SLURM and local cores agree exactly: {tables} rows of the tables, {masks} sets of masks")


def clear() -> None:
    for name in ("test-slurm", "test-local"):
        for folder in [CACHE / "runs" / name, *CACHE.glob(f"notebooks/{name}*")]:
            shutil.rmtree(folder, ignore_errors=True)


def both_tables(profile: str, grid: str) -> None:
    """`make table1 table2` with every cell as a SLURM job; what is on disk is not made again."""
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm(Path(folder)):
        for target in ("cells", "table1 table2"):
            subprocess.run([sys.executable, "-m", "snakemake", *target.split(), "--profile", "profiles/slurm", "--jobs",
                            "2", "--config", f"profile={profile}", f"grid={grid}"], cwd=ROOT, check=True)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped by a signal"))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # one thread here and there: the same sums
    if sys.argv[1:]:
        return both_tables(*sys.argv[1:])
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        install()
        clear()
        settings = yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text()) | STEPS
        for name in ("test-slurm", "test-local"):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
        with slurm(folder):
            here = ("--profile", "profiles/slurm", "--jobs", "2", "--slurm-init-seconds-before-status-checks", "5")
            killed = snakemake(folder, "test-slurm", "cells", *here, watch=lambda p: kill_one("test-slurm", p))
            snakemake(folder, "test-slurm", "table1 table2", *here)
            see_retried(*killed)
        snakemake(folder, "test-local", "cells", "--cores", "2")
        snakemake(folder, "test-local", "table1 table2", "--cores", "2")
        see_equal(results("test-slurm"), results("test-local"))
    except Failed as error:
        sys.exit(f"make test-slurm: {error}\nLogs: {folder}")
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    clear()
    shutil.rmtree(folder)
    print(f"make test-slurm: passed in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
