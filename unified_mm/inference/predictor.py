"""What a model can be asked for, batch by batch: embeddings, captions, answers, likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from unified_mm.inference.generate import greedy
from unified_mm.models.unified import UnifiedModel
from unified_mm.objectives.captioning import Captioning, next_token_scores
from unified_mm.objectives.contrastive import Contrastive, text_valid
from unified_mm.objectives.task import Task
from unified_mm.parallel.sharding import rule_items, to_global

Batch = Mapping[str, Mapping[str, np.ndarray]]


class Predictor:
    """A task with parameters on a mesh. Batches are NumPy arrays as the data pipeline makes them.

    Functions are compiled once for each batch size, so callers keep to one.
    """

    def __init__(self, task: Task, params: Any, mesh: Mesh) -> None:
        self.task = task
        self.params = params
        self.mesh = mesh
        self._compiled: dict[str, Any] = {}

    def can(self, kind: type) -> bool:
        """Whether an objective of this class was trained."""
        return any(isinstance(objective, kind) for objective in self.task.objectives)

    def embed_images(self, batch: Batch) -> Float[np.ndarray, "B E"]:
        """Unit vectors of the batch's images (or of whatever context contrast was trained on)."""
        objective = self._objective(Contrastive, "embed")

        def embed(model: UnifiedModel, batch: Any) -> jax.Array:
            context, cache = model.read_context(batch, objective.stream)
            head = model.head[objective.name]
            valid = _valid_of(cache.metadata, objective.between)
            return head(objective.between, context[objective.between], valid)

        return self._run("embed_images", embed, _without_text(batch))

    def embed_texts(self, batch: Batch) -> Float[np.ndarray, "B E"]:
        """Unit vectors of the batch's texts."""
        objective = self._objective(Contrastive, "embed")

        def embed(model: UnifiedModel, batch: Any) -> jax.Array:
            x = model.read_text(batch["text"], objective.stream)
            return model.head[objective.name]("text", x, text_valid(batch))

        return self._run("embed_texts", embed, {"text": batch["text"]})

    def log_likelihood(self, batch: Batch) -> Float[np.ndarray, "B 2"]:
        """Each text beside its image: summed log-likelihood in nats, and tokens scored."""
        objective = self._objective(Captioning, "score captions")

        def score(model: UnifiedModel, batch: Any) -> jax.Array:
            x = model.encode(batch, objective.streams())[objective.name].text
            likelihood, _, scored = next_token_scores(model.logits(x[:, :-1]), batch["text"])
            summed = jnp.where(scored, likelihood, 0.0).sum(1)
            return jnp.stack([summed, scored.sum(1).astype(jnp.float32)], axis=1)

        return self._run("log_likelihood", score, batch)

    def write(self, batch: Batch, prompts: Sequence[str]) -> list[str]:
        """What the model writes about each example, greedily, after its prompt ('' for captions).

        Raises:
          ValueError: a prompt that leaves no room for an answer.
        """
        objective = self._objective(Captioning, "write")
        tokenizer = self.task.tokenizer
        length = self.task.modalities["text"].length
        ids = np.full((len(prompts), length), tokenizer.pad_id, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            start = tokenizer.encode_prompt(prompt)
            if len(start) >= length:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(start)} tokens and the model reads {length}: "
                    "no room is left for an answer; shorten it"
                )
            ids[row, : len(start)] = start
            lengths[row] = len(start)
        inputs = {"batch": _without_text(batch), "prompt": ids, "prompt_length": lengths}

        def generate(params: Any, inputs: Any) -> jax.Array:
            return greedy(
                self.task.model,
                params,
                **inputs,
                stream=objective.stream,
                end=tokenizer.eos_id,
                padding=tokenizer.pad_id,
            )

        written = self._call("write", generate, inputs)
        return [
            tokenizer.decode(row[start:]) for row, start in zip(written, lengths, strict=True)
        ]

    def _objective(self, kind: type, what: str) -> Any:
        for objective in self.task.objectives:
            if isinstance(objective, kind):
                return objective
        trained = ", ".join(objective.name for objective in self.task.objectives)
        raise ValueError(
            f"this model cannot {what}: it was trained on {trained}, which needs "
            f"{kind.__name__.lower()}"
        )

    def _run(self, name: str, function: Any, batch: Batch) -> np.ndarray:
        def apply(params: Any, batch: Any) -> jax.Array:
            embedded: Any = self.task.model.apply({"params": params}, batch, method=function)
            return embedded

        return self._call(name, apply, batch)

    def _call(self, name: str, function: Any, inputs: Any) -> np.ndarray:
        compiled = self._compiled.setdefault(name, jax.jit(function))
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(rule_items()):
            return np.asarray(compiled(self.params, to_global(inputs, self.mesh)))


def _without_text(batch: Batch) -> dict[str, Any]:
    return {name: arrays for name, arrays in batch.items() if name != "text"}


def _valid_of(metadata: Any, name: str) -> jax.Array:
    start = 0
    for group in metadata.groups:
        if group.name == name:
            return metadata.valid[:, start : start + group.length]
        start += group.length
    raise ValueError(f"the context holds no modality {name!r}")
