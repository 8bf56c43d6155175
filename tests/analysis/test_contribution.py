"""What a modality contributes, on models whose answers are known."""

import numpy as np
import pytest
import tiny

from unified_mm.analysis.contribution import contribution, taken_away
from unified_mm.data.records import Record, Text
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor

ORDER = [0, 1, 3, 2, 5, 4]  # in which moving by half gives few a picture of their own colour


@pytest.fixture(scope="module")
def task():
    return tiny.task(objectives__matching__weight=0.0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tiny.write_coco(tmp_path_factory.mktemp("data") / "coco", train=6, val=1)
    colours = list(tiny.COLOURS)
    return [
        Record(
            i, {"image": str(folder / f"images/train/{i}.jpg")}, (Text("", colours[i % 3]),), True
        )
        for i in range(6)
    ]


class Colourist(Predictor):
    """Names the strongest colour that it sees; a text of another one is 2 nats less likely."""

    def log_likelihood(self, batch):
        seen = self._names(batch)
        told = [self.task.tokenizer.decode(row) for row in batch["text"]["ids"]]
        nats = [-1.0 if a == b else -3.0 for a, b in zip(seen, told, strict=True)]
        return np.stack([np.array(nats) * 4, np.full(len(nats), 4.0)], axis=1)

    def write(self, batch, prompts, decoding=None):
        return self._names(batch)

    def _names(self, batch):
        image = batch["image"]
        means = np.asarray(image["pixels"], np.float64)[:, 6:8, 6:8].mean((1, 2))
        names = np.array(list(tiny.COLOURS))[means.argmax(1)]
        there = image["present"] & (means.max(1) > 0)
        return [str(n) if t else "nothing" for n, t in zip(names, there)]


def test_each_way_takes_the_image_and_leaves_the_text(task, records):
    ways = taken_away(task.modalities, "image", records)
    rows = {
        way: [preparers["image"].prepare(record, None) for record in records]
        for way, preparers in ways.items()
    }
    assert list(rows) == ["whole", "dropped", "blanked", "shuffled"]
    assert not any(row["present"] for row in rows["dropped"])
    for way in ("whole", "blanked", "shuffled"):
        assert all(row["present"] for row in rows[way])
    for way in ("dropped", "blanked"):
        assert not any(row["pixels"].any() for row in rows[way])
    for i in range(6):
        other = rows["whole"][(i + 3) % 6]["pixels"]
        np.testing.assert_array_equal(rows["shuffled"][i]["pixels"], other)
    for preparers in ways.values():
        assert preparers["text"] is task.modalities["text"]
        assert not preparers["image"].absent()["present"]
    absent = Record(9, {}, (Text("", "red"),), True)
    assert not ways["blanked"]["image"].prepare(absent, None)["present"]


def test_losses_and_scores_are_those_of_the_model(task, records):
    ordered = [records[i] for i in ORDER]
    found = contribution(Colourist(task, None, one_device_mesh()), ordered, "image", batch_size=4)
    assert found["whole"].nats.mean == 1 and found["whole"].nats_lost.mean == 0
    assert found["whole"].cider_d.mean > 0
    for way in ("dropped", "blanked"):
        assert found[way].nats.mean == 3 and found[way].nats_lost.mean == 2
        assert found[way].nats_lost.low == found[way].nats_lost.high == 2
        assert found[way].cider_d.mean == 0
        assert found[way].cider_d_lost.mean == found["whole"].cider_d.mean
    moved = ORDER[3:] + ORDER[:3]
    lost = np.mean([2.0 * (a % 3 != b % 3) for a, b in zip(ORDER, moved)])
    assert found["shuffled"].nats_lost.mean == pytest.approx(lost) and lost > 0


def test_a_real_model_is_asked_the_same_way(records):
    model = tiny.loaded()
    ordered = [records[i] for i in ORDER]
    found = contribution(model.predictor, ordered, "image", batch_size=4)
    for each in found.values():
        assert np.isfinite(each.nats.mean) and each.nats.low <= each.nats.mean <= each.nats.high
    assert len({each.nats.mean for each in found.values()}) == 4


def test_models_that_write_nothing_are_refused(task, records):
    late = tiny.task(
        model__fusion="late", objectives__captioning__weight=0.0, objectives__matching__weight=0.0
    )
    mesh = one_device_mesh()
    with pytest.raises(ValueError, match="writes no text"):
        contribution(Predictor(late, None, mesh), records, "image", batch_size=4)
    with pytest.raises(ValueError, match="modality 'sound': this model reads text beside image"):
        contribution(Predictor(task, None, mesh), records, "sound", batch_size=4)
    with pytest.raises(ValueError, match="two images"):
        contribution(Predictor(task, None, mesh), records[:1], "image", batch_size=4)
