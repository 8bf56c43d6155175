"""unified_mm: how modalities should meet, compared in one codebase.

`unified_mm.load("runs/first")` gives a trained run's model.

The rooms, in the order of imports: a room imports what stands below it, never what stands above
it, and not its neighbours (those that begin with `&`), but for what is said.

    commands       what is run as `python -m unified_mm.NAME`: every other file beside this one
    cli            what commands share: recipes, flags, what is said and how a command ends
    benchmarks     speed: what a step, a request and a kernel take
    analysis       what a person looks at: reports, comparisons, maps of attention, probes
    training       losses become new states: setup, loop, step, phases, optimizers, start_from
    evaluation     a model and a split of data become scores
    & serving      a model answers over HTTP
    search         embeddings become an index, which finds neighbours
    inference      a loaded model and an input become texts, embeddings, a program to take away
    task           the modalities, model and objectives of a config, as one value
    & default_config   every field of a config, with its default
    objectives     embeddings and logits become losses, as sums and counts
    & pretrained   weights of other projects become ours, and ours theirs
    models         the fusions, and nothing else: early, gated cross-attention, late
    modalities     a record becomes arrays, and arrays tokens: one file a modality
    nn             what models are built of: layers, transformers, attention and its rules
    data           sources, manifests, the pipeline of batches; it imports `world`
    & world        scenes that are rendered, with their captions and questions
    & runs         the folder of a run: config, checkpoints, metrics
    parallel       meshes, shardings, processes
    & costs        what a compiled program takes: FLOPs, bytes, collectives
    config         a config that knows which of its fields were read
    registry       names in a config become classes
    files          reading and writing that is whole or not at all

In the shapes of arrays each letter has one meaning:

    B  examples of a batch        N  tokens                    T  tokens of a text
    Q  tokens that ask (queries)  K  tokens that are seen      P  patches of a picture
    D  width of the model         F  width of a feed-forward   Z  width of the shared space
    H  heads of queries           G  heads of keys             A  width of a head
    L  layers                     E  experts                   V  tokens of the vocabulary
    M  modalities                 I  items of an example       C  classes
    S  steps in time: frames, samples, or tokens that are written

Any other axis has a lower-case word: "height width 3".

From outside the package, these are for import: `unified_mm.load`, `config`, `default_config`,
`registry`, `task`, and what `modalities`, `objectives`, `nn` and `data` export.
"""

import os
import signal
import sys
from typing import Any

__all__ = ["load"]

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m unified_mm.NAME` imports for seconds before `cli.messages.end_with` takes over.
    def _interrupted(*_: Any) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, _interrupted)


def __getattr__(name: str) -> Any:
    # Late, so that importing a part of the package (the world's renderer, say) brings no jax.
    if name == "load":
        from unified_mm.inference.loaded import load

        return load
    raise AttributeError(f"module 'unified_mm' has no attribute {name!r}")
