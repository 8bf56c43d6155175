"""The embedded world on disk: rendered once into the cache, in the layout of COCO captions."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unified_mm.files import without_interrupts
from unified_mm.world.language import (
    KINDS,
    Question,
    balanced,
    captions,
    describe,
    foil,
    questions,
)
from unified_mm.world.render import render
from unified_mm.world.scenes import ATTRIBUTES, SPLITS, Scene, WorldSpec, sample_scene

CHUNK = 64
QUESTIONS_A_SCENE = 2
FOILS_A_SCENE = 2
ABANDONED = 24 * 3600  # seconds
FOILED = ("val", "test_composition")


@dataclass(frozen=True)
class SceneText:
    """All that is written about one scene besides its image.

    Attributes:
      number: the scene's index in its split.
      identity: its image id.
      captions: true captions.
      foils: captions with a foil and its kind, each as JSON values.
      questions: with answers.
      scene: the scene graph.
    """

    number: int
    identity: int
    captions: tuple[str, ...]
    foils: tuple[dict[str, str], ...]
    questions: tuple[Question, ...]
    scene: dict[str, Any]


def ensure_world(
    spec: WorldSpec, cache: Path, *, processes: int | None = None, progress: bool = True
) -> Path:
    """Returns the folder of a world, rendered first if the cache does not hold it.

    Args:
      spec: decides every byte.
      cache: the folder that worlds are kept in.
      processes: processes that render; one for each core by default.
      progress: whether to show a progress bar on a terminal.

    Returns:
      A folder in the layout of COCO captions. It gets its name when it is complete, so one that
      exists is complete, whatever was killed before.

    Raises:
      FileNotFoundError: the folder has lost its annotations.
      RuntimeError: a process that renders could not begin, or was killed.
    """
    folder = cache / f"world-{_digest(spec)}"
    if folder.is_dir():
        _refuse_emptied(folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(cache)
    partial = cache / f".{folder.name}.{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        print(
            f"rendering the embedded world, once: {sum(map(spec.count, SPLITS)):,} scenes "
            f"into {folder}",
            flush=True,
        )
        _write_world(spec, partial, processes or len(os.sched_getaffinity(0)), progress)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same world first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _refuse_emptied(folder: Path) -> None:
    for split in SPLITS:
        captions = folder / "annotations" / f"captions_{split}.json"
        if not captions.is_file():
            raise FileNotFoundError(
                f"the embedded world in {folder} has lost {captions.relative_to(folder)}: delete "
                "that folder, and it is rendered again"
            )


def _clear_abandoned(cache: Path) -> None:
    """Removes what killed builds left, once it is older than any build can take."""
    for folder in cache.glob(".world-*"):
        try:
            old = time.time() - folder.stat().st_mtime > ABANDONED
        except FileNotFoundError:  # its builder has just finished
            continue
        if old:
            shutil.rmtree(folder, ignore_errors=True)


def _digest(spec: WorldSpec) -> str:
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:12]


def _write_world(spec: WorldSpec, folder: Path, processes: int, progress: bool) -> None:
    from tqdm import tqdm

    (folder / "annotations").mkdir()
    total = sum(map(spec.count, SPLITS))
    with tqdm(total=total, unit="scene", disable=None if progress else True) as bar:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
            told: list[SceneText] = []
            for part in _rendered(spec, split, folder / "images" / split, processes):
                told += part
                bar.update(len(part))
            _write_annotations(spec, split, folder / "annotations", told)


def _rendered(
    spec: WorldSpec, split: str, folder: Path, processes: int
) -> Iterator[list[SceneText]]:
    """Yields the texts of scenes in order, chunk by chunk, each scene rendered into `folder`."""
    count = spec.count(split)
    work = [
        (spec, split, start, min(start + CHUNK, count), str(folder))
        for start in range(0, count, CHUNK)
    ]
    if processes == 1 or len(work) <= 1:
        yield from map(_render_chunk, work)
        return
    # Spawned, for a process that runs jax has threads that a fork would break.
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawned, initializer=_end_with_parent)
    try:
        with without_interrupts():
            told = [pool.submit(_render_chunk, part) for part in work]
        for each in told:
            yield each.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that renders the world has ended by itself. If its error above is about "
            "__main__ or bootstrapping: each such process imports the script that was started, "
            "which must be a file, and do what it does under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Lets this process end when the one that started it was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _render_chunk(work: tuple[WorldSpec, str, int, int, str]) -> list[SceneText]:
    spec, split, start, stop, folder = work
    told = []
    for number in range(start, stop):
        scene = sample_scene(spec, split, number)
        picture = Image.fromarray(render(scene, spec.image_size, spec.supersample))
        picture.save(Path(folder) / f"{number:06d}.jpg", quality=95, subsampling=0)
        told.append(_tell(spec, split, number, scene))
    return told


def _tell(spec: WorldSpec, split: str, number: int, scene: Scene) -> SceneText:
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), number, 1])
    said = captions(scene, rng)
    foils: list[dict[str, str]] = []
    if split in FOILED:
        # Each kind in turn, so that all are equally frequent where scenes allow it.
        for kind in np.roll(KINDS, -number % len(KINDS)):
            for caption in said:
                wrong = foil(scene, caption, str(kind), rng)
                if wrong is not None:
                    foils.append(
                        {"caption": caption.text(), "foil": wrong.text(), "kind": str(kind)}
                    )
                    break
            if len(foils) == FOILS_A_SCENE:
                break
    asked = questions(scene, rng, compose=split == "test_composition")
    chosen = rng.permutation(len(asked))[:QUESTIONS_A_SCENE]
    return SceneText(
        number=number,
        identity=scene.id,
        captions=tuple(caption.text() for caption in said),
        foils=tuple(foils),
        questions=tuple(asked[i] for i in chosen),
        scene=scene_graph(scene),
    )


def scene_graph(scene: Scene) -> dict[str, Any]:
    """Returns a scene as plain JSON values: objects, places in the image, order, camera, light."""
    places = scene.places()
    return {
        "image_id": scene.id,
        "objects": [
            {
                **asdict(thing),
                "description": describe({name: getattr(thing, name) for name in ATTRIBUTES}),
                "image": [round(float(value), 4) for value in place],
            }
            for thing, place in zip(scene.objects, places, strict=True)
        ],
        "left_to_right": list(range(len(scene.objects))),
        "near_to_far": [int(i) for i in np.argsort(places[:, 2])],
        "camera": asdict(scene.camera),
        "light": list(scene.light),
    }


def _write_annotations(spec: WorldSpec, split: str, folder: Path, told: list[SceneText]) -> None:
    info = {
        "description": "unified_mm embedded world",
        "directional": True,  # captions name sides: pictures must not be mirrored
        "spec": asdict(spec),
    }
    texts = [(each.identity, text) for each in told for text in each.captions]
    _write(
        folder / f"captions_{split}.json",
        {
            "info": info,
            "images": [
                {
                    "id": each.identity,
                    "file_name": f"{split}/{each.number:06d}.jpg",
                    "width": spec.image_size,
                    "height": spec.image_size,
                }
                for each in told
            ],
            "annotations": [
                {"id": number, "image_id": image, "caption": text}
                for number, (image, text) in enumerate(texts)
            ],
        },
    )
    _write(folder / f"scenes_{split}.json", {"info": info, "scenes": [t.scene for t in told]})
    if split in FOILED:
        foils = [{"image_id": each.identity, **wrong} for each in told for wrong in each.foils]
        _write(folder / f"foils_{split}.json", foils)
    asked = balanced((each.identity, question) for each in told for question in each.questions)
    _write_questions(folder, split, info, asked)


def _write_questions(
    folder: Path, split: str, info: dict[str, Any], asked: list[tuple[int, Question]]
) -> None:
    """Writes questions and answers in VQA v2's layout; all ten annotators give the right answer."""
    head = {"info": info, "license": {}, "data_type": "unified_mm", "data_subtype": split}
    _write(
        folder / f"questions_{split}.json",
        {
            **head,
            "task_type": "Open-Ended",
            "questions": [
                {"image_id": image, "question": question.text, "question_id": number}
                for number, (image, question) in enumerate(asked)
            ],
        },
    )
    _write(
        folder / f"answers_{split}.json",
        {
            **head,
            "annotations": [
                {
                    "question_id": number,
                    "image_id": image,
                    "question_type": question.type,
                    "answer_type": _answer_type(question.answer),
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer_id": n, "answer": question.answer, "answer_confidence": "yes"}
                        for n in range(1, 11)
                    ],
                }
                for number, (image, question) in enumerate(asked)
            ],
        },
    )


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
