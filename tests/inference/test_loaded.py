"""A run folder on disk, read back by `unified_mm.load`."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import unified_mm
from unified_mm.data.records import Record, Text
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.files import write_json
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import listed, listed_texts, one_device_mesh
from unified_mm.inference.predictor import Predictor
from unified_mm.runs.checkpoints import CheckpointError
from unified_mm.runs.folder import RunFolder, RunFolderError

TEXTS = ["a red square of size 1", "blue, size 2", "a green square of size 3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Square pictures of the model's size, so that a view of them is the picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    arrays = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in TEXTS]
    paths = [folder / f"{number}.png" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return arrays, paths


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run's folder, and the parameters that are to be found there: the averaged ones."""
    config = tiny.config_dict(train__ema_decay=0.9)
    task = tiny.task(train__ema_decay=0.9)
    params = tiny.params(task, 1)
    average = jax.tree.map(lambda x: 0.5 * x, params)
    path = tiny.write_run(tmp_path_factory.mktemp("runs") / "first", config, params, average)
    return task, average, path


@pytest.fixture(scope="module")
def model(run):
    return unified_mm.load(run[2])


def test_what_was_saved_is_what_is_loaded(run, model):
    _, average, _ = run
    assert model.step == 7
    assert model.config.model.width == 16
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), average)


def test_without_an_average_the_parameters_themselves_are_loaded(run, tmp_path):
    params = jax.tree.map(lambda x: 3 * x, run[1])
    loaded = unified_mm.load(tiny.write_run(tmp_path / "run", tiny.config_dict(), params, None))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), params)


def test_embeddings_are_those_of_the_predictor_and_of_unit_norm(run, model, pictures):
    task, average, _ = run
    arrays, paths = pictures
    records = [
        Record(id=i, parts={"image": str(path)}, texts=(Text("", text),), mirrorable=True)
        for i, (path, text) in enumerate(zip(paths, TEXTS, strict=True))
    ]
    batch = {
        name: jax.tree.map(
            lambda *rows: np.stack(rows), *(modality.prepare(r, None) for r in records)
        )
        for name, modality in task.modalities.items()
    }
    predictor = Predictor(task, average, one_device_mesh())
    images, texts = model.embed_images(paths), model.embed_texts(TEXTS)
    assert images.dtype == texts.dtype == np.float32 and images.shape == texts.shape == (3, 8)
    np.testing.assert_allclose(images, predictor.embed(batch, "image"), atol=1e-5)
    np.testing.assert_allclose(texts, predictor.embed(batch, "text"), atol=1e-5)
    for vectors in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert model.caption(paths) == predictor.write(batch, ["", "", ""])


def test_a_path_a_pil_image_and_an_array_are_one_picture(model, pictures):
    arrays, paths = pictures
    opened = [Image.open(path) for path in paths]
    forms = [paths, [str(path) for path in paths], opened, arrays]
    embedded = [model.embed_images(form) for form in forms]
    for other in embedded[1:]:
        np.testing.assert_array_equal(other, embedded[0])
    assert model.caption(arrays) == model.caption(opened) == model.caption(paths)
    gray = Image.fromarray(arrays[0]).convert("L")
    as_rgb = np.repeat(np.asarray(gray)[..., None], 3, axis=2)
    np.testing.assert_array_equal(model.embed_images([gray]), model.embed_images([as_rgb]))


def test_more_than_a_batch_comes_back_in_order(model, pictures):
    arrays, _ = pictures
    many = [arrays[i % 3] for i in range(35)]
    few = model.embed_images(arrays)
    # Batches of other sizes are other programs: they round otherwise.
    np.testing.assert_allclose(model.embed_images(many), few[np.arange(35) % 3], atol=1e-6)
    assert model.caption(many)[:3] == model.caption(arrays)
    assert len(model.answer(many, [""] * 35)) == 35


def test_wrong_images_and_questions_are_refused(model, pictures, tmp_path):
    arrays, _ = pictures
    with pytest.raises(FileNotFoundError, match="there is no image '.*missing.png'"):
        model.embed_images([tmp_path / "missing.png"])
    for wrong in (arrays[0].astype(np.float32), arrays[0][..., 0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[height, width, 3\]; got"):
            model.caption([wrong])
    with pytest.raises(ValueError, match="3 images and 1 questions"):
        model.answer(arrays, ["what?"])
    with pytest.raises(ValueError, match="no room is left for an answer; shorten it"):
        model.answer(arrays[:1], ["a very long question " * 5])


def test_one_value_in_place_of_a_list_is_refused(model, pictures):
    arrays, paths = pictures
    for one in (paths[0], str(paths[0]), b"bytes", arrays[0], Image.fromarray(arrays[0]), None):
        with pytest.raises(ValueError, match="give a list of images"):
            listed(one, "images")
    for ask in (model.embed_images, model.caption):
        with pytest.raises(ValueError, match="give a list of images, not a str alone"):
            ask(str(paths[0]))
    with pytest.raises(ValueError, match="give a list of texts, not a str alone"):
        model.embed_texts("a cat")
    with pytest.raises(ValueError, match="give a list of questions"):
        model.answer(arrays[:1], "what?")
    with pytest.raises(ValueError, match="give a list of classes"):
        model.classify(arrays, "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is a NoneType"),
        (5, "is a int"),
        (b"x", "is a bytes"),
        ("a\ud800", "half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named_by_its_place(text, message):
    with pytest.raises(ValueError, match=rf"texts\[1\].* {message}"):
        listed_texts(["a cat", text], "texts")


def test_every_question_looks_at_its_texts(model, pictures):
    for ask in (
        lambda: model.embed_texts(["\ud800"]),
        lambda: model.answer(pictures[0][:1], ["\ud800"]),
        lambda: model.classify(pictures[0], ["\ud800"]),
    ):
        with pytest.raises(ValueError, match=r"\[0\], .* holds half of a surrogate pair"):
            ask()


def test_empty_lists_generators_and_stacks_work(model, pictures):
    arrays, paths = pictures
    for none in (model.embed_images([]), model.embed_texts([])):
        assert none.shape == (0, 8) and none.dtype == np.float32
    assert model.caption([]) == []
    assert model.caption(path for path in paths) == model.caption(paths)
    stacked, one_by_one = model.embed_images(np.stack(arrays)), model.embed_images(arrays)
    np.testing.assert_array_equal(stacked, one_by_one)
    assert model.embed_texts(np.array(TEXTS)).shape == (3, 8)


def test_a_pil_image_is_converted_as_its_file_is(model, tmp_path):
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[274] = 6
    clear = Image.fromarray(rng.integers(0, 256, (16, 20, 4), np.uint8), "RGBA")
    deep = Image.fromarray(rng.integers(0, 65536, (16, 20)).astype(np.uint16))
    plain = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
    clear.save(tmp_path / "clear.png")
    deep.save(tmp_path / "deep.png")
    plain.save(tmp_path / "turned.png", exif=turned)
    for name in ("clear.png", "deep.png", "turned.png"):
        view = model.view(Image.open(tmp_path / name))
        np.testing.assert_array_equal(view, model.view(tmp_path / name))
    with pytest.raises(ValueError, match="the F picture cannot be decoded"):
        model.view(Image.new("F", (4, 4)))


def test_what_has_no_pixel_or_cannot_be_read_is_refused(model, tmp_path):
    for shape in ((0, 0, 3), (4, 0, 3)):
        with pytest.raises(ValueError, match="has no pixel"):
            model.view(np.zeros(shape, np.uint8))
    with pytest.raises(FileNotFoundError, match="there is no image"):
        model.view("x" * 300)
    (tmp_path / "bad.png").write_bytes(b"")
    kept, embedded, problems = model.embed_files([str(tmp_path / "bad.png")])
    assert (kept, embedded.shape, [p.what for p in problems]) == ([], (0, 8), ["the file is empty"])


@pytest.mark.parametrize("fields", [[], {}, {"data": 5}])
def test_a_damaged_config_is_named(tmp_path, fields):
    write_json(RunFolder(tmp_path).config, fields)
    with pytest.raises(RunFolderError, match=r"config\.json is damaged"):
        unified_mm.load(tmp_path)


def test_a_modality_from_outside_that_lacks_a_field_names_it(tmp_path):
    config = tiny.config_dict().to_dict()
    config["model"]["modalities"]["tone"] = {"type": "toy_tone:Tone", "frame": 4}
    write_json(RunFolder(tmp_path).config, config)
    tiny.tokenizer().save(RunFolder(tmp_path).tokenizer)
    with pytest.raises(RunFolderError, match=r"no field model\.modalities\.tone\.samples"):
        unified_mm.load(tmp_path)


def test_a_folder_is_no_image(model, tmp_path):
    with pytest.raises(ValueError, match="is no file but a folder"):
        model.view(tmp_path)


def test_no_run_and_no_checkpoint_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run .it has no config.json."):
        unified_mm.load(tmp_path / "nothing")
    write_json(RunFolder(tmp_path / "begun").config, tiny.config_dict().to_dict())
    tiny.tokenizer().save(RunFolder(tmp_path / "begun").tokenizer)
    with pytest.raises(CheckpointError):
        unified_mm.load(tmp_path / "begun")


def test_a_model_says_what_it_was_not_trained_for(run):
    task = tiny.task(objectives__captioning__weight=0.0, objectives__matching__weight=0.0)
    predictor = Predictor(task, run[1], one_device_mesh())
    batch = jax.tree.map(np.asarray, tiny.batch(task, 2))
    with pytest.raises(ValueError, match="cannot write: it was trained on contrastive"):
        predictor.write(batch, ["", ""])
    task = tiny.task(objectives__contrastive__weight=0.0, objectives__matching__weight=0.0)
    with pytest.raises(ValueError, match="nothing embeds text: the model was trained on capt"):
        Predictor(task, run[1], one_device_mesh()).embed(batch, "text")


def test_padding_that_is_the_end_token_is_no_end(tmp_path):
    path = tmp_path / "tokenizer.json"
    tiny.tokenizer().save(path)
    one_token = TextTokenizer.load(path, pad="<eos>")  # as in GPT-2's vocabulary
    task = tiny.task(objectives__matching__weight=0.0)
    params = tiny.writing_params(task, task.tokenizer.eos_id)
    predictor = Predictor(replace(task, tokenizer=one_token), params, one_device_mesh())
    batch = jax.tree.map(np.asarray, tiny.batch(task))
    prompts = ["", "a red", "", "a"]
    for decoding in (Decoding(tokens=2), Decoding(), Decoding(beams=2, samples=2, tokens=2)):
        for prompt, texts in zip(
            prompts, predictor.generate(batch, prompts, decoding), strict=True
        ):
            used = len(one_token.encode_prompt(prompt))
            room = decoding.tokens or task.modalities["text"].length - used
            for text in texts:
                assert len(text.tokens) <= room
