"""Post-training quantisation of a loaded model: int8 weights, or int8 weights and activations.

Nothing is trained and no data is needed: weights are rounded once, activations when they are
computed, each vector by its own largest number (Dettmers et al. 2022, LLM.int8(), section 2.1). The
products within attention, of queries with keys and of weights with values, are not quantised.
"""

from __future__ import annotations

from dataclasses import replace

from unified_mm.config import Config
from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.quantized_params import quantize_params

WEIGHTS = ("int8",)
ACTIVATIONS = ("", "int8")


def quantized(
    model: LoadedModel, weights: str = "int8", activations: str = "", source: str = "memory"
) -> LoadedModel:
    """Returns the same model with int8 weights; the given one is unchanged.

    Args:
      model: a model with float weights.
      weights: 'int8'.
      activations: 'int8' multiplies int8 by int8; '' multiplies float activations by the
        dequantised weights.
      source: where the model is from, as its config will say.

    Raises:
      ValueError: another kind of numbers, a model that is quantised already or whose exits were
        calibrated with its floats, or no qwix.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: one of {', '.join(WEIGHTS)}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}: 'int8', or '' for none")
    if "quantized" in model.config:
        raise ValueError(
            f"the model's weights are {model.config.quantized.weights} already: quantise the run "
            f"that they were made from ({model.config.quantized['from']})"
        )
    if model.predictor.exits:
        raise ValueError(
            "the model's exits were calibrated with float weights: load it without, quantise it, "
            "and calibrate what comes out"
        )
    fields = model.config.as_dict()
    fields["quantized"] = {
        "weights": weights,
        "activations": activations,
        "choosing": "",  # floats stay by which something is chosen
        "from": source,
        "step": model.step,
    }
    # One period at a time is turned to floats, not as many as a step of the scan would hold.
    fields["model"]["unroll"] = 1
    task = replace(model.task, model=model.task.model.with_options(unroll=1))
    params = quantize_params(task, model.params, activations)
    return LoadedModel(
        task, params, model.predictor.mesh, Config(fields), model.step, state=model.state
    )
