"""Inference as functions of plain lists and dictionaries of arrays.

`jax.export` serialises them for any batch size; they run without the model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array

from unified_mm.inference.generate import ReadState, TextWriter
from unified_mm.inference.loaded import LoadedModel
from unified_mm.models.unified import UnifiedModel
from unified_mm.objectives.captioning import Captioning
from unified_mm.objectives.contrastive import Contrastive
from unified_mm.task import Task

Shapes = Mapping[str, jax.ShapeDtypeStruct]
IMAGE = "image"


@dataclass(frozen=True)
class Program:
    """A function of arrays, and what it takes; a batch is of any size.

    Attributes:
      function: (params, inputs, state) -> an array, or logits and the next state; params and state
        are lists.
      inputs: shape and type of each input by name, the batch first.
      state: shape and type of what earlier tokens have left, in order.
    """

    function: Callable[[list[Array], dict[str, Array], list[Array]], Any]
    inputs: Shapes
    state: tuple[jax.ShapeDtypeStruct, ...] = ()

    def exported(self, params: list[Any], platforms: tuple[str, ...]) -> export.Exported:
        """Returns the program lowered for some platforms ('cpu', 'cuda', 'rocm', 'tpu')."""
        lower = export.export(jax.jit(self.function), platforms=platforms)
        return lower(params, dict(self.inputs), list(self.state))


def programs(model: LoadedModel, prompt: int, cache_room: int) -> dict[str, Program]:
    """Returns all programs that a model allows, by name.

    `embed_images` and `embed_texts` give unit vectors [B, Z]; `prefill` reads an image and a
    prompt and `decode` one token more, and both give logits [B, V] of the next one and a state.

    Args:
      model: the loaded model.
      prompt: tokens that a prompt may have, its padding included.
      cache_room: tokens that may be written after it.

    Raises:
      ValueError: a model that neither embeds nor writes, or one with experts.
    """
    # Kernels are of one device each; these programs are for any.
    task = model.predictor.task
    if any(stack.feed_forward_type == "experts" for stack in task.model.stacks.values()):
        raise ValueError(
            "a model with experts cannot be exported: how many blocks they compute depends on the "
            "batch, whose size an exported program leaves open"
        )
    portable = _Portable(task, task.model.with_options(attention="xla"), model.predictor.params)
    found: dict[str, Program] = {}
    if any(each.reader for each in task.contrasts()):
        raise ValueError(
            "this model reads the texts of its contrast by a reader, whose tokens an exported "
            "program does not know: index and serve take the run as it is"
        )
    both = task.shared_space(IMAGE, "text")
    if not both and len(task.contrasts()) > 1:
        raise ValueError(
            "what is exported embeds into one space, and this model has several: train one with "
            "one contrast between image and text"
        )
    for objective in task.objectives:
        if isinstance(objective, Contrastive) and (not both or objective.name == both):
            found |= portable.encoders(objective)
        elif isinstance(objective, Captioning):
            found |= portable.writing(objective, prompt, cache_room)
    if not found:
        raise ValueError("this model neither embeds nor writes: there is nothing to export")
    return found


@dataclass(frozen=True)
class _Portable:
    """A task whose model runs anywhere, and its parameters."""

    task: Task
    model: UnifiedModel
    params: Any

    def encoders(self, objective: Contrastive) -> dict[str, Program]:
        def embed_images(params: Any, inputs: Any, state: Any) -> Array:
            embed = partial(objective.embed, of=IMAGE)
            return self._apply(params, embed, self._context(inputs))

        def embed_texts(params: Any, inputs: Any, state: Any) -> Array:
            embed = partial(objective.embed, of="text")
            return self._apply(params, embed, {"text": _text(inputs)})

        found: dict[str, Program] = {}
        if IMAGE in objective.between:
            found["embed_images"] = Program(embed_images, self._pixels())
        if "text" in objective.between:
            length = self.task.modalities["text"].length
            found["embed_texts"] = Program(embed_texts, _text_shapes(length))
        return found

    def writing(self, objective: Captioning, prompt: int, cache_room: int) -> dict[str, Program]:
        padding = self.task.tokenizer.pad_id
        writer = TextWriter(self.model, objective.view, padding, cache_room)

        def start(params: Any, inputs: Any) -> tuple[Array, ReadState]:
            batch = {**self._context(inputs), "text": _text(inputs)}
            return writer.read_prompts(self._tree(params), batch)

        def prefill(params: Any, inputs: Any, state: Any) -> tuple[Array, list[Array]]:
            logits, read_state = start(params, inputs)
            return logits, jax.tree.leaves(read_state)

        inputs = {**self._pixels(), **_text_shapes(prompt)}
        _, begun = jax.eval_shape(start, jax.tree.leaves(self.params), inputs)
        state, structure = jax.tree.flatten(begun)

        def decode(params: Any, inputs: Any, state: Any) -> tuple[Array, list[Array]]:
            read_state = jax.tree.unflatten(structure, state)
            token = inputs["token"]
            logits, read_state = writer.read_token(self._tree(params), read_state, token)
            return logits, jax.tree.leaves(read_state)

        token = {"token": _shape((), jnp.int32)}
        return {
            "prefill": Program(prefill, inputs),
            "decode": Program(decode, token, tuple(state)),
        }

    def _tree(self, params: list[Array]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.params), params)

    def _apply(self, params: list[Array], method: Callable[..., Array], batch: Any) -> Array:
        def ask(module: UnifiedModel) -> Array:
            return method(module, batch)

        found: Any = self.model.apply({"params": self._tree(params)}, method=ask)
        return found

    def _pixels(self) -> Shapes:
        if IMAGE not in self.task.modalities:
            return {}
        size = self.task.modalities[IMAGE].size
        return {"pixels": _shape((size, size, 3), jnp.uint8)}

    def _context(self, inputs: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """Returns the context with an image in each row and nothing else."""
        rows = next(iter(inputs.values())).shape[0]
        context = {
            name: {
                key: jnp.broadcast_to(value, (rows, *value.shape))
                for key, value in self.task.modalities[name].absent().items()
            }
            for name in self.model.context_names
        }
        if "pixels" in inputs:
            context[IMAGE] = {"pixels": inputs["pixels"], "present": jnp.ones(rows, bool)}
        return context


def _text(inputs: Mapping[str, Array]) -> dict[str, Array]:
    present = jnp.ones(inputs["ids"].shape[0], bool)
    return {"ids": inputs["ids"], "valid": inputs["valid"], "present": present}


def _text_shapes(length: int) -> Shapes:
    return {"ids": _shape((length,), jnp.int32), "valid": _shape((length,), bool)}


def _shape(rest: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*_BATCH, *rest), dtype)


_BATCH = export.symbolic_shape("batch")
