"""Continuous batching writes for everyone what the model writes for each alone."""

import threading
import time

import jax
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.engine import Engine, KnownImages
from unified_mm.inference.generate import advance
from unified_mm.inference.slots import Slots
from unified_mm.inference.writing import Cancelled, QueueFull

FUSIONS = {
    "early": {},
    "gated_cross_attention": {"model__fusion": "gated_cross_attention", "model__cross__start": 0.5},
}
WARM = Decoding(temperature=1.0, seed=3)


def views(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8))


@pytest.fixture(scope="module", params=FUSIONS)
def model(request):
    return tiny.loaded(**FUSIONS[request.param])


@pytest.fixture(scope="module")
def early():
    return tiny.loaded()


def test_many_at_once_get_what_each_gets_alone(model):
    """More requests than slots, of different images, prompts, lengths and ways of drawing."""
    pictures = views(5)
    asked = []
    about = np.random.default_rng(1).integers(0, 5, 17)
    for number in range(17):
        prompt = ["", "a red", "size 2 of a green square"][number % 3]
        decoding = [Decoding(), WARM, Decoding(tokens=3), Decoding(stop=("a",))][number % 4]
        asked.append((pictures[about[number]], prompt, decoding))
    expected = [model.generate([v], [p], d)[0][0].text for v, p, d in asked]
    with Engine(model, slots=3, images=4) as engine:
        for _ in range(2):  # the second time round the ring, slots hold what others left
            writings = [engine.submit(*each) for each in asked]
            assert [writing.result(60.0) for writing in writings] == expected
        counts = engine.counts()
    assert counts.running == counts.waiting == 0
    assert counts.images_read + counts.images_shared == 34
    assert counts.images_shared > 5 and counts.images_read > 5  # room for four of five
    assert len(set(expected)) > 5


def test_pieces_come_one_by_one_and_make_up_the_text(early):
    (picture,) = views(1)
    whole = early.caption([picture])[0]
    assert "".join(early.stream(picture)) == whole
    drawn = early.generate([picture], ["a"], WARM)[0][0].text
    assert "".join(early.stream(picture, "a", WARM)) == drawn
    with Engine(early, slots=2) as engine:
        pieces = list(engine.submit(picture))
    assert len(pieces) > 1 and "".join(pieces) == whole
    with pytest.raises(ValueError, match="neither beams nor samples"):
        early.stream(picture, "", Decoding(beams=2))


def test_samples_and_stops(early):
    (picture,) = views(1)
    three = early.generate([picture], [""], Decoding(temperature=2.0, samples=3))[0]
    assert len({each.text for each in three}) == 3
    again = early.generate([picture], [""], Decoding(temperature=2.0, samples=3))[0]
    assert again == three
    (plain,) = early.generate([picture], [""])[0]
    stop = plain.tokens[2]
    (cut,) = early.generate([picture], [""], Decoding(stop=(int(stop),)))[0]
    first = plain.tokens.index(stop)
    assert cut.tokens == plain.tokens[: first + 1]
    assert cut.text == early.task.tokenizer.decode(plain.tokens[:first])
    with pytest.raises(ValueError, match="is no single token"):
        early.generate([picture], [""], Decoding(stop=("a very long stop",)))


def test_what_cannot_be_written_is_refused_and_harms_nobody(early):
    picture, other = views(2)
    expected = early.caption([other])[0]
    with Engine(early, slots=2) as engine:
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
    engine = Engine(early, slots=1, queue=3)
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
    expected = early.caption([pictures[1], pictures[3]])
    assert [waiting[0].result(60.0), waiting[2].result(60.0)] == expected
    assert engine.close(60.0)


def test_nothing_is_left_waiting_when_the_engine_fails_or_is_closed(early):
    pictures = views(4)

    def broken():
        raise ValueError("out of memory, say")

    engine = Engine(early, slots=1)
    engine._slots.step = broken
    writings = [engine.submit(picture) for picture in pictures[:3]]
    for writing in writings:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            writing.result(60.0)
    with pytest.raises(RuntimeError, match="the engine failed"):
        engine.submit(pictures[3])
    engine.close(5.0)

    engine = Engine(early, slots=2)
    engine._slots.enter = lambda entries: broken()
    for writing in [engine.submit(picture) for picture in pictures[:1]]:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            writing.result(60.0)
    engine.close(5.0)

    engine = Engine(early, slots=1)
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
    engine = Engine(early, slots=1)
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

@pytest.mark.parametrize("name", ["early", "gated_cross_attention"])
def test_a_written_token_copies_no_cache(name):
    """What a donated step holds beside its arguments is less than the cache."""
    model = tiny.loaded(model__layers=4, **FUSIONS[name])
    slots = Slots(model.predictor, 32, 4)

    def step(params, draft):
        return advance(slots.model, params, draft, slots.stream, slots.padding)

    with model.predictor.on_mesh():
        compiled = jax.jit(step, donate_argnums=1).lower(model.predictor.params, slots.draft)
        held = compiled.compile().memory_analysis()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(slots.draft.reading.cache.layers))
    assert held.alias_size_in_bytes >= kept
    assert held.temp_size_in_bytes < kept, (held.temp_size_in_bytes, kept)
