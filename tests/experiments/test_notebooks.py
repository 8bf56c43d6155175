"""The notebooks run from start to end on a small checkpoint, and are stored without outputs."""

import json
import os
from pathlib import Path

import pytest
import tiny

from unified_mm.files import write_json
from unified_mm.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small run with two checkpoints, and results of five that lie on a power law."""
    root = tmp_path_factory.mktemp("runs")
    tiny.write_world_run(root / "run")
    for number, flops in enumerate((1e9, 1e10, 1e11, 1e12, 1e13)):
        loss = 300 * flops**-0.25 + 1 + 0.01 * (-1) ** number
        result = {"scores": {"caption/nats": loss}, "flops": flops, "steps": 1}
        write_json(RunFolder(root / "scale" / str(number)).result, result)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end(path, runs, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("UNIFIED_MM_RUN", str(runs / "run"))
    monkeypatch.setenv("UNIFIED_MM_RUNS", str(runs / "scale"))
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(runs / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    done = nbclient.NotebookClient(notebook, timeout=170, resources=where).execute()
    shown = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert any("image/svg+xml" in output.get("data", {}) for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_bare_and_has_no_logic_of_its_own(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and len(code) < len(cells)
    for cell in code:
        assert not cell["outputs"] and cell["execution_count"] is None
        assert not any(line.lstrip().startswith(("def ", "class ")) for line in cell["source"])


def test_there_are_five():
    names = ["attention", "captions", "checkpoint", "embeddings", "scaling"]
    assert [path.stem for path in NOTEBOOKS] == names
