"""Inference batch by batch: embeddings, captions, answers, likelihoods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from unified_mm.data.pipeline import Arrays, Preparer, evaluation_batches
from unified_mm.inference.beams import beam_search
from unified_mm.inference.decoding import GREEDY, Decoding, Written
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.question_only import QUESTION_ONLY, ROWS, sure, without_context
from unified_mm.inference.sampling import sampling_arrays
from unified_mm.inference.worth import PICTURE, Worth, summary
from unified_mm.models.unified import UnifiedModel
from unified_mm.nn.attention.rules import View
from unified_mm.objectives.captioning import Captioning, score_text
from unified_mm.objectives.classification import Classification
from unified_mm.objectives.transcription import Transcription
from unified_mm.parallel.processes import own_rows
from unified_mm.parallel.sharding import serving_rules, to_global
from unified_mm.task import Task

Batch = Mapping[str, Mapping[str, np.ndarray]]
CAPTION, ANSWER = "caption", "answer"  # kinds of texts: without and with a prompt
KNOWN = 100_000  # texts without a picture that are kept; the oldest go first


class Predictor:
    """A task with parameters on a mesh. Batches are NumPy arrays as the data pipeline makes them.

    Where several processes share the mesh, all make the same calls: each gives its own `rows` of a
    batch, and each gets the results of all of them.

    Functions are compiled once for each batch size, so callers should use few sizes.

    Attributes:
      exits: by kind of text, `CAPTION` or `ANSWER`, the confidence at which its tokens leave the
        layers early; kinds that are not there run all layers. `QUESTION_ONLY` has the probability
        at which an answer stands without its picture, `PICTURE` the nats a token that a picture
        must be worth for its caption.
      worth: foresees that.
    """

    def __init__(
        self,
        task: Task,
        params: Any,
        mesh: Mesh,
        exits: Mapping[str, float] | None = None,
        worth: Worth | None = None,
    ) -> None:
        self.exits = dict(exits or {})
        self.worth = worth
        self.task = replace(task, model=task.model.for_inference())
        self.params = params
        self.mesh = mesh
        self._compiled: dict[str, Any] = {}
        self._alone: dict[tuple[Decoding, str], Written] = {}
        self._reader: Predictor | None = None  # of texts alone, made when it is first needed

    def at(self, params: Any) -> Predictor:
        """Returns the predictor with other parameters, sharing what is compiled."""
        other = copy.copy(self)
        other.params = params
        other._alone = {}
        other._reader = None if self._reader is None else self._reader.at(params)
        return other

    def leaving(self, exits: Mapping[str, float]) -> Predictor:
        """Returns the predictor with other exits, sharing what is compiled."""
        other = copy.copy(self)
        other.exits = dict(exits)
        return other

    def rows(self, batch_size: int) -> Int[np.ndarray, " rows"]:
        """Returns the rows of a batch over all processes that this one gives."""
        return own_rows(self.mesh, batch_size)

    def over(
        self,
        examples: Sequence[Any],
        batch_size: int,
        function: Callable[[dict[str, Arrays]], Iterable[Any]],
        preparers: Mapping[str, Preparer] | None = None,
    ) -> list[Any]:
        """Returns what a function says of each example of a batch, for all examples in order.

        Args:
          examples: records, or what the preparers take.
          batch_size: of all processes; the last batch is filled up.
          function: of this process's rows of a batch, to results for all processes' rows.
          preparers: by the name of each modality; by default those of the task.
        """
        batches = evaluation_batches(
            examples,
            self.task.modalities if preparers is None else preparers,
            batch_size=batch_size,
            rows=self.rows(batch_size),
        )
        with closing(batches):  # type: ignore[type-var]
            return [each for batch in batches for each in function(batch)][: len(examples)]

    def can(self, kind: type) -> bool:
        """Returns whether an objective of this class was trained."""
        return any(isinstance(objective, kind) for objective in self.task.objectives)

    def can_retrieve(self, of: str = "image") -> bool:
        """Returns whether a contrastive objective of a modality and texts was trained."""
        return bool(self.task.contrasts(of, "text"))

    def embed(self, batch: Batch, of: str, objective: str = "") -> Float[np.ndarray, "B Z"]:
        """Returns unit vectors of one modality of a batch.

        Args:
          batch: the context, or `text` for texts.
          of: the modality.
          objective: the contrastive objective in whose space they lie, where several embed the
            modality.

        Raises:
          ValueError: no contrastive objective embeds it, or several do and none is named.
        """
        chosen = self.task.embedding(of, objective)

        def embed(params: Any, batch: Any) -> jax.Array:
            return self.task.embed(params, batch, of, chosen.name)

        read = ("text",) if of == "text" else self.task.model.context_names
        inputs = self.to_device({name: batch[name] for name in read})
        return np.asarray(self.call(f"embed {of} {chosen.name}", embed, inputs))

    def class_probabilities(self, batch: Batch, objective: Classification) -> np.ndarray:
        """Returns the probabilities [B, C] of the classes of an objective."""
        inputs = {name: batch[name] for name in self.task.model.context_names}
        return self._run(f"classes {objective.name}", objective.probabilities, inputs)

    def transcribe(self, batch: Batch, objective: Transcription) -> list[str]:
        """Returns what an objective hears in each example."""
        inputs = {name: batch[name] for name in self.task.model.context_names}
        units = self._run(f"transcribe {objective.name}", objective.written, inputs)
        return [objective.text(row) for row in units]

    def log_likelihood(self, batch: Batch) -> Float[np.ndarray, "B 2"]:
        """Returns each text's log-likelihood beside its image, in nats, and its tokens scored."""
        objective = self._objective(Captioning, "score captions")

        def score(model: UnifiedModel, batch: Any) -> jax.Array:
            x = model.encode(batch, objective.views())[objective.name].text
            likelihood, _, scored = score_text(model.logits, x, batch["text"], objective.chunk)
            summed = jnp.where(scored, likelihood, 0.0).sum(1)
            return jnp.stack([summed, scored.sum(1).astype(jnp.float32)], axis=1)

        return self._run("log_likelihood", score, batch)

    def write(self, batch: Batch, prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[str]:
        """Returns the best text that the model writes about each example after its prompt.

        Raises:
          ValueError: a prompt that leaves no room for an answer.
        """
        return [texts[0].text for texts in self.generate(batch, prompts, decoding)]

    def generate(
        self, batch: Batch, prompts: Sequence[str], decoding: Decoding = GREEDY, first: int = 0
    ) -> list[list[Written]]:
        """Writes `decoding.samples` texts about each example, after its prompt ('' for captions).

        Args:
          batch: the context.
          prompts: one for each example of all processes.
          decoding: how texts are decoded.
          first: number of the first example, which is part of the seed of each draw.

        Raises:
          ValueError: a prompt that leaves no room for an answer, or as `without_pictures` does.
        """
        self._objective(Captioning, "write")  # there may be no text at all
        alone = self.without_pictures(batch, prompts, decoding)
        rows = self._rows_to_read([text is None for text in alone])
        if len(rows) < len(prompts):
            batch = jax.tree.map(lambda array: array[rows], dict(batch))
        asked = [prompts[row] for row in rows]
        texts = self._beside(batch, asked, decoding, first) if rows else []
        read = dict(zip(rows, texts, strict=True))
        return [read[row] if text is None else [text] for row, text in enumerate(alone)]

    def _rows_to_read(self, wanted: Sequence[bool]) -> list[int]:
        """Returns the rows that are computed so that all those wanted are.

        A wanted row may stand there more than once: each number of rows is compiled, so that there
        are few. Several processes hold rows apart, and compute all or none.
        """
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        size = self.mesh.size
        while size < len(rows):
            size *= 2
        if size >= len(wanted) or jax.process_count() > 1:
            return list(range(len(wanted))) if rows else []
        return (rows * size)[: size if rows else 0]

    def _beside(
        self, batch: Batch, prompts: Sequence[str], decoding: Decoding, first: int
    ) -> list[list[Written]]:
        """Writes texts as `generate` does, each beside its context."""
        length = self.task.modalities["text"].length
        text, used = self.prompts(prompts)
        own = self.rows(len(prompts))
        text, used = {name: array[own] for name, array in text.items()}, used[own]
        threshold = self.thresholds(prompts, decoding)
        return self.continue_text(
            {**batch, "text": text},
            length - used,
            length - 1,
            decoding,
            first + int(own[0]),
            None if threshold is None else threshold[own],
        )

    def without_pictures(
        self, batch: Batch, prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written | None]:
        """Returns of each example the text that stands without its picture, None where none does.

        Raises:
          ValueError: as `sure` does.
        """
        known = self.sure(prompts, decoding)
        found = [known.get(prompt) for prompt in prompts]
        if PICTURE in self.exits and not all(prompts):
            self.thresholds(prompts, decoding)
            (caption,) = self._texts_alone([""], decoding).values()
            for row, nats in enumerate(self.worths(batch).tolist()):
                if not prompts[row] and nats < self.exits[PICTURE]:
                    found[row] = caption
        return found

    def worths(self, batch: Batch) -> Float[np.ndarray, " B"]:
        """Returns the nats a token that each picture is foreseen to be worth to its caption."""
        assert self.worth is not None, f"{PICTURE!r} is among exits, and nothing foresees worth"
        return self.worth(self.summaries(batch))

    def summaries(self, batch: Batch) -> Float[np.ndarray, "B F"]:
        """Returns what the stem says of each example's context."""
        inputs = {name: batch[name] for name in self.task.model.context_names}
        return self._run("summary", summary, inputs)

    def sure(self, prompts: Sequence[str], decoding: Decoding = GREEDY) -> dict[str, Written]:
        """Returns the answers that stand without a picture, by their questions.

        Raises:
          ValueError: as `thresholds` does, or answers are cut short.
        """
        threshold = self.exits.get(QUESTION_ONLY)
        if threshold is None:
            return {}
        self.thresholds(prompts, decoding)
        if any(prompts) and (decoding.tokens is not None or decoding.stop):
            raise ValueError(
                "answers without a picture were calibrated whole, and one that is cut short looks "
                "surer: give neither tokens nor stop with exits that have them"
            )
        return sure(self.answers_alone(prompts, decoding), threshold)

    def answers_alone(
        self, questions: Sequence[str], decoding: Decoding = GREEDY
    ) -> dict[str, Written]:
        """Returns what the model answers to each question without a picture."""
        return self._texts_alone(dict.fromkeys(filter(None, questions)), decoding)

    def _texts_alone(self, asked_for: Iterable[str], decoding: Decoding) -> dict[str, Written]:
        known = {q: self._alone[decoding, q] for q in asked_for if (decoding, q) in self._alone}
        new = [each for each in asked_for if each not in known]
        size = ROWS * self.mesh.size
        for start in range(0, len(new), size):
            asked = new[start : start + size]
            filled = asked + asked[:1] * (size - len(asked))
            batch = {"text": {"present": np.ones(len(self.rows(size)), bool)}}
            texts = self.without_context().generate(batch, filled, decoding)
            known |= {each: text for each, (text,) in zip(asked, texts, strict=False)}
        self._alone |= {(decoding, each): text for each, text in known.items()}
        for oldest in list(self._alone)[:-KNOWN]:
            del self._alone[oldest]
        return {each: known[each] for each in asked_for}

    def without_context(self) -> Predictor:
        """Returns the predictor of the same parameters that reads texts alone, by all layers."""
        if self._reader is None:
            self._reader = Predictor(without_context(self.task), self.params, self.mesh)
        return self._reader

    def thresholds(
        self, prompts: Sequence[str], decoding: Decoding
    ) -> Float[np.ndarray, " B"] | None:
        """Returns the confidence at which each text's tokens leave early; None without exits.

        Raises:
          ValueError: tokens are drawn, or beams compared: the exits are of the likeliest token.
        """
        kinds = [ANSWER if prompt else CAPTION for prompt in prompts]
        alone = {ANSWER: QUESTION_ONLY, CAPTION: PICTURE}
        if not self.exits.keys() & {*kinds, *(alone[kind] for kind in kinds)}:
            return None
        if decoding.temperature > 0 or decoding.beams > 1:
            raise ValueError(
                "exits were calibrated for the likeliest token: give neither a temperature nor "
                "beams with them"
            )
        if not self.exits.keys() & {*kinds}:
            return None
        return np.array([self.exits.get(kind, np.inf) for kind in kinds], np.float32)

    def continue_text(
        self,
        batch: Batch,
        max_tokens: Int[np.ndarray, " B"],
        cache_room: int,
        decoding: Decoding = GREEDY,
        first: int = 0,
        threshold: Float[np.ndarray, " B"] | None = None,
    ) -> list[list[Written]]:
        """Continues the beginning that each example's text holds.

        Args:
          batch: context, and as `text` at least a begin token (documents with `POSITION_KEYS`).
          max_tokens: tokens that each text of this process's rows may still have.
          cache_room: the most that any text may still have; each value is compiled once.
          decoding: how texts are decoded.
          first: number of the first example, which is part of the seed of each draw.
          threshold: as `thresholds` says.

        Returns:
          `decoding.samples` texts for each example, the best first where beams were compared.
        """
        tokenizer, writer = self.task.tokenizer, self.writer(cache_room)
        ends = decoding.stop_ids(tokenizer)

        def write(params: Any, inputs: Any) -> Any:
            texts = write_texts(writer, params, inputs, decoding.beams, decoding.samples)
            return *texts, inputs["max_tokens"]

        name = f"write {cache_room} {decoding.beams} {decoding.samples}"
        inputs = self.to_device(inputs_of(decoding, batch, max_tokens, ends, first, threshold))
        written, gained, rooms = jax.device_get(self.call(name, write, inputs))
        # What stands beyond a text's room is padding, which may be the same token as the end.
        rooms = np.repeat(rooms, len(written) // len(rooms)).tolist()
        texts = [
            Written.of_row(row[:room], float(nats), ends, tokenizer)
            for row, nats, room in zip(written, gained, rooms, strict=True)
        ]
        return [
            texts[start : start + decoding.samples]
            for start in range(0, len(texts), decoding.samples)
        ]

    @property
    def writing_view(self) -> View:
        """The view that the model learned to write by.

        Raises:
          ValueError: it did not learn to write.
        """
        view: View = self._objective(Captioning, "write").view
        return view

    def writer(self, cache_room: int) -> TextWriter:
        """Returns what writes texts of at most `cache_room` tokens.

        Raises:
          ValueError: the model did not learn to write.
        """
        padding = self.task.tokenizer.pad_id
        return TextWriter(self.task.model, self.writing_view, padding, cache_room)

    def prompts(
        self, prompts: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " B"]]:
        """Returns begin token and prompt of each text as arrays [B, T], and their token counts.

        Raises:
          ValueError: a prompt that leaves no room for an answer, or no token at all.
        """
        tokenizer, length = self.task.tokenizer, self.task.modalities["text"].length
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
        widest = min(length, width_of(int(used.max())))
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

        return np.asarray(self.call(name, apply, self.to_device(batch)))

    def to_device(self, inputs: Any) -> Any:
        """Puts arrays of this process's rows on the mesh."""
        return to_global(inputs, self.mesh)

    def replicated(self, tree: Any) -> Any:
        """Puts arrays on every device as `call` leaves them: it compiles anew for any other."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def call(self, name: str, function: Any, *args: Any, donated: tuple[int, ...] = ()) -> Any:
        """Calls `function(params, *args)` on the mesh, compiled once for each name and shapes.

        Args:
          name: the function's name; the same name must mean the same function each time.
          function: what is called.
          args: arrays on the device.
          donated: numbers (from 1) of the `args` whose buffers are donated.

        Returns:
          What the function returns, a copy on every device.
        """
        if name not in self._compiled:
            everywhere = NamedSharding(self.mesh, P())
            self._compiled[name] = jax.jit(
                function, out_shardings=everywhere, donate_argnums=donated
            )
        with self.on_mesh():
            return self._compiled[name](self.params, *args)

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Sets the mesh and the sharding rules for serving, for what is compiled within."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(serving_rules()):
            yield


def width_of(tokens: int) -> int:
    """Returns the width that prompts of so many tokens are filled up to: 1, 16, 32, 64, ...

    Few, as each is compiled for seconds.
    """
    return 1 if tokens == 1 else max(16, 1 << (tokens - 1).bit_length())


def inputs_of(
    decoding: Decoding,
    batch: Mapping[str, Any],
    max_tokens: Int[np.ndarray, " B"],
    ends: Sequence[int],
    first: int,
    threshold: Float[np.ndarray, " B"] | None = None,
) -> dict[str, Any]:
    """Returns the `inputs` of `write_texts`.

    Args:
      decoding: how texts are decoded.
      batch: context and the beginning of each text.
      max_tokens: how many tokens each text may have.
      ends: tokens that end a text.
      first: number of the first example, which is part of the seed of each draw.
      threshold: confidence at which each text's tokens leave the layers early; None for never.
    """
    if decoding.tokens is not None:
        max_tokens = np.minimum(max_tokens, decoding.tokens)
    inputs: dict[str, Any] = {"batch": batch}
    if decoding.beams > 1:
        inputs["length_penalty"] = np.full(len(max_tokens), decoding.length_penalty, np.float32)
    else:
        inputs["sampling"] = sampling_arrays(decoding, len(max_tokens), first)
        max_tokens = np.repeat(max_tokens, decoding.samples)
        if threshold is not None:
            inputs["threshold"] = threshold
    inputs["max_tokens"] = max_tokens.astype(np.int32)
    inputs["stop"] = np.tile(np.array(ends, np.int32), (len(max_tokens), 1))
    return inputs


def write_texts(
    writer: TextWriter, params: Any, inputs: Mapping[str, Any], beams: int, samples: int
) -> tuple[Int[Array, "rows S"], Float[Array, " rows"]]:
    """Writes `samples` texts for each example.

    Args:
      writer: the model.
      params: its parameters.
      inputs: as `inputs_of` makes them.
      beams: beams of each text; 1 for no beam search.
      samples: texts for each example.

    Returns:
      The tokens, padded, and their log-likelihoods in nats; rows by example and sample.
    """
    if beams > 1:
        given = {**inputs, "length_penalty": inputs["length_penalty"][0]}
        found = beam_search(writer, params, **given, beams=beams)
        written, likelihood = jax.tree.map(
            lambda x: x[:, :samples].reshape(-1, *x.shape[2:]), found
        )
        return written, likelihood
    state = writer.generate(params, writer.begin(params, inputs))
    return state.written, state.likelihood


def window_means(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns the means of what was said of windows, of which each item has so many."""
    if len(values) == len(counts):
        return values
    sums = np.add.reduceat(values, np.cumsum([0, *counts[:-1]]), axis=0)
    return (sums / np.array(counts)[:, None]).astype(values.dtype)


def mean_directions(
    vectors: Float[np.ndarray, "windows Z"], counts: Sequence[int]
) -> Float[np.ndarray, "B Z"]:
    """Returns the unit vectors of items, whose windows have these and of which each has so many."""
    if len(vectors) == len(counts):
        return vectors
    found = window_means(vectors, counts)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
