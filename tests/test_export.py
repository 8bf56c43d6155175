"""`python -m unified_mm.export`: what it writes, run where this package cannot be imported."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm import export
from unified_mm.config import Config
from unified_mm.import_weights import Imported, write_run
from unified_mm.inference import exported
from unified_mm.inference.loaded import LoadedModel, one_device_mesh

NO_MATCHING = {"objectives__matching__weight": 0.0}
FUSIONS = {
    "early": {},
    "gated_cross_attention": {
        "model__fusion": "gated_cross_attention",
        "model__resampler__latents": 3,
        "model__resampler__layers": 1,
        "model__resampler__heads": 2,
        "model__resampler__head_width": 4,
        "model__cross__start": 0.5,
        **NO_MATCHING,
    },
    "late": {"model__fusion": "late", "objectives__captioning__weight": 0.0, **NO_MATCHING},
}
BATCHES = (1, 3, 8)
TEXTS = [f"a {colour} square" for colour in ("red", "green", "blue", "grey")] * 2
PROMPTS = ["", "red", "blue", ""] * 2
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)

ELSEWHERE = """
import pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("unified_mm", "flax", "jaxtyping"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
import numpy as np
import exported

model = exported.load()
pixels, texts, prompts, batches = pickle.load(sys.stdin.buffer)
found = {"flatbuffers": sys.modules["flatbuffers"].__file__}
for size in batches:
    part = {
        "images": model.embed_images(pixels[:size]), "texts": model.embed_texts(texts[:size])
    }
    if "decode" in model.manifest["programs"]:
        part["answers"] = model.answer(pixels[:size], prompts[:size])
        part["ids"] = model.write([model.tokens(p) for p in prompts[:size]], pixels[:size])
        ids = np.full((size, 12), model.manifest["text"]["padding"], np.int32)
        rows = [[model.manifest["text"]["begin"]] + model.tokens(p) for p in prompts[:size]]
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        valid = np.arange(12) < np.array([[len(row)] for row in rows])
        logits, state = model.prefill(ids, valid, pixels[:size])
        part["logits"], part["tokens"] = [np.asarray(logits)], []
        for _ in range(4):
            part["tokens"].append(part["logits"][-1].argmax(-1).astype(np.int32))
            logits, state = model.decode(part["tokens"][-1], state)
            part["logits"].append(np.asarray(logits))
    found[size] = part
pickle.dump(found, sys.stdout.buffer)
"""


def loaded(changes, times=3):
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    params = tiny.params(task)
    if "transformer" in params:  # what was read counts for more than the last token
        params["transformer"]["layers"] = jax.tree.map(
            lambda x: times * x, params["transformer"]["layers"]
        )
    return LoadedModel(task, params, one_device_mesh(), config, 5)


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A model and the folder of its export."""
    model, folder = loaded({}), tmp_path_factory.mktemp("exports") / "early"
    export.export(model, folder)
    return model, folder


def run_elsewhere(folder):
    """What the loader in a folder gives in a process of its own, which has neither us nor Flax."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps((PIXELS, TEXTS, PROMPTS, BATCHES)),
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def logits_anew(model, texts):
    """Scores [B, T, V] after each token of texts about the images, read at once without a cache."""
    (captioning,) = (each for each in model.task.objectives if each.name == "captioning")
    valid = np.arange(12) < np.array([[len(text)] for text in texts])
    ids = np.zeros(valid.shape, np.int32)
    ids[valid] = np.concatenate(texts)
    present = np.ones(len(texts), bool)
    image = {"pixels": PIXELS, "present": present}
    batch = {"image": image, "text": {"ids": ids, "valid": valid, "present": present}}

    def read(module, batch):
        return module.logits(module.encode(batch, (captioning.view,))[captioning.name].text)

    apply = jax.jit(lambda params, batch: model.task.model.apply(params, batch, method=read))
    return np.asarray(apply({"params": model.params}, batch))


def compare(model, folder):
    elsewhere = run_elsewhere(folder)
    assert elsewhere["flatbuffers"].startswith(str(folder))
    images, texts = model.embed_images(list(PIXELS)), model.embed_texts(TEXTS)
    for size in BATCHES:
        np.testing.assert_allclose(elsewhere[size]["images"], images[:size], atol=1e-5)
        np.testing.assert_allclose(elsewhere[size]["texts"], texts[:size], atol=1e-5)
    if "answers" in elsewhere[8]:
        compare_writing(model, elsewhere)
    return elsewhere


def compare_writing(model, elsewhere):
    tokenizer = model.task.tokenizer
    answers = model.answer(list(PIXELS), PROMPTS)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    written = zip(*elsewhere[8]["tokens"], strict=True)
    read = [[*prompt, *map(int, ids)] for prompt, ids in zip(prompts, written, strict=True)]
    expected = logits_anew(model, read)
    rows = np.arange(8)
    for size in BATCHES:
        found = elsewhere[size]
        assert found["answers"] == answers[:size]
        assert found["answers"] == [tokenizer.decode(row) for row in found["ids"]]
        for step, logits in enumerate(found["logits"]):
            places = np.array([len(prompt) - 1 + step for prompt in prompts])
            asked = expected[rows, places][:size]
            np.testing.assert_allclose(logits, asked, rtol=1e-4, atol=2e-4)
        for one, all_ in zip(found["tokens"], elsewhere[8]["tokens"], strict=True):
            np.testing.assert_array_equal(one, all_[:size])


def test_equal_outputs_without_this_package(early):
    elsewhere = compare(*early)
    assert len({tuple(row) for row in elsewhere[8]["ids"]}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["gated_cross_attention", "late"])
def test_equal_outputs_of_other_fusions(fusion, tmp_path):
    model = loaded(FUSIONS[fusion])
    manifest = export.export(model, tmp_path / "out", prompt=0 if fusion == "late" else 12)
    writes = fusion != "late"
    assert ("decode" in manifest["programs"]) == ("prefill" in manifest["programs"]) == writes
    compare(model, tmp_path / "out")


@pytest.mark.slow
def test_fewer_bits(tmp_path):
    """Parameters and sums in bfloat16, keys and values in int8."""
    model = loaded({}, times=1).with_options(dtype=jnp.bfloat16, cache="int8")
    manifest = export.export(model, tmp_path / "out")
    assert {entry["dtype"] for entry in manifest["parameters"]} == {"bfloat16"}
    assert "int8" in {entry["dtype"] for entry in manifest["programs"]["decode"]["state"]}
    again = exported.load(tmp_path / "out")
    images = model.embed_images(list(PIXELS))
    np.testing.assert_allclose(again.embed_images(PIXELS), images, atol=0.02)
    assert all(isinstance(text, str) for text in again.caption(PIXELS[:2]))


def test_less_room_and_shorter_prompts(early, tmp_path):
    model, _ = early
    manifest = export.export(model, tmp_path / "out", prompt=4, room=3)
    assert manifest["text"] | {"prompt": 4, "room": 3} == manifest["text"]
    again = exported.load(tmp_path / "out")
    whole = exported.load(early[1])
    assert again.write([[]] * 2, PIXELS[:2]) == [
        row[:3] for row in whole.write([[]] * 2, PIXELS[:2])
    ]
    with pytest.raises(ValueError, match="a prompt of 5 tokens: at least 1 and at most 4"):
        again.write([[7] * 4], PIXELS[:1])


def test_text_is_laid_out_as_in_training(early):
    model, folder = early
    again = exported.load(folder)
    for text in ("red", "a green square of size 3 " * 3, "<eos> größe"):
        assert again.tokens(text) == model.task.tokenizer.ids(text)
        assert again.text(again.tokens(text)) == model.task.tokenizer.decode(again.tokens(text))
        np.testing.assert_allclose(again.embed_texts([text]), model.embed_texts([text]), atol=1e-5)


def test_the_manifest_says_what_there_is(early):
    model, folder = early
    manifest = exported.read_manifest(folder)
    assert manifest["platforms"] == ["cpu"]
    assert manifest["run"] == {"fusion": "early", "step": 5, "state": "last"}
    assert manifest["programs"]["embed_images"]["inputs"] == {
        "pixels": {"dtype": "uint8", "shape": ["batch", 16, 16, 3]}
    }
    leaves = jax.tree.leaves(model.predictor.params)
    assert [entry["shape"] for entry in manifest["parameters"]] == [list(x.shape) for x in leaves]
    assert manifest["image"]["size"] == 16 and manifest["image"]["fit"] == "crop"
    listed = {"manifest.json", "exported.py", "flatbuffers", *manifest["files"]}
    assert {path.name for path in folder.iterdir()} == listed


@pytest.fixture
def copy(early, tmp_path):
    """The export in files of its own, to be damaged."""
    for path in early[1].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["parameters.npz", "decode.program", "tokenizer.json"])
def test_a_damaged_or_missing_file_is_named(copy, name):
    path = copy / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], whole[:-1], b""
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(exported.DamagedExport, match=f"{name} is damaged"):
            exported.load(copy)
    path.unlink()
    with pytest.raises(exported.DamagedExport, match=f"{name} cannot be read: No such file"):
        exported.load(copy)


def test_a_damaged_manifest_is_named(copy):
    path = copy / "manifest.json"
    text = path.read_text()
    for damaged in (text[:-20], "[]", text.replace('"room": 11', '"room": 12'), "\0"):
        path.write_text(damaged)
        with pytest.raises(exported.DamagedExport, match=r"manifest.json is damaged"):
            exported.load(copy)
    whole = json.loads(text)
    whole["manifest"]["format"] = 2
    whole["sha256"] = exported.digest(whole["manifest"])
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="has format 2; this loader reads 1"):
        exported.load(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no export .it has no manifest.json."):
        exported.load(copy)


def test_wrong_questions_are_refused(early):
    model = exported.load(early[1])
    for wrong in (PIXELS.astype(np.float32), PIXELS[0], PIXELS[:, :8]):
        with pytest.raises(ValueError, match=r"of 'pixels' uint8 .'batch', 16, 16, 3., and was"):
            model.embed_images(wrong)
    with pytest.raises(ValueError, match=r"prefill takes of 'pixels' uint8 .*, and was given none"):
        model.write([[]])
    with pytest.raises(ValueError, match="give a list of texts, not one alone"):
        model.embed_texts("red")


def test_of_nothing_comes_nothing(early):
    model = exported.load(early[1])
    assert model.embed_images(PIXELS[:0]).shape == model.embed_texts([]).shape == (0, 8)
    assert model.caption(PIXELS[:0]) == []


def test_a_model_without_words_says_so(tmp_path):
    model = loaded(FUSIONS["late"])
    export.export(model, tmp_path / "out", platforms=("cpu", "cuda", "tpu"))
    again = exported.load(tmp_path / "out")
    with pytest.raises(ValueError, match="has no prefill, but embed_images, embed_texts"):
        again.caption(PIXELS)
    export.export(model, tmp_path / "tpu", platforms=("tpu",))
    with pytest.raises(ValueError, match="was written for tpu, and this is cpu: export again"):
        exported.load(tmp_path / "tpu")


def test_nothing_is_left_where_something_goes_wrong(early, tmp_path, monkeypatch):
    model, folder = early
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        export.export(model, folder)
    with pytest.raises(ValueError, match="--platforms: 'gpu' is none of cpu, cuda, rocm, tpu"):
        export.export(model, tmp_path / "out", platforms=("gpu",))
    for wrong in ({"prompt": 13}, {"room": 12}, {"room": -1}):
        with pytest.raises(ValueError, match=r"this model's texts allow 1 to 1[12]"):
            export.export(model, tmp_path / "out", **wrong)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(early, tmp_path, capsys):
    model, _ = early
    config = tiny.config_dict().to_dict() | {"imported": {"family": "ours", "part": "both"}}
    imported = Imported(config, model.params, model.task.tokenizer, "both", "ours", {})
    run = write_run(imported, tmp_path / "run").path
    arguments = ["--run", str(run), "--out", str(tmp_path / "out"), "--platforms", "cpu, tpu"]
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert "embed_images: pixels uint8['batch', 16, 16, 3]" in said
    summary = json.loads(said[-1])
    assert summary["platforms"] == ["cpu", "tpu"] and "decode" in summary["programs"]
    found = exported.load(tmp_path / "out").embed_texts(TEXTS)
    np.testing.assert_allclose(found, model.embed_texts(TEXTS), atol=1e-5)
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 1 and "is not overwritten" in capsys.readouterr().err
    assert Path(export.exported.__file__).read_text() == (tmp_path / "out/exported.py").read_text()
