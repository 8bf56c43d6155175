"""Manifests for slices of TPUs."""

import pytest
import sweeps
import yaml

from experiments import sweep as command
from experiments.sweeping.ablation import load_ablation
from experiments.sweeping.jobset import label, manifests
from experiments.sweeping.runs import runs_of


@pytest.fixture
def runs(tmp_path):
    return runs_of(load_ablation(str(sweeps.write_ablation(tmp_path)))[1], tmp_path / "rates")


def test_a_slice_of_four_hosts(runs):
    found = list(yaml.safe_load_all(manifests(runs, image="me/it:1", tpu="v5e:4x4", claim="disk")))
    names = [each["metadata"]["name"].rsplit("-", 1)[0] for each in found]
    assert names == ["rates-low-0", "rates-high-0", "rates-low-1", "rates-high-1"]
    assert {each["kind"] for each in found} == {"JobSet"}
    job = found[3]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][:4] == [
        "python", "-m", "unified_mm.main", "--config=configs/coco.py:tiny",
    ]  # fmt: skip
    assert container["command"][-2:] == ["--workdir=/runs/rates/high-1", "--distributed=auto"]


def test_one_host_of_a_small_slice(runs):
    found = next(yaml.safe_load_all(manifests(runs, image="i", tpu="v6e:2x2", claim="c")))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1


@pytest.mark.parametrize("tpu", ["v5e", "v9:2x2", "v5e:4x", "v5e:0x4"])
def test_slices_that_there_are_not(runs, tpu):
    with pytest.raises(ValueError, match="--tpu="):
        manifests(runs, image="i", tpu=tpu, claim="c")


def test_names_that_kubernetes_takes():
    assert label("Fusion_base-x=0.1-0").startswith("fusion-base-x-0-1-0-")
    assert len(label("x" * 80 + "-0")) == 45
    alike = ["x=-1-0", "x=1-0", "x_1-0", *(f"{'x' * 80}{i}" for i in range(3))]
    assert len({label(each) for each in alike}) == len(alike)


def test_the_command_prints_it(tmp_path, capsys):
    path = sweeps.write_ablation(tmp_path)
    args = command.parse([str(path), "--launcher=print", "--jobset=image"])
    assert command.sweep(args) == 0
    assert len(list(yaml.safe_load_all(capsys.readouterr().out))) == 4
