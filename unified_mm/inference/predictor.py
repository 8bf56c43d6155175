"""What a model can be asked for, batch by batch: embeddings, captions, answers, likelihoods."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from unified_mm.inference.generate import greedy
from unified_mm.models.unified import UnifiedModel
from unified_mm.objectives.captioning import Captioning, score_text
from unified_mm.objectives.contrastive import Contrastive, text_valid
from unified_mm.objectives.task import Task
from unified_mm.parallel.rows import own_rows
from unified_mm.parallel.sharding import serving_rules, to_global

Batch = Mapping[str, Mapping[str, np.ndarray]]


class Predictor:
    """A task with parameters on a mesh. Batches are NumPy arrays as the data pipeline makes them.

    Where several processes share the mesh, all ask for the same: each gives its own `rows` of a
    batch, and each gets what comes out of all of them.

    Functions are compiled once for each batch size, so callers keep to one.
    """

    def __init__(self, task: Task, params: Any, mesh: Mesh) -> None:
        self.task = replace(task, model=task.model.anywhere())
        self.params = params
        self.mesh = mesh
        self._compiled: dict[str, Any] = {}

    def at(self, params: Any) -> Predictor:
        """The same with other parameters, sharing what is compiled."""
        other = copy.copy(self)
        other.params = params
        return other

    def rows(self, batch_size: int) -> Int[np.ndarray, " b"]:
        """The rows of a batch over all processes that this one gives."""
        return own_rows(self.mesh, batch_size)

    def can(self, kind: type) -> bool:
        """Whether an objective of this class was trained."""
        return any(isinstance(objective, kind) for objective in self.task.objectives)

    def can_retrieve(self) -> bool:
        """Whether a context and text were held against each other."""
        contrasts = [each for each in self.task.objectives if isinstance(each, Contrastive)]
        return any(each.between in self.task.model.context_names for each in contrasts)

    def embed_images(self, batch: Batch) -> Float[np.ndarray, "B E"]:
        """Unit vectors of the batch's images (or of whatever context contrast was trained on)."""
        objective = self._objective(Contrastive, "embed")
        if objective.of_text_alone:
            raise ValueError("this model embeds texts alone")

        def embed(model: UnifiedModel, batch: Any) -> jax.Array:
            encoded = model.read_context(batch, objective.stream)
            name = objective.between
            head = model.head[objective.name]
            return head(name, encoded.context[name], encoded.context_valid[name])

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
            likelihood, _, scored = score_text(model.logits, x, batch["text"], objective.chunk)
            summed = jnp.where(scored, likelihood, 0.0).sum(1)
            return jnp.stack([summed, scored.sum(1).astype(jnp.float32)], axis=1)

        return self._run("log_likelihood", score, batch)

    def write(self, batch: Batch, prompts: Sequence[str]) -> list[str]:
        """What the model writes about each example, greedily, after its prompt ('' for captions).

        Raises:
          ValueError: a prompt that leaves no room for an answer.
        """
        length = self.task.modalities["text"].length
        text, used = self._prompts(prompts, length)
        own = self.rows(len(prompts))
        text, used = {name: array[own] for name, array in text.items()}, used[own]
        return self.continue_text({**batch, "text": text}, length - used, length - 1)

    def continue_text(self, batch: Batch, most: Int[np.ndarray, " B"], room: int) -> list[str]:
        """What the model writes, greedily, after the beginning that each example's text holds.

        Args:
          batch: context, and as `text` at least a begin token (in documents with its placement).
          most: tokens that each text of this process's rows may still have.
          room: the most that any may have; each value is compiled once.
        """
        objective = self._objective(Captioning, "write")
        tokenizer = self.task.tokenizer

        def generate(params: Any, inputs: Any) -> jax.Array:
            return greedy(
                self.task.model,
                params,
                **inputs,
                stream=objective.stream,
                room=room,
                end=tokenizer.eos_id,
                padding=tokenizer.pad_id,
            )

        inputs = {"batch": batch, "most": most.astype(np.int32)}
        return [tokenizer.decode(row) for row in self._call(f"write {room}", generate, inputs)]

    def _prompts(
        self, prompts: Sequence[str], length: int
    ) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " B"]]:
        """Begin token and prompt of each text as arrays [B, P], and how many tokens these are."""
        tokenizer = self.task.tokenizer
        rows = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            if not row:
                raise ValueError("this model's texts have no begin token: give a prompt")
            if len(row) >= length:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(row)} tokens and the model reads {length}: "
                    "no room is left for an answer; shorten it"
                )
        used = np.array([len(row) for row in rows])
        # Few different shapes, as each is compiled.
        widest = 1 if used.max() == 1 else min(length, -(-int(used.max()) // 8) * 8)
        valid = np.arange(widest) < used[:, None]
        ids = np.full((len(rows), widest), tokenizer.pad_id, np.int32)
        ids[valid] = np.concatenate(rows)
        return {"ids": ids, "valid": valid, "present": np.ones(len(rows), bool)}, used

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
        everywhere = NamedSharding(self.mesh, P())
        compiled = self._compiled.setdefault(name, jax.jit(function, out_shardings=everywhere))
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(serving_rules()):
            return np.asarray(compiled(self.params, to_global(inputs, self.mesh)))


def _without_text(batch: Batch) -> dict[str, Any]:
    return {name: arrays for name, arrays in batch.items() if name != "text"}
