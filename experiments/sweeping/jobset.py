"""Kubernetes manifests: a JobSet for each run, on a TPU slice.

https://jobset.sigs.k8s.io and https://cloud.google.com/kubernetes-engine/docs/how-to/tpus: the
nodes of a slice are chosen by accelerator and topology, each pod takes all chips of its host. What
a manifest holds is in `jobset.yaml.jinja`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments.sweeping.runs import Run

# As Kubernetes Engine calls them, and the chips of one host of a slice of several.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
TEMPLATE = Path(__file__).with_name("jobset.yaml.jinja")
HOST = 4
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
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text: str = template.render(
        sets=[(label(f"{run.folder.path.parent.name}-{run.name}"), command(run)) for run in runs],
        image=image,
        claim=claim,
        accelerator=ACCELERATORS[chip],
        topology=topology,
        hosts=max(1, chips // HOST),
        chips=min(chips, HOST),
        mount=MOUNT,
    )
    return text


def command(run: Run) -> list[str]:
    """Returns the command of one host's process, which finds the others by --distributed=auto."""
    folder = run.folder.path
    return [*run.elsewhere(f"{MOUNT}/{folder.parent.name}/{folder.name}"), "--distributed=auto"]


def label(text: str) -> str:
    """Returns a name that Kubernetes accepts: lower-case letters, digits and dashes, at most 45.

    Pods get longer names that begin with it. It ends in a hash, so that different texts have
    different names.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"{plain[:36].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
