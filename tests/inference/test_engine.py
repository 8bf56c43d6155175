"""Continuous batching writes for everyone what the model writes for each alone."""

import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import GREEDY, Decoding, Written
from unified_mm.inference.engine import Engine, KnownImages
from unified_mm.inference.predictor import width_of
from unified_mm.inference.slots import Slots
from unified_mm.inference.writing import Cancelled, QueueFull

FUSIONS = {
    "early": {},
    "gated_cross_attention": {"model__fusion": "gated_cross_attention", "model__cross__start": 0.5},
}
WARM = Decoding(temperature=1.0, seed=3)
LONGEST = "size 2 of a green square"
SIZES = {"slots": 3, "images": 4}  # of every engine here: others would be compiled anew


def views(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def models():
    return {name: tiny.loaded(**changes) for name, changes in FUSIONS.items()}


@pytest.fixture(scope="module")
def early(models):
    return models["early"]


def alone(model, picture, prompt="", decoding=GREEDY):
    """What the model writes itself, the first of a batch, where a text alone is numbered, too.

    Beside the longest prompt, and cut where it should stop: one program for all.
    """
    pair = model.generate([picture] * 2, [prompt, LONGEST], replace(decoding, stop=()))
    tokenizer, tokens = model.task.tokenizer, np.array(pair[0][0].tokens)
    return Written.of_row(tokens, 0.0, decoding.stop_ids(tokenizer), tokenizer).text


def one_at_a_time(model, queue=256):
    """An engine that has but one of its slots to give."""
    engine = Engine(model, **SIZES, queue=queue)
    engine._free = engine._free[:1]
    return engine


@pytest.mark.parametrize(
    "fusion", ["early", pytest.param("gated_cross_attention", marks=pytest.mark.slow)]
)
def test_many_at_once_get_what_each_gets_alone(models, fusion):
    """More requests than slots, of different images, prompts, lengths and ways of drawing."""
    model, pictures = models[fusion], views(5)
    asked = []
    about = np.random.default_rng(1).integers(0, 5, 17)
    for number in range(17):
        prompt = ["", "a red", LONGEST][number % 3]
        decoding = [Decoding(), WARM, Decoding(tokens=3), Decoding(stop=("a",))][number % 4]
        asked.append((pictures[about[number]], prompt, decoding))
    expected = [alone(model, *each) for each in asked]
    with Engine(model, **SIZES) as engine:
        for _ in range(2):  # the second time round the ring, slots hold what others left
            writings = [engine.submit(*each) for each in asked]
            assert [writing.result(60.0) for writing in writings] == expected
        counts = engine.counts()
    assert counts.running == counts.waiting == 0
    assert counts.images_read + counts.images_shared == 34
    assert counts.images_shared > 5 and counts.images_read > 5  # room for four of five
    assert len(set(expected)) > 5


def test_pieces_come_one_by_one_and_make_up_the_text(early):
    _, picture = views(2)
    whole = alone(early, picture, "size 2")
    assert "".join(early.stream(picture, "size 2")) == whole
    drawn = alone(early, picture, "size 2", WARM)
    assert "".join(early.stream(picture, "size 2", WARM)) == drawn != whole
    with Engine(early, **SIZES) as engine:
        pieces = list(engine.submit(picture, "size 2"))
    assert len(pieces) > 1 and "".join(pieces) == whole
    with pytest.raises(ValueError, match="neither beams nor samples"):
        early.stream(picture, "", Decoding(beams=2))


def test_samples_and_stops(early):
    (picture,) = views(1)
    warm = Decoding(temperature=2.0, samples=3, stop=(early.task.tokenizer.bos_id,))
    three = early.generate([picture], [""], warm)[0]
    assert len({each.text for each in three}) == 3
    assert early.generate([picture], [""], warm)[0] == three
    stop = three[0].tokens[2]
    cut = early.generate([picture], [""], replace(warm, stop=(int(stop),)))[0]
    for whole, part in zip(three, cut, strict=True):
        first = (*whole.tokens, stop).index(stop)
        assert part.tokens == whole.tokens[: first + 1]
        if first < len(whole.tokens):
            assert part.text == early.task.tokenizer.decode(whole.tokens[:first])
    with pytest.raises(ValueError, match="is no single token"):
        early.generate([picture], [""], Decoding(stop=("a very long stop",)))


def test_what_cannot_be_written_is_refused_and_harms_nobody(early):
    picture, other = views(2)
    expected = alone(early, other)
    with Engine(early, **SIZES) as engine:
        writing = engine.submit(other)
        for wrong in (picture.astype(np.float32), picture[:8], np.zeros((0, 16, 3), np.uint8)):
            with pytest.raises(ValueError, match="a view is uint8"):
                engine.submit(wrong)
        with pytest.raises(ValueError, match="no room is left"):
            engine.submit(picture, "a very long question " * 5)
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            engine.submit(picture, "a\ud800")
        with pytest.raises(ValueError, match="neither beams"):
            engine.submit(picture, "", Decoding(beams=2))
        with pytest.raises(ValueError, match="can be watched"):
            engine.submit(picture, "", Decoding(stop=tuple(range(20, 40))))
        assert writing.result(60.0) == expected
    with pytest.raises(RuntimeError, match="was closed"):
        engine.submit(picture)
    with pytest.raises(ValueError, match="images=2: must be at least 4"):
        Engine(early, images=2)


def test_a_full_queue_refuses_and_a_cancelled_text_gives_its_place_up(early):
    pictures = views(6)
    engine = one_at_a_time(early, queue=3)
    hold = threading.Lock()
    step = engine._slots.step

    def slow():
        with hold:
            return step()

    engine._slots.step = slow
    with hold:
        first = engine.submit(pictures[0])
        while not engine.counts().running:
            time.sleep(0.01)
        waiting = [engine.submit(picture) for picture in pictures[1:4]]
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            engine.submit(pictures[4])
        first.cancel()
        waiting[1].cancel()
    for gone in (first, waiting[1]):
        with pytest.raises(Cancelled):
            gone.result(60.0)
    expected = [alone(early, picture) for picture in (pictures[1], pictures[3])]
    assert [waiting[0].result(60.0), waiting[2].result(60.0)] == expected
    assert engine.close(60.0)


def test_nothing_is_left_waiting_when_the_engine_fails_or_is_closed(early):
    pictures = views(4)

    def broken():
        raise ValueError("out of memory, say")

    engine = one_at_a_time(early)
    engine._slots.step = broken
    writings = [engine.submit(picture) for picture in pictures[:3]]
    for writing in writings:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            writing.result(60.0)
    with pytest.raises(RuntimeError, match="the engine failed"):
        engine.submit(pictures[3])
    engine.close(5.0)

    engine = Engine(early, **SIZES)
    engine._slots.enter = lambda entries: broken()
    for writing in [engine.submit(picture) for picture in pictures[:1]]:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            writing.result(60.0)
    engine.close(5.0)

    engine = one_at_a_time(early)
    step = engine._slots.step
    engine._slots.step = lambda: (time.sleep(0.2), step())[1]
    writings = [engine.submit(picture) for picture in pictures]
    assert not engine.close(0.3)
    ended = 0
    for writing in writings:
        try:
            writing.result(5.0)
        except Cancelled:
            ended += 1
    assert ended >= 2


def test_a_result_that_does_not_come_is_an_error_and_cancels(early):
    engine = one_at_a_time(early)
    step = engine._slots.step
    engine._slots.step = lambda: (time.sleep(1), step())[1]
    writing = engine.submit(views(1)[0])
    with pytest.raises(TimeoutError, match="no token came within 0.3 s"):
        list(iter(lambda: writing.result(0.3), None))
    assert writing.cancelled
    engine.close(0.1)


def test_the_image_asked_for_longest_ago_goes_first():
    a, b, c, d = views(4)
    known = KnownImages(3)
    assert known.rows([a, b, a, c]) == ([0, 1, 3], [2, 1, 2, 0])
    assert known.rows([b]) == ([], [1])
    # `a` was asked for before `c` and `b`.
    assert known.rows([d]) == ([0], [2])
    assert known.rows([c, b]) == ([], [0, 1])
    assert known.rows([a]) == ([0], [2])
    assert (known.read, known.shared) == (5, 4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_written_token_copies_no_cache(fusion):
    """What a donated step holds beside its arguments is less than the cache."""
    model = tiny.loaded(model__layers=4, **FUSIONS[fusion])
    slots = Slots(model.predictor, 32, 4)
    step = slots.writer.decode_step
    with model.predictor.on_mesh():
        compiled = jax.jit(step, donate_argnums=1).lower(model.predictor.params, slots.state)
        held = compiled.compile().memory_analysis()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(slots.state.read_state.cache.layers))
    assert held.alias_size_in_bytes >= kept
    assert held.temp_size_in_bytes < kept, (held.temp_size_in_bytes, kept)


def test_each_program_is_compiled_once_for_its_shapes():
    """What an engine begins with lies as what its programs leave: none is compiled anew."""
    fresh = tiny.loaded()
    with Engine(fresh, **SIZES) as engine:
        # One after the other: each is read and enters alone, with prompts of two widths.
        for picture, prompt in zip(views(3), ("", "a red", "a red small"), strict=True):
            engine.submit(picture, prompt).result(60.0)
    names = ("reads", "reads prompts", "enters", "steps")
    compiled = [fresh.predictor._compiled[f"engine {name}"]._cache_size() for name in names]
    assert compiled == [1, 2, 1, 1]


def test_prompts_have_few_widths():
    assert [width_of(n) for n in (1, 2, 16, 17, 32, 33, 65)] == [1, 16, 16, 32, 32, 64, 128]
