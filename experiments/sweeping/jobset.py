"""Kubernetes manifests: a JobSet for each run, on a TPU slice.

https://jobset.sigs.k8s.io and https://cloud.google.com/kubernetes-engine/docs/how-to/tpus: the
nodes of a slice are chosen by accelerator and topology, each pod takes all chips of its host.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from experiments.sweeping.runs import Run

# As Kubernetes Engine calls them, and the chips of one host of a slice of several.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
HOST = 4
RESTARTS = 100  # of the whole set, after preemptions: it goes on from its checkpoint
MOUNT = "/runs"


def manifests(runs: Sequence[Run], *, image: str, tpu: str, claim: str) -> str:
    """Returns YAML documents for `kubectl apply -f`.

    Args:
      runs: the runs, one JobSet each.
      image: the container image, which has this checkout in its working directory.
      tpu: chip and topology, such as v5e:4x4.
      claim: the name of the volume claim that holds the run folders; all hosts write to it.

    Raises:
      ValueError: if there is no such slice.
    """
    chip, _, topology = tpu.partition(":")
    if chip not in ACCELERATORS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology):
        raise ValueError(f"--tpu={tpu}: CHIP:SIZES such as v5e:4x4, of {', '.join(ACCELERATORS)}")
    chips = math.prod(int(size) for size in topology.split("x"))
    if chips > HOST and chips % HOST:
        raise ValueError(f"--tpu={tpu}: {chips} chips are no whole number of hosts of {HOST}")
    hosts = max(1, chips // HOST)
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip],
        "cloud.google.com/gke-tpu-topology": topology,
    }
    pods = [pod(run, image, nodes, min(chips, HOST), claim) for run in runs]
    sets = [job_set(run, each, hosts) for run, each in zip(runs, pods, strict=True)]
    return yaml.safe_dump_all(sets, sort_keys=False, width=1000)


def job_set(run: Run, pod: dict[str, Any], hosts: int) -> dict[str, Any]:
    """Returns a JobSet of one job, whose pods, one for each host, are the processes of one run."""
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": label(f"{run.folder.path.parent.name}-{run.name}"),
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS},
            "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": job}}],
        },
    }


def pod(run: Run, image: str, nodes: dict[str, str], chips: int, claim: str) -> dict[str, Any]:
    """Returns the pod of one host's process, which finds the others by --distributed=auto."""
    folder = run.folder.path
    command = run.elsewhere(f"{MOUNT}/{folder.parent.name}/{folder.name}")
    container = {
        "name": "run",
        "image": image,
        "command": [*command, "--distributed=auto"],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {
            "requests": {"google.com/tpu": chips},
            "limits": {"google.com/tpu": chips},
        },
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    return {
        "nodeSelector": nodes,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }


def label(text: str) -> str:
    """Returns a name that Kubernetes accepts: lower-case letters, digits and dashes, at most 45.

    Pods get longer names that begin with it. It ends in a hash, so that different texts have
    different names.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"{plain[:36].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
