"""Rows of interleaved documents: laid out as written out here, packed whole, the same each time."""

import dataclasses
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.documents import Document, Item
from unified_mm.data.interleave import FewShotRows, Layout, Row, pack, packed_rows, text_length
from unified_mm.data.pipeline import Preparer, evaluation_batches, training_batches
from unified_mm.data.records import Record, Text
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.modalities.interleaved import (
    InterleavedItems,
    InterleavedText,
    interleaved_preparers,
)
from unified_mm.modalities.modality import build_modalities

COLOURS = [(30 * i + 20, 250 - 25 * i, 90 * i % 250) for i in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six pictures, dark on the left, each of a colour of its own on the right."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        pixels = np.zeros((20, 24, 3), np.uint8)
        pixels[:, 12:] = colour
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return [str(folder / f"{i}.jpg") for i in range(len(COLOURS))]


@pytest.fixture(scope="module")
def modalities():
    config = tiny.config_dict().to_dict()
    resources = SimpleNamespace(data=Config(config["data"]), tokenizer=tiny.tokenizer())
    return build_modalities(config["model"]["modalities"], resources)


def document_of(files, parts, id=0):
    """Strings are captions, pairs are (prompt, target), numbers are pictures."""
    kinds = {
        str: lambda t: Text("", t),
        tuple: lambda t: Text(*t),
        int: lambda i: Item("image", files[i]),
    }
    return Document(id, tuple(kinds[type(part)](part) for part in parts))


def row_of(files, *documents):
    return Row(tuple(document_of(files, parts, id) for id, parts in enumerate(documents)))


def written_out(row, tokenizer, slots, length):
    """The layout by its definition: all that a document holds in one list, then what fits."""
    images, tokens = [], []
    for number, document in enumerate(row.documents):
        whole = []
        for part in document.parts:
            if isinstance(part, Item):
                whole.append(("image", part.part, False))
            else:
                arrays = tokenizer.encode(part.prompt, part.target, 99)
                ids, scored = arrays["ids"][arrays["valid"]], arrays["scored"][arrays["valid"]]
                whole += [("token", *pair) for pair in zip(ids, scored, strict=True)]
        for position, (kind, what, scored) in enumerate(whole):
            before = [item[0] for item in whole[:position]]
            seen, said = before.count("image"), before.count("token")
            if (len(images) == slots) if kind == "image" else (len(tokens) == length):
                break
            if kind == "image":
                images.append((what, position, seen + 1, number))
            else:
                tokens.append((what, scored, said, position, seen, number))
    return images, tokens


def column(items, index, length, unused=0):
    return np.array([item[index] for item in items] + [unused] * (length - len(items)))


def same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


words = st.sampled_from(["", "a red square", "size 3", "green of size 1", "猫"])
parts = st.one_of(words, st.tuples(words, words), st.integers(0, 5))
rows = st.lists(st.lists(parts, max_size=6), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(rows, st.integers(1, 6), st.integers(1, 40))
def test_layout_is_the_one_written_out(files, modalities, documents, slots, length):
    row = row_of(files, *documents)
    preparers = interleaved_preparers(modalities, slots, length)
    images, tokens = written_out(row, modalities["text"].tokenizer, slots, length)
    want = {
        "ids": column(tokens, 0, length),
        "valid": np.arange(length) < len(tokens),
        "scored": column(tokens, 1, length, False),
        "text_position": column(tokens, 2, length),
        "position": column(tokens, 3, length),
        "segment": column(tokens, 4, length),
        "document": column(tokens, 5, length, -1),
        "prompted": np.array(False),
        "present": np.array(True),
    }
    same(preparers["text"].prepare(row, None), want)
    views = [modalities["image"].view(path, None, True) for path, *_ in images]
    black = [np.zeros((16, 16, 3))] * (slots - len(images))
    want = {
        "pixels": np.stack([*views, *black]),
        "present": np.arange(slots) < len(images),
        "position": column(images, 1, slots),
        "segment": column(images, 2, slots),
        "document": column(images, 3, slots, -1),
    }
    same(preparers["image"].prepare(row, None), want)


def test_layout_of_one_row_by_hand(files, modalities):
    row = row_of(files, ["a", 0, ("a", "a")], [1, "a"])
    preparers = interleaved_preparers(modalities, 3, 12)
    image, text = (preparers[name].prepare(row, None) for name in ("image", "text"))
    bos, eos = 1, 2
    a = text["ids"][1]
    assert text["ids"].tolist() == [bos, a, eos, bos, a, a, eos, bos, a, eos, 0, 0]
    assert text["scored"].tolist() == [i in (1, 2, 5, 6, 8, 9) for i in range(12)]
    assert text["valid"].tolist() == [i < 10 for i in range(12)]
    assert text["text_position"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0]
    assert text["position"].tolist() == [0, 1, 2, 4, 5, 6, 7, 1, 2, 3, 0, 0]
    assert text["segment"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert text["document"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert image["present"].tolist() == [True, True, False]
    assert image["position"].tolist() == [3, 0, 0]
    assert image["segment"].tolist() == [1, 1, 0]
    assert image["document"].tolist() == [0, 1, -1]


def test_texts_of_a_tokenizer_without_bos_are_whole(files, modalities, tmp_path):
    modalities["text"].tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json", bos="")
    text = dataclasses.replace(modalities["text"], tokenizer=tokenizer)
    row = row_of(files, [("a red", "square"), 0, "size 3"])
    _, tokens = written_out(row, tokenizer, 1, 30)
    got = interleaved_preparers({**modalities, "text": text}, 1, 30)["text"].prepare(row, None)
    assert got["ids"].tolist() == column(tokens, 0, 30).tolist() and 1 not in got["ids"]
    assert got["scored"].tolist() == column(tokens, 1, 30, False).tolist()
    assert text_length(row.documents[0], tokenizer) == len(tokens)


def test_what_does_not_fit_is_cut_with_what_follows_it(files, modalities):
    # The second image has no slot, so the text about it goes as well; the next document stays.
    row = row_of(files, [0, "a", 1, "a a a"], ["a a"])
    text = interleaved_preparers(modalities, 1, 12)["text"].prepare(row, None)
    assert text["document"].tolist() == [0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1, -1]
    # A text is cut at the end of the row without an end of its own, and then so is the image.
    row = row_of(files, ["a a", 0])
    preparers = interleaved_preparers(modalities, 1, 3)
    text = preparers["text"].prepare(row, None)
    assert text["valid"].all() and text["ids"][0] == 1 and 2 not in text["ids"]
    assert not preparers["image"].prepare(row, None)["present"].any()
    assert interleaved_preparers(modalities, 1, 4)["image"].prepare(row, None)["present"].all()


def test_shapes_and_types_are_those_of_absent_rows(files, modalities):
    row = row_of(files, [0, "a red square", 1])
    for name, preparer in interleaved_preparers(modalities, 3, 9).items():
        full = preparer.prepare(row, np.random.default_rng(0))
        absent = preparer.absent()
        assert {k: (v.shape, v.dtype) for k, v in full.items()} == {
            k: (v.shape, v.dtype) for k, v in absent.items()
        }
        whole_numbers = ("ids", "text_position", "position", "segment", "document")
        assert all(full[k].dtype == np.int32 for k in whole_numbers if k in full)
        assert full.pop("pixels", absent["present"]).dtype == (
            np.uint8 if name == "image" else bool
        )
        assert not absent["present"].any() and (absent["document"] == -1).all()
        assert not absent.get("valid", absent["present"]).any()


def mirrored(row, preparer):
    """In which of 40 training views the light half of the first picture is on the left."""
    views = [preparer.prepare(row, np.random.default_rng(i))["pixels"][0] for i in range(40)]
    light = [view.astype(int).sum(-1) for view in views]
    return [bool(view[:, 0].sum() > view[:, -1].sum()) for view in light]


def test_images_are_mirrored_unless_a_text_of_the_row_names_a_side(files, modalities):
    preparer = interleaved_preparers(modalities, 2, 40)["image"]
    plain = row_of(files, [0, "a red square"], ["bright"])
    assert plain.mirrorable and 5 < sum(mirrored(plain, preparer)) < 35
    for sided in (
        row_of(files, [0, "a red square"], ["on the left"]),
        row_of(files, [0, ("what is on the RIGHT?", "a square")]),
        dataclasses.replace(plain, directional=True),
    ):
        assert not sided.mirrorable and not any(mirrored(sided, preparer))


def test_images_of_a_row_are_drawn_apart(files, modalities):
    row = row_of(files, [0, 0, "a red square"])
    preparer = interleaved_preparers(modalities, 2, 9)["image"]
    first, again = (preparer.prepare(row, np.random.default_rng(3)) for _ in range(2))
    same(first, again)
    assert (first["pixels"][0] != first["pixels"][1]).any()


def test_a_picture_that_vanished_is_named(tmp_path, modalities):
    row = row_of([str(tmp_path / "gone.jpg")], [0, "a"])
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        interleaved_preparers(modalities, 2, 9)["image"].prepare(row, None)


def test_preparers_are_values(modalities):
    ours, theirs, others = (interleaved_preparers(modalities, 2, n) for n in (9, 9, 8))
    assert ours == theirs and ours != others
    assert len({*ours.values(), *theirs.values(), *others.values()}) == 4
    assert isinstance(ours["image"], Preparer) and isinstance(ours["text"], Preparer)
    assert isinstance(ours["image"], InterleavedItems)
    assert ours["text"] == InterleavedText(modalities["text"], Layout(2, 9))


def test_items_of_any_modality_have_slots_of_their_own(files, modalities):
    from toy_tone import Tone

    read = {"image": modalities["image"], "tone": Tone("tone", 8, 4), "text": modalities["text"]}
    high, low = [1.0] * 8, [0.5] * 8
    parts = (Text("", "a"), Item("tone", high), Item("image", files[0]), Item("tone", low))
    row = Row((Document(0, parts),))
    preparers = interleaved_preparers(read, 2, 9)
    tone, image = (preparers[name].prepare(row, None) for name in ("tone", "image"))
    np.testing.assert_array_equal(tone["signal"], [high, low])
    assert tone["segment"].tolist() == [1, 3] and image["segment"].tolist() == [2, 0]
    assert tone["position"].tolist() == [3, 5] and image["position"].tolist() == [4, 0]
    cut = interleaved_preparers(read, 1, 9)
    assert cut["tone"].prepare(row, None)["present"].tolist() == [True]
    again = [Document(i, parts) for i in range(5)]
    packed = packed_rows(again, modalities["text"].tokenizer, Layout(4, 99), 0)
    assert sorted(len(each.documents) for each in packed) == [1, 2, 2]
    records = [Record(i, {"tone": high}, (Text("", "x"),), True) for i in range(3)]
    (first, *_) = FewShotRows(records, 1, seed=0, of=("image", "tone"))
    assert [type(part) for part in first.documents[0].parts] == [Item, Text, Item, Text]


def test_texts_alone_and_other_texts_are_refused(modalities):
    image, text = modalities["image"], modalities["text"]
    for wrong, found in (
        ({"text": text}, r"is text \(TextModality\)"),
        ({"image": image, "text": image}, r"is image \(ImageModality\), text"),
        ({"image": image}, r"is image \(ImageModality\)"),
        ({}, "is empty"),
    ):
        with pytest.raises(ValueError, match=f"must have 'text'.*{found}"):
            interleaved_preparers(wrong, 2, 9)


@pytest.mark.parametrize(("slots", "length"), [(0, 9), (2, 0)])
def test_layouts_without_room_are_refused(modalities, slots, length):
    with pytest.raises(ValueError, match=f"{slots} slots and {length} text tokens"):
        interleaved_preparers(modalities, slots, length)


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=120)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 4), st.integers(1, 25), st.integers(0, 2**64 - 1))
def test_packing_holds_every_document_once_and_fits(lengths, slots, length, seed):
    packed = pack(lengths, (slots, length), seed)
    assert sorted(itertools.chain(*packed)) == list(range(len(lengths)))
    for members in packed:
        images, tokens = (sum(lengths[i][kind] for i in members) for kind in (0, 1))
        assert len(members) == 1 or (images <= slots and tokens <= length)
    assert packed == pack(lengths, (slots, length), seed)


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    lengths = [tuple(pair) for pair in rng.integers((0, 5), (3, 60), (3000, 2)).tolist()]
    packed = pack(lengths, (99, 128), 0)
    assert len(packed) < 1.05 * sum(tokens for _, tokens in lengths) / 128
    assert packed != pack(lengths, (99, 128), 1)
    assert pack([], (1, 1), 0) == []


def test_too_large_documents_are_alone():
    packed = pack([(1, 1), (9, 0), (1, 1), (0, 99), (1, 1)], (4, 9), 0)
    assert sorted(tuple(sorted(members)) for members in packed) == [(0, 2, 4), (1,), (3,)]


def test_packed_rows_hold_their_documents_whole(files, modalities):
    rng = np.random.default_rng(0)
    documents = [
        document_of(files, [i % 6, *["a red square of size 2"] * rng.integers(1, 3)], i)
        for i in range(20)
    ]
    tokenizer = modalities["text"].tokenizer
    sizes = [(len(each.items), text_length(each, tokenizer)) for each in documents]
    layout = Layout(5, 40)
    rows = packed_rows(documents, tokenizer, layout, 7)
    assert sorted(d.id for row in rows for d in row.documents) == list(range(20))
    assert len(rows) < 12
    for row in rows:
        images, tokens = layout.fill(row, tokenizer)
        expected = np.sum([sizes[document.id] for document in row.documents], axis=0)
        assert [len(images["image"]), len(tokens)] == expected.tolist()


def records(files, count=6):
    """Records with a caption and a question each, then two that few-shot rows cannot use."""
    usable = [
        Record(
            i, {"image": files[i]}, (Text("", f"picture {i}"), Text("which?", f"it is {i}")), True
        )
        for i in range(count)
    ]
    return [
        *usable,
        Record(70, {}, (Text("", "x"),), True),
        Record(71, {"image": files[0]}, (), True),
    ]


def test_few_shot_rows_show_others_and_then_their_own(files):
    rows = FewShotRows(records(files), 3, seed=5)
    assert len(rows) == 30
    shown = []
    for j, row in enumerate(rows):
        (document,) = row.documents
        numbers = [files.index(part.part) for part in document.parts[::2]]
        assert document.parts[1::2] == tuple(Text("", f"picture {i}") for i in numbers)
        assert document.id == numbers[-1] == j % 6
        assert len(numbers) == len(set(numbers)) == 4
        shown.append(numbers)
    assert len({tuple(numbers) for numbers in shown}) > 25
    counts = np.bincount(np.concatenate([numbers[:-1] for numbers in shown]))
    assert counts.min() > 5


def test_few_shot_rows_are_a_function_of_seed_and_number(files):
    rows = FewShotRows(records(files), 3, seed=5)
    backwards = [rows[j] for j in reversed(range(len(rows)))][::-1]
    assert backwards == list(rows) == list(pickle.loads(pickle.dumps(rows)))
    assert list(rows) != list(FewShotRows(records(files), 3, seed=6))
    for j in (30, -1):
        with pytest.raises(IndexError, match=f"row {j} of 30"):
            rows[j]


def test_few_shot_rows_may_ask_questions(files):
    for row in FewShotRows(records(files), 2, seed=5, questions=True):
        assert all(text.prompt == "which?" for text in row.documents[0].texts)


def test_every_text_of_a_record_is_drawn(files):
    texts = tuple(Text("", name) for name in "abc")
    rows = FewShotRows([Record(i, {"image": files[i]}, texts, True) for i in range(4)], 2, seed=0)
    assert {t.target for row in rows for t in row.documents[0].texts} == set("abc")


def test_few_shot_rows_of_directional_records_are_not_mirrored(files):
    some = [dataclasses.replace(r, mirrorable=r.id != 0) for r in records(files)]
    for row in FewShotRows(some, 1, seed=0):
        assert row.mirrorable == all(p.part != files[0] for p in row.documents[0].items)


@pytest.mark.parametrize(("shots", "count"), [(6, 6), (0, 0), (-1, 3)])
def test_more_shots_than_others_are_refused(files, shots, count):
    with pytest.raises(ValueError, match=f"{shots} shots need at least .* there are {count}"):
        FewShotRows(records(files, count), shots, seed=0)


def test_no_shots_are_pictures_with_their_own_text(files):
    for j, row in enumerate(FewShotRows(records(files), 0, seed=0)):
        (document,) = row.documents
        assert document.parts == (Item("image", files[j % 6]), Text("", f"picture {j % 6}"))


def first(count, iterator):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def test_pipeline_reads_rows_alike_with_any_number_of_threads(files, modalities):
    documents = [document_of(files, [f"a red square of size {i}", i], i) for i in range(6)]
    tokenizer = modalities["text"].tokenizer
    preparers = interleaved_preparers(modalities, 4, 50)
    for rows in (
        packed_rows(documents, tokenizer, Layout(4, 50), 0),
        FewShotRows(records(files), 3, seed=5),
    ):
        options = {"seed": 1, "batch_size": 2}
        one, two = (
            first(4, training_batches(rows, preparers, threads=n, **options)) for n in (1, 2)
        )
        for ours, theirs in zip(one, two, strict=True):
            assert ours["image"]["pixels"].shape == (2, 4, 16, 16, 3)
            assert ours["text"]["ids"].shape == (2, 50)
            for name in ("image", "text"):
                same(ours[name], theirs[name])


def test_evaluation_fills_up_with_absent_rows(files, modalities):
    rows = [row_of(files, [i, "a red square"]) for i in range(3)]
    preparers = interleaved_preparers(modalities, 2, 9)
    batches = list(evaluation_batches(rows, preparers, batch_size=2))
    assert [batch["text"]["present"].tolist() for batch in batches] == [[True, True], [True, False]]
    present = [batch["image"]["present"].tolist() for batch in batches]
    assert present == [[[True, False]] * 2, [[True, False], [False, False]]]
