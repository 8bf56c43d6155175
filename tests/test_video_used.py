"""Videos are indexed, searched, classified and served as any modality is; long uploads are not."""

import io

import live_server
import numpy as np
import pytest
import tiny
from PIL import Image

from unified_mm.config import Config
from unified_mm.evaluation.zero_shot import read_class_folder
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.modalities.video import VideoModality
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.search_index import SearchIndex
from unified_mm.task import build_task


def clip(seed, fps=4.0):
    """The bytes of a clip of noise."""
    frames, out = (
        np.random.default_rng(seed).integers(0, 255, (8, 20, 24, 3), np.uint8),
        io.BytesIO(),
    )
    np.savez(out, frames=frames, fps=fps)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips in a folder a class, among them pictures, still and moving, and one that is broken."""
    folder = tmp_path_factory.mktemp("clips")
    for number, kind in enumerate(("hit", "pass")):
        (folder / kind).mkdir()
        (folder / kind / "a.npz").write_bytes(clip(number))
    first, *rest = (
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (20, 20, 3), np.uint8))
        for n in range(4)
    )
    first.save(folder / "hit" / "b.gif", save_all=True, append_images=rest, duration=200)
    first.save(folder / "pass" / "b.png")
    (folder / "pass" / "broken.npz").write_bytes(clip(0)[:200])
    return folder


@pytest.fixture(scope="module")
def model():
    config = tiny.config_dict(
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        objectives__contrastive__between="video",
    )
    video = {"type": "video", "frames": 4}
    config.model.modalities = {"video": video, "text": config.model.modalities.text}
    fields = Config(config.to_dict())
    task = build_task(fields, tiny.tokenizer())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), fields, 1)


def test_a_folder_of_clips_is_indexed_and_searched(folder, model, tmp_path):
    items = read_items(folder, of="video", suffixes=VideoModality.suffixes)
    write_index(model, items, tmp_path / "index", print)
    index = SearchIndex.open(tmp_path / "index")
    assert index.of == "video" and sorted(index.rows.names) == [
        "hit/a.npz", "hit/b.gif", "pass/a.npz", "pass/b.png",
    ]  # fmt: skip
    (problem,) = index.header["problems"]
    assert problem["file"] == "pass/broken.npz" and "no array that can be read" in problem["what"]
    found = read_class_folder(folder, of="video", suffixes=VideoModality.suffixes)
    assert "hit" in str(found) and "pass" in str(found)

    with live_server.Running(model, index=index) as running:
        file = (folder / "hit" / "b.gif").read_bytes()
        post = running.client.post
        (best,) = post("/search", files={"item": file}, data={"of": "video", "count": 1}).json()[
            "results"
        ]
        assert index.rows.names[best["picture"]] == "hit/b.gif"
        assert best["score"] == pytest.approx(1, abs=1e-5)
        asked = {"of": "video", "classes": ["hit", "pass"], "templates": ["{}"]}
        assert len(post("/classify", files={"item": file}, data=asked).json()["classes"]) == 2
        for content, said in (
            (clip(0, fps=0.001), "8000 seconds are over 600"),
            (clip(0)[:200], "no array that can be read"),
            (b"", "the file is empty"),
        ):
            response = post("/embed", files={"items": content}, data={"of": "video"})
            assert response.status_code == 422 and said in response.json()["message"]
