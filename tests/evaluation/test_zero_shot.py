"""Classes from folders, their embeddings, and the scores: by hand and against plain loops."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_mm.config import Config
from unified_mm.evaluation import zero_shot
from unified_mm.evaluation.zero_shot import chance, read_class_folder, zero_shot_scores
from unified_mm.inference.classes import TEMPLATES, class_embeddings, filled
from unified_mm.inference.loaded import BATCH, LoadedModel, one_device_mesh

TEMPLATE = ("{}", "a {} square")


def write(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"")
    return folder


def loaded(**changes):
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 1)


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture
def squares(tmp_path):
    """Three classes, 14 noisy pictures each: more than a batch."""
    rng = np.random.default_rng(0)
    for name, colour in tiny.COLOURS.items():
        (tmp_path / name).mkdir()
        for number in range(14):
            pixels = np.clip(rng.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02}.png")
    return tmp_path


def test_classes_are_directories_and_images_lie_at_any_depth(tmp_path):
    write(
        tmp_path,
        "tabby-cat/part/deep/b.JPG",
        "tabby-cat/a.png",
        "golden_retriever/x.jpeg",
        "golden_retriever/notes.txt",
        "golden_retriever/.hidden.jpg",
        "golden_retriever/.cache/y.jpg",
        ".git/z.jpg",
        "README.md",
    )
    folder = read_class_folder(tmp_path)
    assert folder.classes == ("golden retriever", "tabby cat")
    found = [str(file.relative_to(tmp_path)) for file in folder.files]
    assert found == ["golden_retriever/x.jpeg", "tabby-cat/a.png", "tabby-cat/part/deep/b.JPG"]
    assert folder.class_of_file == (0, 1, 1)
    assert folder.others == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jpg"], "holds no directories: images must lie in one directory per class"),
        ([".hidden/a.jpg"], "holds no directories"),
        (["cat/a.jpg"], "one class alone, cat"),
        (["cat/a.jpg", "dog/notes.txt"], r"dog holds no image \(\.avif"),
        (["cat/a.jpg", "dog/.a.jpg"], "dog holds no image"),
        (["red_ball/a.jpg", "red-ball/a.jpg"], "red-ball and red_ball in .* 'red ball': rename"),
        (["Cat/a.jpg", "cat/a.jpg"], "both called 'cat'"),
        (["cat/a.jpg", "_-_/a.jpg"], "_-_ has no name in words"),
        ([b"cat\xff/a.jpg".decode("utf-8", "surrogateescape"), "dog/a.jpg"], r"cat\\xff has no"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, files, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_class_folder(write(tmp_path, *files))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_class_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo", "once and no other"),
        ("a {name}", "once and no other"),
        ("a {0}", "once and no other"),
        ("a {!r}", "once and no other"),
        ("a {:>9}", "once and no other"),
        ("{} and {}", "once and no other"),
        ("{} in {place}", "once and no other"),
        ("a {{}}", "once and no other"),
        ("a {", "not well formed"),
    ],
)
def test_templates_have_one_plain_place(template, message):
    with pytest.raises(ValueError, match=message):
        filled(["{}", template], ["cat"])


def test_templates_are_filled_class_by_class():
    assert filled(["{}", "a {}."], ["cat", "{dog}"]) == ["cat", "a cat.", "{dog}", "a {dog}."]
    assert "{}" in TEMPLATES and len(set(TEMPLATES)) == len(TEMPLATES)
    with pytest.raises(ValueError, match="no template"):
        filled([], ["cat"])


def test_a_class_is_the_mean_direction_of_its_sentences():
    known = {"cat": [1, 0, 0], "a cat": [0, 1, 0], "dog": [0, 0, 1], "a dog": [0, 0, 1]}

    def embed(texts):
        return np.array([known[text] for text in texts], np.float32)

    found = class_embeddings(embed, ["cat", "dog"], ["{}", "a {}"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-7)
    with pytest.raises(ValueError, match="no class"):
        class_embeddings(embed, [])


@pytest.mark.parametrize("vectors", [[[np.nan, 1], [0, 1]], [[1, 0], [-1, 0]]])
def test_sentences_that_are_not_finite_or_cancel_out_are_refused(vectors):
    with pytest.raises(ValueError, match="1 of 1 embeddings are not finite .first: class 'cat'"):
        class_embeddings(lambda texts: np.array(vectors, np.float32), ["cat"], TEMPLATE)


def test_scores_by_hand():
    classes = np.eye(2, dtype=np.float32)
    images = np.array([[1, 0], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], np.float32)
    scores = zero_shot_scores(images, classes, np.array([0, 0, 0, 1]), ["cat", "dog"])
    assert scores == {
        "zero_shot/accuracy_at_1": 0.5,
        "zero_shot/mean_per_class": pytest.approx(1 / 3),
        "zero_shot/accuracy/cat": pytest.approx(2 / 3),
        "zero_shot/accuracy/dog": 0.0,
    }
    assert chance(["cat", "dog"]) == dict.fromkeys(scores, 0.5)


def test_five_places_count_where_there_are_more_classes():
    names = [f"class {i}" for i in range(10)]
    assert chance(names)["zero_shot/accuracy_at_5"] == 0.5
    assert "zero_shot/accuracy_at_5" not in chance(names[:5])
    images = np.arange(10, 0, -1, dtype=np.float32)[None].repeat(10, 0)
    scores = zero_shot_scores(images, np.eye(10, dtype=np.float32), np.arange(10), names)
    assert scores["zero_shot/accuracy_at_5"] == 0.5
    assert scores["zero_shot/accuracy_at_1"] == scores["zero_shot/accuracy/class 0"] / 10 == 0.1


def test_ties_count_against_the_model():
    names = [f"class {i}" for i in range(6)]
    images, classes = np.ones((6, 4), np.float32), np.ones((6, 4), np.float32)
    scores = zero_shot_scores(images, classes, np.arange(6), names)
    assert set(scores.values()) == {0.0}


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_scores_agree_with_plain_loops(seed, count):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-2, 3, (count, 3)).astype(np.float32)  # whole numbers: many ties
    labels = np.concatenate([np.arange(count), rng.integers(0, count, 9)])
    images = rng.integers(-2, 3, (len(labels), 3)).astype(np.float32)
    names = [str(i) for i in range(count)]
    ranks = []
    for image, label in zip(images, labels, strict=True):
        others = [i for i in range(count) if i != label]
        ranks.append(1 + sum(image @ classes[i] >= image @ classes[label] for i in others))
    right = np.array(ranks) <= 1
    by_class = [right[labels == i].mean() for i in range(count)]
    scores = zero_shot_scores(images, classes, labels, names)
    assert scores["zero_shot/accuracy_at_1"] == pytest.approx(right.mean())
    assert scores["zero_shot/mean_per_class"] == pytest.approx(np.mean(by_class))
    assert [scores[f"zero_shot/accuracy/{name}"] for name in names] == pytest.approx(by_class)
    if count > 5:
        assert scores["zero_shot/accuracy_at_5"] == pytest.approx((np.array(ranks) <= 5).mean())


def test_classify_gives_cosines(model, squares):
    paths = sorted(squares.rglob("*.png"))[:3]
    cosines = model.classify(paths, ["red", "blue"], TEMPLATE)
    assert cosines.shape == (3, 2) and cosines.dtype == np.float32
    for column, name in enumerate(["red", "blue"]):
        mean = model.embed_texts([name, f"a {name} square"]).mean(0)
        expected = model.embed_images(paths) @ (mean / np.linalg.norm(mean))
        np.testing.assert_allclose(cosines[:, column], expected, atol=1e-5)
    assert model.classify([], ["red", "blue"]).shape == (0, 2)


def test_a_folder_scores_as_classify_says(model, squares):
    folder = read_class_folder(squares)
    found = zero_shot.classify_folder(model, folder, templates=TEMPLATE)
    assert len(folder.files) == found.images == 42 > BATCH
    best = model.classify(folder.files, folder.classes, TEMPLATE).argmax(1)
    right = best == np.array(folder.class_of_file)
    assert found.scores["zero_shot/accuracy_at_1"] == pytest.approx(right.mean())
    assert found.scores.keys() == found.chance.keys()
    assert (found.problems, found.texts, found.texts_cut) == ((), 6, 0)
    long = zero_shot.classify_folder(model, folder, templates=["{}", "a {} " + "and so on" * 9])
    assert (long.texts, long.texts_cut) == (6, 3)


def test_pictures_that_cannot_be_read_are_left_out_and_named(model, squares):
    (squares / "red" / "00.png").write_bytes(b"no picture")
    (squares / "green" / "gone.png").symlink_to(squares / "nowhere.png")
    folder = read_class_folder(squares)
    found = zero_shot.classify_folder(model, folder, templates=TEMPLATE)
    assert found.images == 41
    assert {(p.file, p.what) for p in found.problems} == {
        ("red/00.png", "not an image of a known format"),
        ("green/gone.png", "unreadable: no file"),
    }
    whole = [i for i, file in enumerate(folder.files) if file.is_file()]
    whole.remove(folder.files.index(squares / "red" / "00.png"))
    best = model.classify([folder.files[i] for i in whole], folder.classes, TEMPLATE).argmax(1)
    right = best == np.array(folder.class_of_file)[whole]
    assert found.scores["zero_shot/accuracy_at_1"] == pytest.approx(right.mean())
    with pytest.raises(ValueError, match=r"2 of the 43 images in .*gone\.png \(unreadable"):
        zero_shot.classify_folder(model, folder, templates=TEMPLATE, max_bad_share=0.04)
    with pytest.raises(ValueError, match="max_bad_share=nan: must be a share"):
        zero_shot.classify_folder(model, folder, max_bad_share=float("nan"))


def test_a_class_without_a_readable_picture_is_refused(model, squares):
    for file in (squares / "red").iterdir():
        file.write_bytes(b"")
    folder = read_class_folder(squares)
    with pytest.raises(ValueError, match="1 of the 3 classes in .* no image that can be read: red"):
        zero_shot.classify_folder(model, folder, max_bad_share=1.0)


def test_embeddings_that_are_not_finite_are_refused(model, squares):
    folder = read_class_folder(squares)
    params = jax.tree.map(lambda x: x, model.params)
    image = params["embedders_image"]["patches"]
    image["kernel"] = np.full_like(image["kernel"], np.nan)
    broken = LoadedModel(model.task, params, one_device_mesh(), model.config, 1)
    with pytest.raises(ValueError, match=r"32 of 32 embeddings are not finite .first: .*00\.png"):
        zero_shot.classify_folder(broken, folder, templates=TEMPLATE)


def test_a_model_without_contrast_is_refused(squares):
    model = loaded(objectives__contrastive__weight=0.0, objectives__matching__weight=0.0)
    with pytest.raises(ValueError, match="trained on captioning, and classification needs contr"):
        zero_shot.classify_folder(model, read_class_folder(squares))
