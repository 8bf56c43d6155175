"""Documents: four forms of JSON lines read alike, every fault named with file and line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_mm.data import images
from unified_mm.data.documents import Document, Item, read_documents, summary
from unified_mm.data.records import Problem, Text


class Tone:
    """A modality that can tell what is wrong with its parts."""

    def fault(self, part):
        return "" if len(part) == 2 else f"{len(part)} values, not 2"


READ = {"image": None, "tone": Tone(), "text": None}
MARKED = {"text": "a cat <image> and <image> a dog", "images": ["a.jpg", "b.jpg"]}


def picture(path, mode="RGB", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder with two good pictures."""
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        picture(tmp_path / name, seed=seed)
    return tmp_path


def write(folder, *lines):
    """Documents as `folder/pages.jsonl`; a line that is no dict is written as it is."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "pages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(folder, max_bad_share=0.0):
    path = folder / "pages.jsonl"
    return read_documents(path, READ, max_bad_share=max_bad_share, threads=1, progress=False)


def parts(folder, *line):
    """What the only document of a file holds."""
    write(folder, *line)
    (document,) = read(folder).documents
    return shown(folder, document)


def shown(folder, document):
    """Parts as strings; pictures in brackets."""
    return [
        f"[{part.part.removeprefix(str(folder) + '/')}]" if isinstance(part, Item) else part
        for part in (p if isinstance(p, Item) else p.target for p in document.parts)
    ]


def test_parts_by_modality(folder):
    named = [{"text": "a cat"}, {"image": "a.jpg"}, {"tone": [1, 2]}, {"text": " "}]
    write(folder, {"parts": named}, {"parts": [{"text": "x"}, {"tone": [1]}]})
    found = read(folder, 0.5)
    assert [document.parts for document in found.documents] == [
        (Text("", "a cat"), Item("image", str(folder / "a.jpg")), Item("tone", [1, 2]))
    ]
    assert found.problems == (Problem("pages.jsonl:2: tone", "1 values, not 2", "left out"),)
    assert "1 documents with 1 images, 1 tones and 1 texts" in summary(found)
    other = [{**named[2], "tone": [1, 3]} if "tone" in each else each for each in named]
    write(folder, {"parts": other})
    assert read(folder).fingerprint != found.fingerprint
    for wrong, what in (
        ([{"film": 1}], "holds film, and the model reads image, tone, text"),
        ([{"text": "a", "image": "a.jpg"}], r"parts\[0\] must have one key"),
        ([{"image": 3}], "must be a string"),
        ([{"text": 3}], "must be a string"),
    ):
        write(folder, {"parts": wrong})
        with pytest.raises(ValueError, match=rf"pages.jsonl:1.*{what}"):
            read(folder)


def test_text_with_markers(folder):
    assert parts(folder, MARKED) == ["a cat", "[a.jpg]", "and", "[b.jpg]", "a dog"]
    line = {"text": "<image><image> a cat <image>", "images": ["b.jpg", "a.jpg", "b.jpg"]}
    assert parts(folder, line) == ["[b.jpg]", "[a.jpg]", "a cat", "[b.jpg]"]


@pytest.mark.parametrize("line", [{"text": "words"}, {"text": "words", "images": []}])
def test_text_alone_is_a_document(folder, line):
    assert parts(folder, line) == ["words"]


def test_texts_side_by_side_with_images(folder):
    line = {"texts": ["a", None, "b", "c", None], "images": [None, "b.jpg", None, None, "a.jpg"]}
    assert parts(folder, line) == ["a", "[b.jpg]", "b", "c", "[a.jpg]"]


def test_images_matched_to_texts_come_right_before_them(folder):
    info = [("b.jpg", 2), ("a.jpg", 0), ("a.jpg", 2)]
    line = {
        "text_list": ["a", "b", "c"],
        "image_info": [{"image_name": n, "matched_text_index": i, "sim": 0.3} for n, i in info],
        "similarity_matrix": [[1.0]],
    }
    assert parts(folder, line) == ["[a.jpg]", "a", "b", "[b.jpg]", "[a.jpg]", "c"]


def test_documents_hold_absolute_paths_and_captions_without_prompt(folder):
    write(folder, {"id": "first", **MARKED})
    (document,) = read(folder).documents
    assert document == Document(
        "first",
        (
            Text("", "a cat"),
            Item("image", str(folder / "a.jpg")),
            Text("", "and"),
            Item("image", str(folder / "b.jpg")),
            Text("", "a dog"),
        ),
    )
    assert document.items == document.parts[1::2] and document.texts == document.parts[::2]


def test_forms_may_be_mixed_and_lines_are_ids(folder):
    write(
        folder,
        "\ufeff" + json.dumps({"text": "one"}),
        "",
        {"id": 70, "texts": ["two"], "images": [None]},
        {"text_list": ["three"], "image_info": []},
        "  ",
    )
    found = read(folder)
    assert [document.id for document in found.documents] == [1, 70, 4]
    assert [document.texts[0].target for document in found.documents] == ["one", "two", "three"]
    assert found.path == str(folder / "pages.jsonl") and found.problems == ()


def test_empty_texts_are_dropped_and_others_kept_apart(folder):
    line = {"texts": [" a\n", "", "b", None, "\t"], "images": [None, None, None, "a.jpg", None]}
    assert parts(folder, line) == ["a", "b", "[a.jpg]"]


def test_texts_in_any_script_stay_in_their_line(folder):
    texts = ["кошка", "고양이", "猫が\u2028寝て\x85いる", "قطة", "🐈‍⬛"]
    line = {"text_list": texts, "image_info": []}
    assert parts(folder, json.dumps(line, ensure_ascii=False)) == texts


def test_images_lie_in_the_folder_or_in_images_or_anywhere(folder):
    picture(folder / "images" / "a.jpg")
    picture(folder / "images" / "part" / "c.jpg")
    picture(folder / "elsewhere" / "d.jpg")
    names = ["a.jpg", "part/c.jpg", str(folder / "elsewhere" / "d.jpg")]
    line = {"text": "<image><image><image> x", "images": names}
    assert parts(folder, line) == ["[a.jpg]", "[images/part/c.jpg]", "[elsewhere/d.jpg]", "x"]


FILES = ("a.jpg", "b.jpg")
members = st.lists(st.sampled_from([*FILES, "one", "two words", "два", "x <y>"]), max_size=8)


@settings(max_examples=40, deadline=None)
@given(members.filter(lambda members: not set(members) <= set(FILES)))
def test_every_form_of_a_document_reads_the_same(tmp_path_factory, members):
    folder = tmp_path_factory.getbasetemp() / "forms"
    for name in FILES:
        if not (folder / name).exists():
            picture(folder / name)
    want = [f"[{member}]" if member in FILES else member for member in members]
    files = [member for member in members if member in FILES]
    texts = [member for member in members if member not in FILES]
    forms = [
        {
            "texts": [None if member in FILES else member for member in members],
            "images": [member if member in FILES else None for member in members],
        }
    ]
    if members[-1] in texts:  # an image has a text that follows it
        before = [sum(m in texts for m in members[:i]) for i in range(len(members))]
        info = [
            {"image_name": member, "matched_text_index": index}
            for member, index in zip(members, before, strict=True)
            if member in FILES
        ]
        forms.append({"text_list": texts, "image_info": info})
    if not any(a in texts and b in texts for a, b in zip(members, members[1:], strict=False)):
        text = "".join("<image>" if member in FILES else member for member in members)
        forms.append({"text": text, "images": files})
    write(folder, *forms)
    assert [shown(folder, document) for document in read(folder).documents] == [want] * len(forms)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"not JSON at column 13: Expecting"),
        ("[1]", r"document must be an object, is \[1\]"),
        ({"id": 1.5, "text": "a"}, r"document\.id must be a whole number or a string, is 1\.5"),
        ({"images": ["a.jpg"]}, r"document has no texts: exactly one of text, texts, text_list"),
        ({"text": "a", "texts": []}, r"document has text and texts: exactly one of"),
        ({"text": None}, r"document\.text must be a string, is null"),
        ({"text": "a", "images": "a.jpg"}, r"document\.images must be a list, is \"a\.jpg\""),
        ({"text": "<image>", "images": [7]}, r"document\.images\[0\] must be a string, is 7"),
        ({"text": "<image>", "images": [""]}, r"document\.images\[0\] is empty, must name"),
        (
            {"text": "a <image> b <image>", "images": ["a.jpg"]},
            r"document\.text holds 2 <image>, but images lists 1: the n-th <image>",
        ),
        ({"text": "a", "images": ["a.jpg"]}, r"text holds 0 <image>, but images lists 1"),
        ({"text": "a <image>"}, r"text holds 1 <image>, but images lists 0"),
        ({"text": "a \ud800"}, r"holds half of a surrogate pair"),
        ({"texts": ["a"]}, r"document\.images is missing"),
        ({"texts": "a", "images": []}, r"document\.texts must be a list, is \"a\""),
        ({"texts": ["a"], "images": []}, r"document\.texts has 1 members, but images has 0"),
        (
            {"texts": ["a", None], "images": [None, None]},
            r"document\.texts\[1\] and images\[1\] are both null: exactly one must be null",
        ),
        ({"texts": ["a"], "images": ["a.jpg"]}, r"texts\[0\] and images\[0\] are both given"),
        ({"texts": [3], "images": [None]}, r"document\.texts\[0\] must be a string, is 3"),
        ({"texts": [None], "images": [{}]}, r"document\.images\[0\] must be a string, is \{\}"),
        (
            {"texts": ["a <image>"], "images": [None]},
            r"document\.texts\[0\] holds <image>, but a text has no image of its own",
        ),
        ({"text_list": ["a"]}, r"document\.image_info is missing"),
        ({"text_list": [None], "image_info": []}, r"document\.text_list\[0\] must be a string"),
        ({"text_list": ["<image>"], "image_info": []}, r"text_list\[0\] holds <image>, but"),
        ({"text_list": [], "image_info": [3]}, r"document\.image_info\[0\] must be an object"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0}]},
            r"document\.image_info\[0\]\.image_name is missing",
        ),
        (
            {"text_list": ["a"], "image_info": [{"image_name": None, "matched_text_index": 0}]},
            r"document\.image_info\[0\]\.image_name must be a string, is null",
        ),
        *(
            (
                {"text_list": ["a"], "image_info": [{"image_name": "b", "matched_text_index": i}]},
                rf"image_info\[0\]\.matched_text_index must be .* of 1 texts, from 0, is {shown}",
            )
            for i, shown in ((1, "1"), (-1, "-1"), (True, "true"), (0.0, r"0\.0"))
        ),
    ],
)
def test_malformed_lines_are_named_with_file_and_line(folder, line, message):
    write(folder, MARKED, "", line, MARKED)
    with pytest.raises(ValueError, match=rf"^{folder}/pages\.jsonl:3: .*{message}"):
        read(folder, max_bad_share=1.0)


def test_bad_utf8_is_named_with_line_and_byte(folder):
    (folder / "pages.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"pages\.jsonl:2: not UTF-8 at byte 10"):
        read(folder)


def test_missing_and_empty_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no documents at .*pages\.jsonl"):
        read(folder)
    write(folder, "")
    with pytest.raises(ValueError, match=r"pages\.jsonl holds no document"):
        read(folder)


@pytest.fixture
def faulty(folder):
    """Six documents, of which three cannot be used."""
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-40])
    (folder / "page.jpg").write_bytes(b"<html></html>")
    picture(folder / "grey.jpg", "L")
    picture(folder / "really.jpg", format="PNG")
    write(
        folder,
        MARKED,
        {"text": "<image> x <image>", "images": ["really.jpg", "cut.jpg"]},
        {"texts": [None, " "], "images": ["gone.jpg", None]},
        {"text": "<image> <image> x", "images": ["gone.jpg", "page.jpg"]},
        {"text": "<image> <image> x", "images": ["grey.jpg", "grey.jpg"]},
        {"text": "words"},
    )
    return folder


def test_documents_that_cannot_be_used_are_left_out_and_named(faulty):
    found = read(faulty, max_bad_share=0.5)
    assert [document.id for document in found.documents] == [1, 5, 6]
    assert found.problems == (
        Problem("pages.jsonl:2: cut.jpg", "image file is truncated", "left out"),
        Problem("pages.jsonl:3", "no text", "left out"),
        Problem("pages.jsonl:4: gone.jpg", "missing image", "left out"),
        Problem("grey.jpg", "greyscale", "converted"),
    )


def test_too_many_bad_documents_stop_with_names_and_field(faulty):
    with pytest.raises(ValueError) as caught:
        read(faulty, max_bad_share=0.49)
    message = str(caught.value)
    assert f"3 of the 6 documents of {faulty}/pages.jsonl are bad" in message
    assert "50.0%" in message and "49.0%" in message and "data.max_bad_share" in message
    assert "first pages.jsonl:2: cut.jpg (image file is truncated), pages.jsonl:3" in message


def test_no_good_document_stops_whatever_the_share(folder):
    write(folder, {"text": " "})
    with pytest.raises(ValueError, match=r"1 of the 1 documents.*pages\.jsonl:1 \(no text\)"):
        read(folder, max_bad_share=1.0)


@pytest.mark.parametrize(
    "name", ["data:image/png;base64," + "A" * 9999, "https://x.org/a.jpg", "\0"]
)
def test_names_that_no_file_can_have_are_missing_images(folder, name):
    write(folder, {"text": "x <image>", "images": [name]}, MARKED)
    (problem,) = read(folder, max_bad_share=0.5).problems
    assert problem == Problem(f"pages.jsonl:1: {name}", "missing image", "left out")


def test_an_image_of_many_documents_is_decoded_once(folder, monkeypatch):
    checked = []
    check = images.check

    def counting(path, named=None):
        checked.append(path.name)
        return check(path, named)

    monkeypatch.setattr(images, "check", counting)
    write(folder, MARKED, MARKED, {"text": "x <image>", "images": ["a.jpg"]})
    read(folder)
    assert sorted(checked) == ["a.jpg", "b.jpg"]


def test_fingerprint_follows_what_training_sees(tmp_path):
    folder = tmp_path / "here"
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        picture(folder / name, seed=seed, quality=50 + 40 * seed)
    write(folder, MARKED)
    first = read(folder).fingerprint
    folder = folder.rename(tmp_path / "there")
    assert read(folder).fingerprint == first
    changes = [
        {**MARKED, "images": ["b.jpg", "a.jpg"]},
        {**MARKED, "text": "a cat <image> and a dog <image>"},
        {**MARKED, "id": "one"},
    ]
    seen = {first}
    for line in changes:
        write(folder, line)
        seen.add(read(folder).fingerprint)
    write(folder, MARKED)
    picture(folder / "a.jpg", quality=98)
    assert len(seen | {read(folder).fingerprint}) == 5


def test_summary_counts_everything(faulty):
    assert summary(read(faulty, max_bad_share=0.5)) == (
        f"3 documents with 4 images and 5 texts from {faulty}/pages.jsonl; 1 without image; "
        "converted: 1 x greyscale (grey.jpg); left out: 1 x image file is truncated "
        "(pages.jsonl:2: cut.jpg); left out: 1 x missing image (pages.jsonl:4: gone.jpg); "
        "left out: 1 x no text (pages.jsonl:3)."
    )
