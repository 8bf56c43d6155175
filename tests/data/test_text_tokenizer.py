"""The tokenizer: every script comes back, training repeats, texts are laid out for the loss."""

import pickle
import unicodedata
from functools import partial

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.data.text_tokenizer import TextTokenizer

TEXTS = [
    f"a {size} {colour} {shape} stands on the ground"
    for size in ("large", "small")
    for colour in ("red", "blue", "green", "yellow")
    for shape in ("cube", "ball", "cylinder")
]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(TEXTS, 400)


def ids_of(row):
    return row["ids"][row["valid"]].tolist()


def test_special_ids_are_fixed(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_small_vocabulary_is_kept_to_and_merges_words(tokenizer):
    assert 260 < tokenizer.vocabulary_size <= 400
    row = tokenizer.encode("", TEXTS[0], 32)
    assert row["valid"].sum() == 2 + len(TEXTS[0].split())


def test_smallest_vocabulary_is_bytes_alone():
    assert TextTokenizer.train(TEXTS, 260).vocabulary_size == 260
    with pytest.raises(ValueError, match="259 tokens is too small.*at least 260"):
        TextTokenizer.train(TEXTS, 259)


def test_training_twice_gives_equal_tokenizers(tmp_path):
    for name in ("one", "two"):
        TextTokenizer.train(iter(TEXTS), 400).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_was_trained_is_kept_for_the_same_texts(tmp_path):
    once = partial(TextTokenizer.train_once, kept=tmp_path / "tokenizers")
    first = once(TEXTS, 400)
    assert first.as_json() == TextTokenizer.train(TEXTS, 400).as_json()
    (kept,) = (tmp_path / "tokenizers").iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTokenizer, "train", None)
        assert once(TEXTS, 400).as_json() == first.as_json()
        for others in ((TEXTS[:-1], 400), (TEXTS[::-1], 400), (TEXTS, 399)):
            with pytest.raises(TypeError):  # it would be trained
                once(*others)
        kept.write_bytes(kept.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{kept.name} is no usable .* delete it"):
            once(TEXTS, 400)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="is not kept for the next run: .*file.*"):
        made = TextTokenizer.train_once(TEXTS, 400, tmp_path / "file")
    assert made.as_json() == first.as_json()


# Lower case of one character at a time: a final sigma is not special here.
def plain(text):
    return "".join(c.lower() for c in unicodedata.normalize("NFC", text))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cn", "Co", "Cs", "Lu", "Lt"])))
def test_any_script_comes_back(tokenizer, text):
    text = plain(text).strip()
    row = tokenizer.encode("", text, 8 + 12 * len(text))
    assert tokenizer.decode(row["ids"]) == text


@pytest.mark.parametrize("text", ["ΣΊΣΥΦΟΣ", "ЁЖИК", "Cafe\u0301", "고양이 🐈‍⬛", "A  CAT"])
def test_case_and_composition_are_normalised(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode("", text, 64)["ids"]) == plain(text)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.integers(20, 40))
def test_layout_is_bos_prompt_target_eos(tokenizer, prompt, target, length):
    row = tokenizer.encode(prompt, target, length)
    before, after = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(target)[1:]
    want = [tokenizer.bos_id, *before[1:], *after, tokenizer.eos_id][:length]
    assert ids_of(row) == want
    assert row["scored"].tolist() == [len(before) <= i < len(want) for i in range(length)]
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
        "ids": ((length,), np.dtype("int32")),
        "valid": ((length,), np.dtype("bool")),
        "scored": ((length,), np.dtype("bool")),
    }


def test_long_text_is_cut_without_an_end(tokenizer):
    row = tokenizer.encode("", TEXTS[0], 4)
    assert row["valid"].all() and row["scored"].tolist() == [False, True, True, True]
    assert tokenizer.eos_id not in row["ids"]


def test_text_that_just_fits_keeps_its_end(tokenizer):
    length = 2 + len(TEXTS[0].split())
    assert tokenizer.encode("", TEXTS[0], length)["ids"][-1] == tokenizer.eos_id


def test_prompt_without_room_for_the_target_is_an_error(tokenizer):
    prompt = tokenizer.encode_prompt(TEXTS[0])
    tokenizer.encode(TEXTS[0], "yes", len(prompt) + 1)
    with pytest.raises(ValueError, match="leaves no room after the prompt 'a large"):
        tokenizer.encode(TEXTS[0], "yes", len(prompt))


def test_special_tokens_in_a_text_are_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, TextTokenizer.load(tmp_path / "tokenizer.json")):
        row = each.encode("", "the <eos> of <pad>", 64)
        assert ids_of(row).count(each.eos_id) == 1 and each.pad_id not in ids_of(row)
        assert each.decode(row["ids"]) == "the <eos> of <pad>"


def test_saved_and_pickled_tokenizers_encode_alike(tokenizer, tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    tokenizer.save(path)
    want = tokenizer.encode("is it <bos>?", "ja, 赤い", 40)
    for other in (TextTokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.vocabulary_size == tokenizer.vocabulary_size
        for key, value in other.encode("is it <bos>?", "ja, 赤い", 40).items():
            np.testing.assert_array_equal(value, want[key])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full_disk(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_foreign_padding_and_truncation_are_not_applied(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    foreign = tokenizers.Tokenizer.from_file(str(path))
    foreign.enable_padding(length=50)
    foreign.enable_truncation(3)
    foreign.save(str(path))
    assert ids_of(TextTokenizer.load(path).encode("", TEXTS[0], 32)) == ids_of(
        tokenizer.encode("", TEXTS[0], 32)
    )


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*absent.json"):
        TextTokenizer.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is no usable tokenizer.json"):
        TextTokenizer.load(tmp_path / "bad.json")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="bare.json.*no <pad>, <bos>, <eos>"):
        TextTokenizer.load(tmp_path / "bare.json")


def test_special_tokens_may_have_other_names_and_nothing_need_stand_before_a_text(
    tokenizer, tmp_path
):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    other = TextTokenizer.load(path, pad="<eos>", bos="", eos="<eos>")
    row = other.encode("", TEXTS[0], 40)
    want = tokenizer.encode("", TEXTS[0], 40)
    assert other.bos_id is None and other.pad_id == other.eos_id
    assert ids_of(row) == ids_of(want)[1:]
    assert (row["ids"][~row["valid"]] == other.eos_id).all()
    assert other.decode(row["ids"]) == tokenizer.decode(want["ids"])
    assert other.encode_prompt("") == [] and other.ids("") == []
    again = pickle.loads(pickle.dumps(other))
    assert again.special_tokens == other.special_tokens
    with pytest.raises(ValueError, match="tokenizer.json.*no \\[CLS\\]"):
        TextTokenizer.load(path, bos="[CLS]")


def test_a_cut_text_ends_all_the_same_where_that_is_asked_for(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    row = TextTokenizer.load(path, eos_when_cut=True).encode("", TEXTS[0], 4)
    want = tokenizer.encode("", TEXTS[0], 4)["ids"].tolist()
    assert row["ids"].tolist() == [*want[:3], tokenizer.eos_id]


def test_tokens_belong_to_the_words_that_white_space_parts():
    tokenizer = TextTokenizer.train(["a red cube, and a sphere"], 270)
    for text in ("a red cube, and a größe", "  red\n 😀😀  x ", "red", "A\u0301 b"):
        words, owners = tokenizer.words(text)
        assert words == text.split() and len(owners) == len(tokenizer.ids(text))
        assert owners == sorted(owners) and set(owners) == set(range(len(words)))
        for number, word in enumerate(words):
            ids = [
                i for i, owner in zip(tokenizer.ids(text), owners, strict=True) if owner == number
            ]
            assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.ids(word))
    assert tokenizer.words("") == tokenizer.words(" ") == ([], [])


def byte_level(**options):
    """A tokenizer whose words begin with their space, as GPT-2's, and no word without."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(["what is it? a cat"] * 9, trainer)
    return TextTokenizer(theirs, pad="<end>", bos="", eos="<end>", **options)


def test_an_answer_has_the_tokens_that_it_has_after_its_question_in_a_text():
    before, spaced = byte_level(), byte_level(space_before_target=True)
    assert before.words_need_spaces
    whole = before.ids("what is it? a cat")
    assert ids_of(spaced.encode("what is it?", "a cat", 40)) == [*whole, spaced.eos_id]
    assert ids_of(before.encode("what is it?", "a cat", 40)) != [*whole, before.eos_id]
    for alone in ("", "a cat"):  # without a prompt, or a target, there is nothing to join
        assert ids_of(spaced.encode("", alone, 40)) == ids_of(before.encode("", alone, 40))
    assert ids_of(spaced.encode("what", "", 40)) == ids_of(before.encode("what", "", 40))
    assert pickle.loads(pickle.dumps(spaced)).special_tokens["space_before_target"]


def test_words_that_need_no_space_get_none(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    same = TextTokenizer.load(path, space_before_target=True)
    assert not same.words_need_spaces
    assert ids_of(same.encode("a red", "cube", 40)) == ids_of(tokenizer.encode("a red", "cube", 40))
