"""What each fusion costs, and models made to fit a budget."""

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from unified_mm.cli.recipes import serve_what_can_be
from unified_mm.config import Config
from unified_mm.models.unified import FUSIONS
from unified_mm.parallel.sharding import without_names
from unified_mm.task import build_task, parameter_counts
from unified_mm.training.sizes import fit_to_budget, measure_sizes


def config(fusion="early", **changes):
    changed = tiny.config_dict(model__fusion=fusion, objectives__matching__weight=0.0, **changes)
    return serve_what_can_be(ConfigDict(changed.to_dict()), (), lambda _: None)


def test_sizes_are_counted_by_hand_for_one_stack():
    """Early fusion: 4 patches and 2 texts of 12 tokens through 2 layers of width 16."""
    sizes = measure_sizes(Config(config().to_dict()))
    width, layers, hidden, patches, tokens, vocabulary = 16, 2, 32, 4, 12, 320
    dense = layers * (4 * width * width + 2 * width * hidden)
    seen = patches * patches + tokens * tokens + tokens * (patches + tokens)
    forward = 2 * dense * (patches + 2 * tokens)  # projections and feed-forward
    forward += 2 * 2 * layers * width * seen  # scores and sums of what is seen
    forward += 2 * patches * 8 * 8 * 3 * width  # patches
    forward += 2 * (tokens - 1) * width * vocabulary  # next tokens
    forward += 2 * 2 * width * 8 + 2 * 8 * 8  # heads of contrast, and 8 x 8 cosines an example
    assert sizes.training_flops == pytest.approx(3 * forward, rel=1e-3)
    a_token = 2 * dense + 4 * layers * width * (patches + 1 + tokens) + 2 * width * vocabulary
    assert sizes.token_flops == pytest.approx(a_token, rel=1e-3)


def test_of_sparse_attention_the_listed_blocks_count():
    """A window of 64 in blocks of 64: for a caption they lie across the end of its 4 patches."""
    width, layers, patches, tokens, block = 16, 2, 4, 512, 64
    window = {"model__modalities__text__length": tokens, "model__sparse": {"text": {"window": 64}}}
    dense, listed, auto = (
        measure_sizes(Config(config(model__attention=each, **window).to_dict()))
        for each in ("xla", "blocks", "auto")
    )
    seen = patches * patches + tokens * tokens + tokens * (patches + tokens)
    # Neighbours on both sides for the contrast; before a token, and the block of the patches.
    computed = block * block + tokens * 3 * block + tokens * 4 * block
    saved = 2 * 2 * layers * width * (seen - computed)
    assert dense.training_flops - listed.training_flops == 3 * saved
    assert auto == dense  # at this length 'auto' computes all
    assert listed.token_flops == dense.token_flops


@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_are_those_of_the_task(fusion):
    small = config(fusion, model__resampler__latents=4)
    sizes = measure_sizes(Config(small.to_dict()))
    task = build_task(Config(small.to_dict()), tiny.tokenizer())
    params = without_names(jax.eval_shape(task.init, jax.random.key(0)))
    assert sizes.parameters == parameter_counts(params)
    assert sizes.active == sizes.total
    assert (sizes.token_flops is None) == (fusion == "late")


@pytest.mark.parametrize(
    ("fusion", "by"),
    [
        ("early", "width"),
        pytest.param("late", "layers", marks=pytest.mark.slow),
    ],
)
def test_a_budget_is_met_from_below_and_nearly(fusion, by):
    budget = 3e6
    fitted = fit_to_budget(config(fusion, model__budget=budget, model__budget_by=by))
    cost = measure_sizes(Config(fitted.to_dict())).training_flops
    assert cost <= budget
    larger = ConfigDict(fitted.to_dict())
    larger.model[by] += 4 if by == "width" else 1
    if by == "width":
        larger.model.feed_forward = 2 * larger.model.width
    assert measure_sizes(Config(larger.to_dict())).training_flops > budget
    assert fitted.model.heads == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model__exits": (2,), "objectives__exits__weight": 1.0},
        {"model__dropping": {"keep": 0.5, "after": 2}},
    ],
)
def test_a_budget_of_layers_leaves_room_after_exits_and_the_drop(changes):
    deep = {"model__layers": 3, "model__budget_by": "layers"}
    least = measure_sizes(Config(config(**changes, **deep).to_dict())).training_flops
    for budget in (1.01 * least, 0.99 * least):
        asked = config(**changes, **deep, model__budget=budget)
        if budget > least:
            assert fit_to_budget(asked).model.layers == 3
        else:
            with pytest.raises(ValueError, match="smallest model by layers costs"):
                fit_to_budget(asked)


def test_wrong_budgets_are_refused():
    with pytest.raises(ValueError, match="smallest model by width costs"):
        fit_to_budget(config(model__budget=10.0))
    with pytest.raises(ValueError, match="model.budget_by='depth': must be one of width, layers"):
        fit_to_budget(config(model__budget=1e9, model__budget_by="depth"))
    plain = config()
    assert fit_to_budget(plain) is plain


def test_what_a_fusion_cannot_serve_is_switched_off_and_said_unless_asked_for():
    told = []
    changed = tiny.config_dict(model__fusion="late")
    chosen = serve_what_can_be(changed, ("objectives.matching.weight",), told.append)
    assert chosen.objectives.captioning.weight == 0
    assert chosen.objectives.matching.weight == 1  # asked for, and refused when it is built
    assert told == ["objectives.captioning.weight=0: 'late' fusion cannot serve it"]
    assert changed.objectives.captioning.weight == 1
