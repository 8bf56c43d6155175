"""A modality from outside is trained on, scored, indexed, classified and served as images are."""

import json
from pathlib import Path

import commands
import live_server
import numpy as np
import pytest

import unified_mm
from unified_mm import index as index_command
from unified_mm import zero_shot
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.search_index import SearchIndex

RECIPE = Path(__file__).parent / "toy_contrasts_recipe.py"
PACES = {"low": 0.4, "high": 2.5}
TONES = {
    f"{name}{number}": np.sin(np.arange(8) * pace + number).tolist()
    for name, pace in PACES.items()
    for number in range(3)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of images, tones and texts; tones in a folder a class, one of which is none."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "data").mkdir()
    flags = (f"--config={RECIPE}", f"--config.data.dir={folder / 'data'}")
    assert commands.run_uncounted(*flags, f"--workdir={folder / 'run'}") == 0
    for name, tone in TONES.items():
        file = folder / "tones" / name[:-1] / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tone))
    (folder / "tones" / "low" / "short.json").write_text("[1, 2]")
    (folder / "tones" / "low" / "notes.txt").write_text("no tone")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return unified_mm.load(folder / "run")


PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)


def test_scores_bear_the_names_of_both_sides(folder):
    scores = json.loads((folder / "run" / "result.json").read_text())["scores"]
    directions = {name.split("/")[-2] for name in scores if name.endswith("recall_at_1")}
    assert directions == {
        "text_to_image",
        "image_to_text",
        "text_to_tone",
        "tone_to_text",
        "tone_to_image",
        "image_to_tone",
    }
    assert "single_caption/text_to_tone/recall_at_1" in scores


def test_images_are_embedded_by_the_contrast_of_images(model):
    images, texts = model.embed_images([PICTURE]), model.embed_texts(["high tone"])
    expected = model.embed([PICTURE], of="image", objective="contrastive")
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(
        texts, model.embed(["high tone"], of="text", objective="contrastive")
    )
    tones = model.embed(TONES.values(), of="tone", objective="audio_contrast")
    assert tones.shape == (6, 8) and np.allclose(np.linalg.norm(tones, axis=1), 1, rtol=1e-5)
    assert np.abs(tones[0] - images[0]).max() > 1e-3


def test_where_several_embed_one_must_be_named(model):
    several = r"text is embedded by several objectives, .*audio_contrast \(tone, text\).*: name one"
    with pytest.raises(ValueError, match=several):
        model.embed(["high tone"], of="text")
    with pytest.raises(ValueError, match="objective='matching' embeds no image"):
        model.embed([PICTURE], of="image", objective="matching")
    with pytest.raises(
        ValueError, match="this model reads no video: what it reads is image, tone, text"
    ):
        model.embed([PICTURE], of="video")
    with pytest.raises(ValueError, match="a list of items"):
        model.embed("x", of="tone", objective="audio_contrast")


def ask(command, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module")
def made(folder):
    out = folder / "index"
    run = (f"--run={folder / 'run'}", f"--images={folder / 'tones'}", "--of=tone")
    assert ask(index_command, *run, f"--out={out}") == 0
    return out


def test_an_index_is_of_the_modality_that_is_named(folder, model, made, capsys):
    index = SearchIndex.open(made)
    assert sorted(index.rows.names) == sorted(f"{name[:-1]}/{name}.json" for name in TONES)
    assert index.of == "tone" and list(index.nearest) == ["tone"]
    expected = model.embed(TONES.values(), of="tone", objective="audio_contrast")
    order = [list(TONES).index(Path(name).stem) for name in index.rows.names]
    np.testing.assert_allclose(index.nearest["tone"].vectors, expected[order], atol=1e-6)
    (problem,) = index.header["problems"]
    assert (
        problem["file"] == "low/short.json"
        and problem["what"] == "a tone has 8 samples, this has [2]"
    )

    asked = (f"--run={folder / 'run'}", f"--index={made}")
    file = folder / "tones" / "high" / "high1.json"
    assert ask(index_command, *asked, f"--query_item=tone:{file}", "--top=1") == 0
    assert capsys.readouterr().out == "1.000  high/high1.json\n"
    assert ask(index_command, *asked, "--query=high tone", f"--query_item=tone:{file}") == 0
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert ask(index_command, *asked, "--query=high tone", "--top=6", "--kind=tone") == 0
    text = model.embed(["high tone"], of="text", objective="audio_contrast")[0]
    best = index.rows.names[int(np.argmax(index.nearest["tone"].vectors @ text))]
    assert capsys.readouterr().out.splitlines()[0].endswith(best)
    assert ask(index_command, *asked, "--evaluate") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["scores"] == {"index/tone_to_tone/recall_at_10": 1.0}


def test_an_index_lies_in_the_space_that_is_named(folder, model, capsys):
    out, picture = folder / "beside_pictures", folder / "data" / "val0.png"
    run = f"--run={folder / 'run'}"
    asked = (run, f"--images={folder / 'tones'}", "--of=tone", "--objective=both", f"--out={out}")
    assert ask(index_command, *asked, f"--query_image={picture}") == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    query = model.embed([picture], of="image", objective="both")[0]
    tones = model.embed(TONES.values(), of="tone", objective="both")
    scores = [float(line.split()[0]) for line in lines]
    np.testing.assert_allclose(scores, np.sort(tones @ query)[::-1], atol=6e-4)
    assert ask(index_command, run, f"--index={out}", "--query=high") == 1
    assert "objective='both' embeds no text: the model was trained on" in capsys.readouterr().err
    assert ask(index_command, *asked[:-2], f"--out={out}") == 1
    assert "is of another --objective: name a new one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--of=video",),
            "no video can be read from a file here: this model reads image, tone, te",
        ),
        (("--of=text",), "no text can be read from a file here: its modality has no `read`"),
        (("--of=tone", "--split=val"), "no splits to choose from"),
        (("--of=image",), "holds no image (.avif"),
        (("--of=tone", "--objective=contrastive"), "objective='contrastive' embeds no tone: the"),
        (("--of=tone", "--query_item=tone"), "--query_item=tone: give a modality and a file"),
    ],
)
def test_what_cannot_be_indexed_is_refused_with_what_can(folder, capsys, arguments, message):
    run = (f"--run={folder / 'run'}", f"--images={folder / 'tones'}", f"--out={folder / 'new'}")
    assert ask(index_command, *run, *arguments) == 1
    assert message in capsys.readouterr().err and not (folder / "new").exists()


def test_an_index_that_an_earlier_version_made_is_of_images(folder, model, tmp_path, capsys):
    pictures = read_items(folder / "data")
    out = tmp_path / "index"
    write_index(model, pictures, out, print)
    index = SearchIndex.open(out)
    assert (index.header["of"], index.header["objective"]) == ("image", "contrastive")
    header = {key: value for key, value in index.header.items() if key not in ("of", "objective")}
    old = SearchIndex(out, header, index.rows, index.pictures, index.nearest)
    assert old.of == "image" and old.space(model) == "contrastive"
    np.testing.assert_array_equal(
        old.embed(model, ["high tone"], "text"), model.embed_texts(["high tone"])
    )


def test_classes_of_any_modality_are_told_by_their_names(folder, model, tmp_path, capsys):
    output = tmp_path / "scores.json"
    asked = (f"--run={folder / 'run'}", f"--images={folder / 'tones'}", "--of=tone")
    template = "--template={} tone"
    assert ask(zero_shot, *asked, template, "--max_bad_share=0.2", f"--output={output}") == 0
    said = capsys.readouterr().out
    assert "7 tones of 2 classes" in said
    assert "left out: low/short.json (a tone has 8 samples, this has [2])" in said
    result = json.loads(output.read_text())
    assert list(result["scores"]) == [
        "zero_shot/tone/accuracy_at_1",
        "zero_shot/tone/mean_per_class",
        "zero_shot/tone/accuracy/high",
        "zero_shot/tone/accuracy/low",
    ]
    similar = model.classify(TONES.values(), ["high", "low"], ["{} tone"], of="tone")
    right = similar.argmax(1) == [name.startswith("low") for name in TONES]
    assert result["scores"]["zero_shot/tone/accuracy_at_1"] == pytest.approx(right.mean())
    assert result["of"] == "tone" and result["images"] == 6
    assert ask(zero_shot, *asked) == 1
    assert "1 of the 7 tones in" in capsys.readouterr().err


def test_a_server_takes_items_by_the_name_of_their_modality(folder, model, made):
    tone = TONES["high1"]
    file = json.dumps(tone).encode()
    picture = live_server.png()
    index = SearchIndex.open(made)
    with live_server.Running(model, index=index) as running:

        def post(path, **asked):
            return running.client.post(path, **asked)

        asked = {"files": [("items", file)] * 2, "data": {"of": "tone", "texts": ["high tone"]}}
        found = post("/embed", **asked).json()
        expected = model.embed([tone], of="tone", objective="audio_contrast")[0]
        np.testing.assert_allclose(found["items"], [expected, expected], atol=1e-5)
        text = model.embed(["high tone"], of="text", objective="audio_contrast")
        np.testing.assert_allclose(found["texts"], text, atol=1e-5)
        assert found["images"] == []

        fields = {"of": "tone", "objective": "both"}
        beside = [("items", file), ("images", picture)]
        found = post("/embed", files=beside, data=fields).json()
        expected = model.embed([tone], of="tone", objective="both")
        np.testing.assert_allclose(found["items"], expected, atol=1e-5)
        assert len(found["images"]) == 1

        found = post("/search", files={"item": file}, data={"of": "tone", "count": 1}).json()
        (best,) = found["results"]
        assert found["kind"] == "tone" and best["score"] == pytest.approx(1, abs=1e-5)
        assert index.rows.names[best["picture"]] == "high/high1.json"
        assert len(post("/search", json={"text": "high tone"}).json()["results"]) == 6

        asked = {"of": "tone", "classes": ["high", "low"], "templates": ["{} tone"]}
        found = post("/classify", files={"item": file}, data=asked).json()["classes"]
        similar = model.classify([tone], ["high", "low"], ["{} tone"], of="tone")[0]
        scores = {each["name"]: each["similarity"] for each in found}
        np.testing.assert_allclose([scores["high"], scores["low"]], similar, atol=1e-5)

        missing = running.client.get("/healthz").json()["missing"]
        assert missing["/pictures/{number}"] == "the index is of tone items"
        for path, options, words in (
            ("/search", {"files": {"image": picture}}, "'audio_contrast' embeds no image"),
            ("/search", {"json": {"text": "high", "kind": "image"}}, "should be 'tone' or 'text'"),
            ("/search", {"json": {"text": "high", "kind": "text"}}, "holds tone items alone"),
            ("/embed", {"files": {"items": file}, "data": {"of": "video"}}, "reads no video: what"),
            (
                "/embed",
                {"files": {"items": b"[1]"}, "data": {"of": "tone"}},
                "items[0]: a tone has",
            ),
            ("/embed", {"files": {"items": b"{"}, "data": {"of": "tone"}}, "items[0]: Expecting"),
            (
                "/embed",
                {"files": {"items": file}, "data": {"of": "text", "objective": "audio_contrast"}},
                "items[0]: no text can be read from a file here",
            ),
            ("/search", {"json": {"text": "high", "of": "tone"}}, "of items, and none is given"),
            ("/classify", {"json": {"classes": ["a"]}}, "one picture as image, or one item"),
            ("/embed", {"files": {"items": file}, "data": {"of": "text"}}, "text is embedded by"),
        ):
            response = post(path, **options)
            assert response.status_code == 422 and words in response.json()["message"], (
                response.text
            )
