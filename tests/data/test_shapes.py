"""Files of points and of meshes are read by what they hold, and what is none is named."""

import io
import json
import struct

import numpy as np
import pytest

from unified_mm.data import shapes
from unified_mm.data.layouts import LAYOUTS, Folder
from unified_mm.data.manifest import build_manifest, summary
from unified_mm.data.sources import given_folder
from unified_mm.default_config import default_config

BOX = np.array(
    [[x, y, z] for x in (0.0, 1.0) for y in (0.0, 2.0) for z in (0.0, 4.0)]
)  # of the area 28
SIDES = ["0 1 3 2", "4 6 7 5", "0 4 5 1", "2 3 7 6", "0 2 6 4", "1 5 7 3"]


def lines_of(points):
    return [" ".join(f"{x:g}" for x in point) for point in points]


def off(points=BOX, sides=SIDES, head="OFF\n"):
    rows = [f"{len(points)} {len(sides)} 0", *lines_of(points), *(f"4 {side}" for side in sides)]
    return (head + "\n".join(rows) + "\n").encode()


def ply(points=BOX, sides=SIDES, colours=None):
    head = ["ply", "format ascii 1.0", "comment made", f"element vertex {len(points)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    rows = lines_of(points)
    if colours is not None:
        head += [f"property uchar {name}" for name in ("red", "green", "blue")]
        rows = [f"{row} {' '.join(map(str, c))}" for row, c in zip(rows, colours, strict=True)]
    if sides:
        head += [f"element face {len(sides)}", "property list uchar int vertex_indices"]
    return "\n".join([*head, "end_header", *rows, *(f"4 {s}" for s in sides), ""]).encode()


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(values):
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def area(shape):
    one, two, three = (shape.points[shape.faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(two - one, three - one), axis=1).sum() / 2


@pytest.mark.parametrize(
    "content",
    [off(), off(head="OFF"), off(head="# a box\nOFF\n# sizes\n"), ply(), npz(
        vertices=BOX, faces=np.array([[0, 1, 3], [0, 3, 2]]))],
    ids=["off", "off of ModelNet", "off with comments", "ply", "npz"],
)  # fmt: skip
def test_meshes_are_read(content):
    shape = shapes.read(content)
    np.testing.assert_array_equal(shape.points, BOX)
    assert area(shape) == pytest.approx(28 if len(shape.faces) == 12 else 8)
    assert shape.conversion == "" and (shape.colours == 0.5).all()
    drawn = shapes.sample(shape, 4000, np.random.default_rng(0))
    assert drawn.shape == (4000, 6) and drawn.dtype == np.float32
    on_a_side = ((drawn[:, :3] == 0) | (drawn[:, :3] == BOX.max(0))).any(1)
    assert np.isclose(on_a_side, True).mean() > 0.99
    if len(shape.faces) == 12:  # the floor is 2 of 28, a wall 8 of 28
        assert np.isclose(drawn[:, 2], 0, atol=1e-6).mean() == pytest.approx(2 / 28, abs=0.02)
        assert np.isclose(drawn[:, 0], 0, atol=1e-6).mean() == pytest.approx(8 / 28, abs=0.03)
    again = shapes.sample(shape, 4000, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, again)


def test_clouds_are_read_with_their_colours():
    rng = np.random.default_rng(0)
    points, bytes_ = rng.normal(size=(9, 3)), rng.integers(0, 256, (9, 3))
    for content in (
        npy(np.concatenate([points, bytes_ / 255], axis=1)),
        npy(np.concatenate([points, bytes_], axis=1)),
        npz(xyz=points, rgb=bytes_.astype(np.uint8)),
        npz(points=np.concatenate([points, bytes_], axis=1)),
        npz(xyz=points, rgb=(bytes_ * 257).astype(np.uint16)),
        ply(points, [], bytes_),
    ):
        shape = shapes.read(content)
        np.testing.assert_allclose(shape.points, points, atol=1e-4)
        np.testing.assert_allclose(shape.colours, bytes_ / 255, atol=1e-6)
        assert not len(shape.faces) and shape.conversion == ""
        whole = shapes.sample(shape, 20, np.random.default_rng(0))
        np.testing.assert_allclose(whole[:, :3], points, atol=1e-4)
        # Of more than are asked for, some are taken, whatever the order in the file.
        part = shapes.sample(shape, 5, np.random.default_rng(1))
        order = rng.permutation(9)
        mixed = shapes.Shape(shape.points[order], shape.faces, shape.colours[order])
        np.testing.assert_array_equal(part, shapes.sample(mixed, 5, np.random.default_rng(1)))
    assert len(shapes.read(npy(points.astype(np.float16))).points) == 9
    unknown = np.concatenate([points, bytes_], axis=1)
    unknown[0, 3] = np.nan
    np.testing.assert_allclose(shapes.read(npy(unknown)).colours, bytes_[1:] / 255, atol=1e-6)


@pytest.mark.parametrize("kind", ["obj", "glb", "ply"])
def test_what_trimesh_reads(kind):
    trimesh = pytest.importorskip("trimesh", reason="LEFT OUT: trimesh is not installed")
    box = trimesh.creation.box((1, 2, 4))
    box.visual.vertex_colors = np.tile([255, 0, 51, 255], (8, 1))
    content = box.export(file_type=kind)
    shape = shapes.read(content.encode() if isinstance(content, str) else content)
    assert area(shape) == pytest.approx(28) and shape.conversion == ""
    np.testing.assert_allclose(shape.colours, np.tile([1, 0, 0.2], (len(shape.points), 1)), 1e-6)
    scene = trimesh.Scene()
    scene.add_geometry(box)
    moved = trimesh.transformations.translation_matrix([10, 0, 0])
    scene.add_geometry(trimesh.PointCloud(BOX), transform=moved)
    if kind == "glb":
        both = shapes.read(scene.export(file_type=kind))
        assert len(both.points) == 16 and both.points.max(0)[0] == 11
        assert area(both) == pytest.approx(28)


def test_meshes_without_a_surface_are_converted_and_said():
    flat = [f"{i} {i} {i} {i}" for i in range(4)]
    for content, said in (
        (off(sides=[]), "no faces: its points are taken"),
        (off(sides=flat), "faces without area: its points are taken"),
        (off(np.where(BOX == 4.0, np.nan, BOX)), "points that are not finite left out"),
    ):
        shape = shapes.read(content)
        assert said in shape.conversion
        drawn = shapes.sample(shape, 8, np.random.default_rng(0))
        assert np.isfinite(drawn).all() and len(drawn) >= 4
    pytest.importorskip("trimesh", reason="LEFT OUT: trimesh is not installed")
    rows = [f"v {line}" for line in lines_of(BOX)]
    shape = shapes.read("\n".join(rows).encode())
    assert shape.conversion == "no faces: its points are taken" and len(shape.points) == 8


def bomb(accessors, nodes):
    """A glb of a few bytes that tells of a lot."""
    scene = {"asset": {"version": "2.0"}, "accessors": accessors, "nodes": nodes}
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    return b"glTF" + struct.pack("<III4s", 2, 20 + len(text), len(text), b"JSON") + text


def header_of(count):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<f4", "fortran_order": False, "shape": (count, 3)}
    )
    return out.getvalue()


BAD = {
    "empty.npy": (b"", "empty"),
    "text.obj": (b"no shape", "no shape that can be read"),
    "cut.off": (off()[:-60], "cut short"),
    "cut.ply": (ply()[:-60], "cut short"),
    "few.npy": (npy(np.eye(3)), "3 points, and 4 are the fewest"),
    "nan.npy": (npy(np.full((9, 3), np.nan)), "0 points, and 4 are the fewest"),
    "flat.npy": (npy(np.zeros((9, 2))), "not [points, 3]"),
    "deep.npy": (npy(np.zeros((2, 9, 3))), "not numbers [points, 3]"),
    "other.npz": (npz(weights=BOX), "an npz of weights, without points"),
    "colours.npz": (npz(points=BOX, rgb=BOX[:3]), "8 points, but colours of [3, 3]"),
    "faces.off": (off(sides=["0 1 2 8"]), "faces of points that are not there"),
    "large.npy": (header_of(10**9), "1,000,000,000 points or faces, and 2,000,000 are the most"),
    "large.off": (b"OFF\n999999999 0 0\n", "are the most"),
    "large.ply": (ply().replace(b"vertex 8", b"vertex 3000000"), "are the most"),
    "large.glb": (bomb([{"count": 10**9}], []), "are the most"),
    "loop.glb": (bomb([], [{"children": [1, 1]}, {}]), "a node with two parents"),
    "broken.npz": (npz(points=BOX)[:100], "no shape that can be read"),
    "cut.glb": (b"glTF\x02\0\0\0", "no shape that can be read"),
    "list.glb": (b"glTF" + struct.pack("<III4s", 2, 22, 2, b"JSON") + b"[]", "that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name, tmp_path):
    content, what = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(shapes.ShapeError, match=name) as error:
        shapes.check(tmp_path / name)
    assert what in error.value.what and name not in error.value.what
    with pytest.raises(shapes.ShapeError) as error:
        shapes.read(content)
    assert what in str(error.value)


def manifest_of(folder, cache, **changes):
    data = default_config().data
    data.dir, data.cache_dir = str(folder), str(cache)
    data.update(changes)
    source = given_folder(data)
    return source, {name: source.manifest(name) for name in source.splits()}


def write_classes(folder, names=("night_stand", "toilet")):
    """Laid out as ModelNet: a folder a class, with `train` and `test` in it."""
    for number, kind in enumerate(names):
        for split, count in (("train", 4), ("test", 2)):
            (folder / kind / split).mkdir(parents=True)
            for each in range(count):
                file = folder / kind / split / f"{kind}_{each:04}.off"
                file.write_bytes(off(BOX * (number + 1 + each)))
    return folder


def test_modelnet_is_found_and_its_bad_files_counted(tmp_path):
    folder = write_classes(tmp_path / "shapes")
    for name, (content, _) in list(BAD.items())[:4]:
        (folder / "toilet" / "train" / name).write_bytes(content)
    (folder / "toilet" / "train" / "points.off").write_bytes(off(sides=[]))
    source, found = manifest_of(folder, tmp_path / "cache", max_bad_share=0.5)
    assert source.name == "shapes" and set(found) == {"train", "val", "test"}
    train, test = found["train"].records + found["val"].records, found["test"].records
    assert len(train) == 9 and len(test) == 4 and found["val"].records
    record = next(each for each in train if each.id == "night_stand/train/night_stand_0003.off")
    assert record.labels == ("night stand",) and record.texts[0].target == "night stand"
    assert record.parts == {"points": str(folder / record.id)}
    told = " ".join(map(summary, found.values()))
    for each in ("4 points and", "empty", "cut short", "converted: 1 x no faces"):
        assert each in told
    _, same = manifest_of(folder, tmp_path / "cache", max_bad_share=0.5)
    assert same == found  # of the cache


def test_pictures_beside_meshes_are_what_they_were(tmp_path):
    """A folder of pictures a class stays one where meshes or arrays lie beside them."""
    from PIL import Image

    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(8):
            Image.new("RGB", (8, 8)).save(tmp_path / kind / f"{number}.png")
            np.save(tmp_path / kind / f"{number}.npy", BOX)
    source, found = manifest_of(tmp_path, tmp_path.parent / "cache", val_share=0.5)
    assert source.name == "classes" and "data.source=shapes" in source.described
    assert all(set(each.parts) == {"image"} for m in found.values() for each in m.records)
    source, found = manifest_of(tmp_path, tmp_path.parent / "cache", source="shapes", val_share=0.5)
    assert all(set(each.parts) == {"points"} for m in found.values() for each in m.records)


def test_lists_name_shapes_beside_texts_and_classes(tmp_path):
    for name in "abcd":
        np.save(tmp_path / f"{name}.npy", BOX)
    rows = [("path", "title", "category"), ("a.npy", "a red chair", "chair"), ("b.npy", "x", "y")]
    (tmp_path / "meta.csv").write_text("\n".join(map(",".join, rows)))
    table = build_manifest(LAYOUTS["table"][1](Folder(tmp_path))["all"](), tmp_path, "all")
    assert [r.parts for r in table.records] == [
        {"points": str(tmp_path / f"{n}.npy")} for n in "ab"
    ]
    assert (
        table.records[0].labels == ("chair",) and table.records[0].texts[0].target == "a red chair"
    )
    lines = [
        {"id": 1, "text": "A chair.", "points": "c.npy"},
        {"id": 2, "text": "A table.", "scan": "d.npy", "points": None},
        {"id": 3, "text": "Nothing."},
    ]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = LAYOUTS["imagefolder"][1]
    one = build_manifest(read(Folder(tmp_path))["all"](), tmp_path, "all")
    assert [sorted(r.parts) for r in one.records] == [["points"], [], []]
    both = build_manifest(read(Folder(tmp_path, points="points,scan"))["all"](), tmp_path, "all")
    assert [sorted(r.parts) for r in both.records] == [["points"], ["scan"], []]


def test_coco_names_shapes_and_sounds_beside_pictures(tmp_path):
    (tmp_path / "annotations").mkdir()
    np.save(tmp_path / "chair.npy", BOX)
    images = [{"id": 1, "points": "chair.npy"}, {"id": 2, "points": "gone.npy"}, {"id": 3}]
    captions = [{"id": i, "image_id": i, "caption": f"thing {i}"} for i in (1, 2, 3)]
    content = {"images": images, "annotations": captions}
    (tmp_path / "annotations/captions_train.json").write_text(json.dumps(content))
    source, found = manifest_of(tmp_path, tmp_path.parent / "cache", max_bad_share=0.5)
    records = found["train"].records
    assert source.name == "coco" and [r.id for r in records] == [1, 3]
    assert records[0].parts == {"points": str(tmp_path / "chair.npy")} and not records[1].parts
    assert "missing points" in summary(found["train"])
    images[0]["points"] = "../../chair.npy"
    (tmp_path / "annotations/captions_train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"points.*leads out of the data folder"):
        manifest_of(tmp_path, tmp_path.parent / "cache")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    """No file is to blame: none counts as bad. What NumPy reads needs no extra."""

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    assert len(shapes.read(off()).faces) == 12 and len(shapes.read(ply()).faces) == 12
    with pytest.raises(ValueError, match=r"trimesh.*unified_mm\[points\]") as error:
        shapes.read(b"v 0 0 0\nf 1 1 1\n")
    assert not isinstance(error.value, shapes.ShapeError)
