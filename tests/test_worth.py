"""What a picture is foreseen to be worth, and captions written without what is worth little."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.streaming import stream
from unified_mm.inference.worth import PICTURE, RIDGE, Worth, spread, summary
from unified_mm.nn.tokens import Group, Tokens, single_document

FEW = (0, 3, 4)  # pictures that are sent away


@pytest.fixture(scope="module")
def model():
    return tiny.loaded()


def pictures(model, size):
    """A batch of pictures as the data pipeline gives it."""
    return {"image": jax.tree.map(np.asarray, tiny.batch(model.task, size)["image"])}


def sending_away(model, batch, away):
    """The model's predictor, with a threshold above what these pictures are worth, alone."""
    predictor = model.predictor.leaving({PICTURE: 0.5})
    summaries = predictor.summaries(batch)
    needed = np.ones(len(summaries))
    needed[list(away)] = 0.0
    # As many weights as numbers in a summary tell five pictures apart.
    predictor.worth = Worth.fit(summaries, needed)
    np.testing.assert_array_equal(predictor.worths(batch) < 0.5, needed < 0.5)
    return predictor


def test_the_fit_is_the_ridge_regression_that_gradients_confirm():
    rng = np.random.default_rng(0)
    x, y = rng.normal(3.0, 2.0, (40, 5)), rng.normal(size=40)
    x[:, 2] = 7.0  # a number that tells nothing
    worth = Worth.fit(x, y)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    weights = np.array(worth.weights)
    residual = y - worth(x)
    # Where the loss |y - f|^2 + ridge |w|^2 is least, its derivatives are zero.
    np.testing.assert_allclose(z.T @ residual, RIDGE * 40 * weights, atol=1e-9)
    assert residual.mean() == pytest.approx(0, abs=1e-12) and weights[2] == 0
    assert worth.bias == pytest.approx(y.mean())


@pytest.mark.parametrize("y", [[], [np.nan, 1.0]])
def test_what_cannot_be_fitted_is_refused(y):
    with pytest.raises(ValueError, match="finite numbers"):
        Worth.fit(np.ones((len(y), 3)), np.array(y))


def test_a_summary_is_of_valid_tokens_alone():
    x = np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    valid = np.array([[True] * 4 + [False] * 2, [False] * 6])
    metadata = single_document(jnp.asarray(valid), Group("image", "image", 6))
    mean, deviation = spread(Tokens(x, metadata))
    np.testing.assert_allclose(mean, [x[0, :4].mean(0), np.full(3, np.nan)], rtol=1e-6)
    np.testing.assert_allclose(deviation, [x[0, :4].std(0), np.full(3, np.nan)], rtol=1e-5)


def test_pictures_worth_little_are_not_read_and_change_no_other_caption(model, monkeypatch):
    size, read = 5, []
    batch = pictures(model, size)
    plain = model.predictor.write(batch, [""] * size)
    predictor = sending_away(model, batch, FEW)
    alone = predictor.without_context().write({"text": {"present": np.ones(1, bool)}}, [""])
    beside = predictor.continue_text
    monkeypatch.setattr(
        predictor,
        "continue_text",
        lambda batch, *rest: read.append(len(batch["image"]["present"])) or beside(batch, *rest),
    )
    found = predictor.write(batch, [""] * size)
    assert found == [alone[0] if row in FEW else plain[row] for row in range(size)]
    assert read == [2]
    for row in range(size):  # in pieces it is the same
        one = {"image": {name: array[row : row + 1] for name, array in batch["image"].items()}}
        assert "".join(stream(predictor, one, "")) == found[row]
    # A row's caption is its own whatever stands beside it; an answer is always beside its picture.
    shuffled = {name: array[::-1] for name, array in batch["image"].items()}
    assert predictor.write({"image": shuffled}, [""] * size) == found[::-1]
    asked = ["w", "", "w", "w", ""]
    answers = model.predictor.write(batch, asked)
    mixed = [alone[0] if row in FEW and not q else answers[row] for row, q in enumerate(asked)]
    assert predictor.write(batch, asked) == mixed


@pytest.mark.parametrize("away", [(1,), (2, 3)])
def test_a_batch_that_is_as_large_as_its_filled_rows_keeps_its_order(model, away):
    batch = pictures(model, 5)
    plain = model.predictor.write(batch, [""] * 5)
    found = sending_away(model, batch, away).write(batch, [""] * 5)
    for row in range(5):
        assert (found[row] == plain[row]) == (row not in away)


def test_all_are_sent_away_or_none_and_nothing_is_drawn(model, monkeypatch):
    batch = pictures(model, 5)
    plain = model.predictor.write(batch, [""] * 5)
    assert sending_away(model, batch, ()).write(batch, [""] * 5) == plain
    predictor = sending_away(model, batch, range(5))
    monkeypatch.setattr(predictor, "continue_text", lambda *_: pytest.fail("a picture was read"))
    assert len(set(predictor.write(batch, [""] * 5))) == 1
    with pytest.raises(ValueError, match="give neither a temperature"):
        predictor.write(batch, [""] * 5, Decoding(temperature=1.0))
    predictor = sending_away(model, batch, ())  # what is for captions refuses no answer
    predictor.write(batch, ["w"] * 5, Decoding(temperature=1.0))


def test_what_lacks_a_picture_is_worth_no_number_and_is_read(model):
    batch = pictures(model, 5)
    predictor = sending_away(model, batch, range(5))
    batch["image"]["present"] = np.array([True, False, True, True, True])
    left_out = [each is not None for each in predictor.without_pictures(batch, [""] * 5)]
    assert left_out == [True, False, True, True, True]


def test_what_is_foreseen_is_of_the_stem_also_where_towers_look_first():
    built = tiny.task(model__fusion="early_features", objectives__matching__weight=0.0)
    image = {"image": tiny.batch(built, 3)["image"]}
    found = built.model.apply({"params": tiny.params(built)}, image, method=summary)
    assert found.shape == (3, 2 * 16) and np.isfinite(found).all()
