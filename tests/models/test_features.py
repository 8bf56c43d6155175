"""Early fusion of features: a picture at its place within a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers

from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.objectives.captioning import Captioning
from unified_mm.task import build_task

PICTURE = "<unk>"
FIELDS = {
    "model__fusion": "early_features",
    "model__tower__width": 24,
    "model__tower__rotary_base": 0.0,
    "model__rotary_base": 100.0,
    "model__modalities__text__learned_positions": False,
    "model__modalities__text__length": 16,
    "model__modalities__image__class_token": True,
    "model__projector__skip": 1,
    "data__special_tokens__image": PICTURE,
    "objectives__captioning__rule": "in_order",
    "objectives__contrastive__weight": 0.0,
    "objectives__matching__weight": 0.0,
}


def tokenizer():
    plain = tokenizers.Tokenizer.from_str(tiny.tokenizer().as_json())
    return TextTokenizer(plain, image=PICTURE)


@pytest.fixture(scope="module")
def model():
    config = Config(tiny.config_dict(**FIELDS).to_dict())
    task = build_task(config, tokenizer())
    params = tiny.writing_params(task, task.tokenizer.eos_id)
    return LoadedModel(task, params, one_device_mesh(), config, 1)


@pytest.fixture(scope="module")
def outputs(model):
    """What the model makes of the tokens of a text: (pixels, ids, present) -> [T, D]."""
    (objective,) = model.task.objectives

    @jax.jit
    def run(params, batch):
        def encode(module, batch):
            return module.encode(batch, objective.views())[objective.name].text

        return model.task.model.apply({"params": params}, batch, method=encode)

    def call(pixels, ids, present=True):
        ids = np.array(ids, np.int32)
        room = (0, 16 - len(ids))
        here = np.pad(np.ones(len(ids), bool), room)
        text = {"ids": np.pad(ids, room), "valid": here, "scored": here, "present": here[0]}
        text["prompted"] = here[0]
        batch = {
            "image": {"pixels": pixels[None], "present": np.array([present])},
            "text": {key: value[None] for key, value in text.items()},
        }
        return np.asarray(run(model.params, jax.tree.map(jnp.asarray, batch)))[0, : len(ids)]

    return call


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def test_a_text_has_its_picture_once(model):
    encode = model.task.tokenizer.encode_prompt
    marker = model.task.tokenizer.image_id
    assert encode("") == [model.task.tokenizer.bos_id, marker]
    assert encode("red").index(marker) == 1 and encode(f"red {PICTURE} red").count(marker) == 1
    assert encode(f"red {PICTURE} red").index(marker) > 1
    with pytest.raises(ValueError, match="more than once"):
        encode(f"{PICTURE} {PICTURE}")
    with pytest.raises(ValueError, match="in the answer 'a <unk>'"):
        model.task.tokenizer.encode("red", f"a {PICTURE}", 16)
    with pytest.raises(ValueError, match="no <other> among its added_tokens"):
        TextTokenizer(tokenizers.Tokenizer.from_str(tiny.tokenizer().as_json()), image="<other>")


def test_what_stands_before_a_picture_does_not_see_it_and_what_follows_does(model, outputs):
    ids = model.task.tokenizer.encode_prompt(f"a red {PICTURE} square of size")
    where = ids.index(model.task.tokenizer.image_id)
    one, other = outputs(picture(0), ids), outputs(picture(1), ids)
    assert where > 1 and np.array_equal(one[:where], other[:where])
    assert (one[where:] != other[where:]).any(-1).all()
    # No later token changes an earlier one, and the picture sees the text before it.
    assert np.array_equal(one[:-1], outputs(picture(0), [*ids[:-1], 9])[:-1])
    before = outputs(picture(0), [ids[0], 9, *ids[2:]])
    assert np.array_equal(before[0], one[0]) and (before[1:] != one[1:]).any(-1).all()


def test_a_text_without_a_picture_is_as_if_no_token_stood_for_one(model, outputs):
    tokenizer = model.task.tokenizer
    begin, *text = [tokenizer.bos_id, *tokenizer.ids("a red square of size")]
    first = outputs(picture(0), [begin, tokenizer.image_id, *text], present=False)
    later = outputs(picture(1), [begin, *text[:2], tokenizer.image_id, *text[2:]], present=False)
    assert np.abs(np.delete(first, 1, 0) - np.delete(later, 3, 0)).max() < 1e-5


NEAR = (("text", (("window", 2),)),)


@pytest.mark.parametrize("sparse", [(), NEAR])
def test_writing_goes_on_as_reading_does(model, sparse):
    task = tiny.replace_model(model.task, sparse=sparse)
    model = LoadedModel(task, model.params, one_device_mesh(), model.config, 1)
    prompts = ["", f"a red {PICTURE} square", "red"]
    images = [picture(seed) for seed in range(3)]
    written = model.generate(images, prompts, Decoding(tokens=5))
    (objective,) = model.task.objectives
    assert isinstance(objective, Captioning)
    for image, prompt, (text,) in zip(images, prompts, written, strict=True):
        begun = model.task.tokenizer.encode_prompt(prompt)
        row = [*begun, *text.tokens]
        ids = np.array([row + [0] * (16 - len(row))], np.int32)
        place = np.arange(16)[None]
        arrays = {
            "ids": ids,
            "valid": place < len(row),
            "scored": (place >= len(begun)) & (place < len(row)),
            "prompted": np.array([bool(prompt)]),
            "present": np.ones(1, bool),
        }
        batch = {"image": {"pixels": image[None], "present": np.ones(1, bool)}, "text": arrays}
        total, scored = model.predictor.log_likelihood(batch)[0]
        assert scored == len(text.tokens)
        assert total == pytest.approx(text.log_likelihood, abs=1e-4)


def test_what_it_cannot_do_is_said(model):
    from unified_mm.inference.slots import Slots

    with pytest.raises(ValueError, match="write with `generate`"):
        Slots(model.predictor, 2, 4)
    first = tiny.replace_model(model.task, sparse=(("text", (("first", 3),)),))
    with pytest.raises(ValueError, match="first=3 and random=0 count its tokens from the first"):
        first.abstract_params()
    config = Config(tiny.config_dict(**FIELDS | {"model__fusion": "early"}).to_dict())
    with pytest.raises(ValueError, match="image='<unk>': model.fusion='early' reads no picture"):
        build_task(config, tokenizer())
    batch = jax.tree.map(np.asarray, tiny.batch(model.task, 1))
    text = {**batch["text"], "ids": np.full((1, 16), 5, np.int32)}  # no token for the picture
    batch["text"] = text
    assert np.isnan(model.predictor.log_likelihood(batch)[0, 0])
    documents = {**batch, "text": {**text, "position": np.zeros_like(text["ids"])}}
    with pytest.raises(ValueError, match="documents place their pictures themselves"):
        model.predictor.log_likelihood(documents)
