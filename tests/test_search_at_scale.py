"""The measurement of a large index, small."""

import json

import pytest
import tiny

from experiments import search_at_scale


def test_it_says_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # several threads join another graph each time
    run = tiny.write_run(tmp_path / "run", tiny.config_dict(), tiny.params(tiny.task()))
    coco = tiny.write_coco(tmp_path / "coco", train=8, val=30)
    output = tmp_path / "result.json"
    size = ("--vectors=700", "--noise=1.5", f"--output={output}")
    with pytest.raises(SystemExit) as stopped:
        search_at_scale.main([f"--run={run}", f"--images={coco}", "--queries=train", *size])
    assert stopped.value.code == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["vectors"] == 700 and result["width"] == 8 and result["queries"] == 8
    assert result["made_of"] == {"image": 30, "text": 60}
    assert result["recall_at_10"] > 0.95
    assert 0 < result["search_ms"]["p50"] < result["query_ms"]["p95"]
    assert {"image.npy", "image.usearch"} < set(result["bytes"])
    assert {"device", "versions", "revision", "date", "build_seconds"} < set(result)
