"""Slurm as a sweep sees it, on one machine: every command of it, as links to this file.

The cluster's state lies in $SLURM_STAND_IN: `next`, and a file a task, `JOB_TASK.json`, with its
state, script, process and count of starts. sbatch starts the tasks of an array, as many at a time
as its %N says; scontrol requeue puts one back, which starts again with the same number; sacct and
squeue tell. Each start of a task runs the script that submitit wrote, as Slurm would.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["SLURM_STAND_IN"])
LIVE = ("PENDING", "RUNNING", "REQUEUED")


def sbatch(arguments):
    script = Path(arguments[0]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    (HOME / "options.json").write_text(json.dumps(options))
    number = HOME / "next"
    job = int(number.read_text()) if number.exists() else 100
    number.write_text(str(job + 1))
    copy = HOME / f"{job}.sh"
    copy.write_text(script)
    tasks, parallel = 1, 1
    if found := re.fullmatch(r"0-(\d+)%(\d+)", options.get("array", "")):
        tasks, parallel = int(found[1]) + 1, int(found[2])
    for task in range(tasks):
        name = f"{job}_{task}" if "array" in options else str(job)
        write(name, {"state": "PENDING", "script": str(copy), "starts": 0, "parallel": parallel})
    print(f"Submitted batch job {job}")
    sys.stdout.flush()
    background(["daemon", str(job)])


def background(arguments):
    """This file again, as a process that outlives the caller."""
    subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=open(HOME / "daemon.log", "a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def daemon(arguments):
    """Slurm's own: starts what is pending, notes what has ended."""
    (HOME / f"daemon_{os.getpid()}").touch()
    processes = {}
    while True:
        tasks = all_tasks(arguments[0])
        for name, process in list(processes.items()):
            if process.poll() is None:
                continue
            del processes[name]
            if read(name)["state"] == "REQUEUED":
                change(name, state="PENDING")
            elif read(name)["state"] == "RUNNING":
                change(name, state="COMPLETED" if process.returncode == 0 else "FAILED")
        for name in tasks:
            task = read(name)
            if task["state"] == "PENDING" and len(processes) < task["parallel"]:
                processes[name] = start(name, task)
        if not processes and not any(read(name)["state"] in LIVE for name in tasks):
            return
        time.sleep(0.02)


def start(name, task):
    job, _, number = name.partition("_")
    variables = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "node1"}
    if number:
        variables |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": number}
    process = subprocess.Popen(["bash", task["script"]], env={**os.environ, **variables})
    change(name, state="RUNNING", starts=task["starts"] + 1)
    return process


def srun(arguments):
    """Runs the command in this process's place, so that a signal to it comes to it."""
    while arguments[0].startswith("--"):
        takes_value = arguments[0] in ("--output", "--error")
        arguments = arguments[2 if takes_value else 1 :]
    job, task = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID")
    name = job if task is None else f"{job}_{task}"
    change(name, process=os.getpid())
    log = os.open(HOME / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execvp(arguments[0], arguments)


def scontrol(arguments):
    assert arguments[0] == "requeue", arguments
    change(arguments[1], state="REQUEUED")


def scancel(arguments):
    """`scancel --preempt JOB` is what preemption does to a job: the signal of its --signal."""
    if arguments[0] != "--preempt":
        change(arguments[0], state="CANCELLED by 0")
    task = read(arguments[-1])
    os.kill(task["process"], signal.SIGUSR2 if arguments[0] == "--preempt" else signal.SIGTERM)


def sacct(arguments):
    print("JobID|State|NodeList")
    for job in [arguments[i + 1] for i, word in enumerate(arguments) if word == "-j"]:
        for name in all_tasks(job):
            print(f"{name}|{read(name)['state']}|node1")


def squeue(arguments):
    job = arguments[arguments.index("-j") + 1]
    for name in all_tasks(job.split("_")[0]):
        if name == job and read(name)["state"] in LIVE:
            print(read(name)["state"])


def all_tasks(job):
    return sorted(p.stem for p in HOME.glob(f"{job}*.json") if re.match(rf"{job}(_\d+)?$", p.stem))


def read(name):
    return json.loads((HOME / f"{name}.json").read_text())


def write(name, task):
    """Whole or not at all: the test reads it too."""
    part = HOME / f"{name}.{os.getpid()}"
    part.write_text(json.dumps(task))
    os.replace(part, HOME / f"{name}.json")


def change(name, **values):
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(name, read(name) | values)


if __name__ == "__main__":
    called, given = Path(sys.argv[0]).name, sys.argv[1:]
    if called.endswith(".py"):
        called, given = given[0], given[1:]
    globals()[called](given)
