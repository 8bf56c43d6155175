"""A search index made, searched, stopped, damaged and asked by the wrong."""

import json
import os
import shutil
import sys

import jax
import numpy as np
import processes
import pytest
import tiny
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.images import decode
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.runs.seal import write_seal
from unified_mm.search import index_writer, search_index
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.search_index import SearchIndex, mixed


@pytest.fixture(scope="module")
def model():
    task = tiny.task()
    config = Config(tiny.config_dict().to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 7)


def changed(model, params=None, step=7, **fields):
    """The model with other parameters, of another step or with other fields in its config."""
    config = Config(tiny.config_dict(**fields).to_dict())
    params = model.params if params is None else params
    return LoadedModel(model.task, params, one_device_mesh(), config, step)


def one_parameter_changed(model):
    leaves, structure = jax.tree.flatten(model.params)
    leaves[3] = leaves[3].at[..., 0].add(1e-3)
    return changed(model, jax.tree.unflatten(structure, leaves))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Coloured squares with two captions each; one of them is no picture."""
    folder = tiny.write_coco(tmp_path_factory.mktemp("data") / "coco", train=6, val=13)
    (folder / "images" / "val" / "4.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def made(model, coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / "val"
    write_index(model, read_items(coco, ["val"]), out, print, shard=4)
    return out


@pytest.fixture(scope="module")
def index(made):
    return SearchIndex.open(made)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_and_captions_are_found_by_their_cosines(model, index, coco):
    names = [f"images/val/{number}.jpg" for number in range(13) if number != 4]
    texts = [
        text
        for entry in json.loads((coco / "annotations/captions_val.json").read_text())["annotations"]
        if entry["image_id"] != 4
        for text in [entry["caption"]]
    ]
    assert index.rows.names == names and index.rows.texts == texts
    assert index.rows.owners == [number // 2 for number in range(24)]
    images = model.embed_images([coco / name for name in names])
    embedded = model.embed_texts(texts)
    query = model.embed_texts(["a blue square"])[0]
    for kind, vectors, named in (("image", images, names), ("text", embedded, texts)):
        scores = vectors @ query
        hits = index.search(3 * query, 5, kind)  # its length does not matter
        np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-scores)[:5], atol=1e-5)
        for hit in hits:
            assert named[hit.number] == hit.name
            assert scores[hit.number] == pytest.approx(hit.score, abs=1e-5)
            assert hit.picture == (hit.number if kind == "image" else hit.number // 2)
        np.testing.assert_allclose(index.vector(3, kind), vectors[3], atol=1e-5)
    assert index.search(images[7], 1)[0].number == 7
    assert len(index.search(query, 1000)) == 12 and len(index.search(query, 1000, "text")) == 24


def test_a_folder_is_read_with_all_below_it(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    red = Image.new("RGB", (20, 30), "red")
    bad = os.fsdecode(b"not-\xff-text.png")
    for name in ("b.png", "a.webp", "deep/er/C.JPG", ".hidden/d.png", bad):
        red.save(folder / name, format="PNG")
    (folder / "deep" / "empty.jpg").touch()
    (folder / "deep" / "half.jpg").write_bytes((folder / "b.png").read_bytes()[:40])
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "notes.txt").write_text("no picture")
    write_index(model, read_items(folder), tmp_path / "index", print)
    said = capsys.readouterr().out
    assert "left out: 1 x the file is empty (deep/empty.jpg)" in said
    assert "left out: 1 x missing image (gone.jpg)" in said
    index = SearchIndex.open(tmp_path / "index")
    assert sorted(index.rows.names) == sorted(["a.webp", "b.png", "deep/er/C.JPG", bad])
    assert len(index.header["problems"]) == 3 and not index.header["splits"]
    number = index.rows.names.index(bad)
    assert index.read_picture(number) == (folder / bad).read_bytes()
    with pytest.raises(ValueError, match="holds no 'text', but image"):
        index.search(index.vector(0), 1, "text")


@pytest.mark.parametrize(
    ("make", "splits", "error", "message"),
    [
        (lambda folder: None, (), FileNotFoundError, "is no folder"),
        (lambda folder: folder.mkdir(), (), FileNotFoundError, "holds no image"),
        (lambda folder: folder.mkdir(), ("val",), ValueError, "no splits to choose from"),
        (lambda folder: tiny.write_coco(folder, 1, 1), ("test",), ValueError, "no split 'test'"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, make, splits, error, message):
    make(tmp_path / "folder")
    with pytest.raises(error, match=message):
        read_items(tmp_path / "folder", splits)


def test_a_folder_without_a_readable_picture_is_refused(model, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        write_index(model, read_items(tmp_path / "pictures"), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stopped(model, coco, tmp_path, monkeypatch):
    """Where an index was to come, stopped after two of its four shards."""
    calls = iter(range(2))

    def embed(*args):
        next(calls)
        return index_shard(*args)

    index_shard = index_writer.embed_shard
    with monkeypatch.context() as patch:
        patch.setattr(index_writer, "embed_shard", embed)
        with pytest.raises((StopIteration, RuntimeError)):
            write_index(model, read_items(coco, ["val"]), tmp_path / "out", print, shard=4)
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def go_on(model, coco, out, monkeypatch, **changes):
    """Numbers of the pictures that are embedded when it goes on."""
    embedded = []
    index_shard = index_writer.embed_shard

    def embed(model, items, numbers, *rest):
        embedded.extend(numbers)
        return index_shard(model, items, numbers, *rest)

    monkeypatch.setattr(index_writer, "embed_shard", embed)
    write_index(model, read_items(coco, ["val"]), out, print, **{"shard": 4, **changes})
    return embedded


def test_what_was_stopped_goes_on_to_the_same_bytes(
    model, coco, made, stopped, monkeypatch, capsys
):
    assert go_on(model, coco, stopped, monkeypatch) == list(range(8, 13))
    assert "2 of 4 shards are whole" in capsys.readouterr().out
    assert contents(stopped) == contents(made)
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]
    assert go_on(model, coco, stopped, monkeypatch) == []
    assert "is made already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_embedded_again(model, coco, made, stopped, monkeypatch, capsys, damage):
    path = stopped.parent / ".out.indexing" / "shard-0000001.npz"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-30], "empty": b""}[damage])
    assert go_on(model, coco, stopped, monkeypatch) == list(range(4, 13))
    assert "damaged, embedded again: shard-0000001.npz" in capsys.readouterr().out
    assert contents(stopped) == contents(made)


def test_what_changed_meanwhile_is_refused(model, coco, stopped, tmp_path, monkeypatch):
    def refused(what, model=model, folder=coco, **changes):
        with pytest.raises(ValueError, match=f"is of another {what}.*: delete it"):
            go_on(model, folder, stopped, monkeypatch, **changes)

    with pytest.raises(FileNotFoundError, match="no search index .*; it was begun, and the comm"):
        SearchIndex.open(stopped)
    refused("run or checkpoint", model=changed(model, step=8))
    refused("run or checkpoint", model=one_parameter_changed(model))
    refused("--shard", shard=5)
    refused("--exact_up_to", exact_up_to=0)
    refused("folder", folder=shutil.copytree(coco, tmp_path / "coco"))
    before = (coco / "images" / "val" / "0.jpg").stat()
    try:
        os.utime(coco / "images" / "val" / "0.jpg", ns=(0, 0))
        refused("state of the pictures")
    finally:
        os.utime(coco / "images" / "val" / "0.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert go_on(model, coco, stopped, monkeypatch) == list(range(8, 13))


def test_what_is_there_is_not_overwritten(model, coco, made, tmp_path):
    before = contents(made)
    pictures = read_items(coco, ["val"])
    with pytest.raises(ValueError, match="another run or checkpoint: name a new one"):
        write_index(changed(model, step=8), pictures, made, print, shard=4)
    assert contents(made) == before
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no index"):
        write_index(model, pictures, tmp_path / "mine", print)
    assert (tmp_path / "mine").read_text() == "mine"


def test_one_process_at_a_time(model, coco, stopped):
    lock = stopped.parent / ".out.indexing" / ".lock"
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX);"
    hold += "print('held', flush=True); time.sleep(100)"
    with processes.started(dict(os.environ), sys.executable, "-c", hold, str(lock)) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"process \d+ is at work"):
            write_index(model, read_items(coco, ["val"]), stopped, print, shard=4)


@pytest.mark.parametrize("name", ["image.npy", "text.npy", "rows.json", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_noticed(copy, name, damage):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 4
    (copy / name).write_bytes(content if damage == "flip" else content[:-1])
    if damage == "gone":
        (copy / name).unlink()
    with pytest.raises(ValueError, match=f"is damaged: {name} is not as it was written; make it"):
        SearchIndex.open(copy)


def test_a_damaged_graph_and_a_missing_seal_are_noticed(model, coco, copy, tmp_path):
    out = tmp_path / "graph"
    write_index(model, read_items(coco, ["train"]), out, print, exact_up_to=2)
    assert SearchIndex.open(out).nearest["text"].graph is not None
    graph = out / "image.usearch"
    graph.write_bytes(graph.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged: image.usearch"):
        SearchIndex.open(out)
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="is damaged: SHA256SUMS"):
        SearchIndex.open(copy)
    with pytest.raises(FileNotFoundError, match="is no search index"):
        SearchIndex.open(tmp_path / "nowhere")


def test_only_the_model_that_made_it_is_taken(model, index):
    index.check_model(model)
    index.check_model(changed(model, train__steps=100))
    others = (changed(model, step=8), one_parameter_changed(model))
    for other in (*others, changed(model, data__image_size=8)):
        with pytest.raises(
            ValueError, match="made with another model: step 7, parameters .*; this"
        ):
            index.check_model(other)


def test_pictures_are_shown_by_number_alone(index, coco, copy, tmp_path):
    for number in (0, np.int64(11)):
        content = index.read_picture(number)
        assert content == (coco / index.rows.names[number]).read_bytes()
        assert decode(content).shape == (20, 24, 3)
    for wrong in (-1, 12, True, "0", "../../etc/passwd", 1.0, None):
        with pytest.raises(IndexError, match="numbers go from 0 to 11"):
            index.read_picture(wrong)
    moved = shutil.copytree(coco, tmp_path / "moved")
    there = SearchIndex.open(copy, pictures=moved)
    (moved / index.rows.names[1]).unlink()
    (moved / index.rows.names[2]).write_bytes(b"something else")
    assert there.read_picture(0) == index.read_picture(0)
    for number in (1, 2):
        with pytest.raises(FileNotFoundError) as error:
            there.read_picture(number)
        assert str(error.value) == f"picture {number} is not there as it was indexed"


def test_mixed_queries_lie_between(index):
    a, b = index.vector(0), index.vector(1)
    expected = 0.3 * a.astype(np.float64) + 0.7 * b
    np.testing.assert_allclose(
        mixed(np.stack([a, b]), [0.3, 0.7]), expected / np.linalg.norm(expected), atol=1e-6
    )
    np.testing.assert_allclose(mixed(np.stack([a, b]), [5.0, 0.0]), a, atol=1e-6)
    with pytest.raises(ValueError, match="2 vectors and 1 weights"):
        mixed(np.stack([a, b]), [1.0])
    with pytest.raises(ValueError, match="no direction"):
        mixed(np.stack([a, -a]), [1.0, 1.0])


@pytest.mark.parametrize(
    ("query", "count", "message"),
    [
        (np.zeros(8, np.float32), 1, "no direction"),
        (np.full(8, np.nan, np.float32), 1, "no direction"),
        (np.ones(7, np.float32), 1, r"has shape \[8\] here; got \[7\]"),
        (np.ones(8, np.float32), 0, "count=0"),
    ],
)
def test_wrong_queries_are_refused(index, query, count, message):
    with pytest.raises(ValueError, match=message):
        index.search(query, count)


def test_a_model_without_contrast_is_refused(coco, tmp_path):
    task = tiny.task(objectives__contrastive__weight=0.0, objectives__matching__weight=0.0)
    model = LoadedModel(task, {}, one_device_mesh(), Config({}), 7)
    with pytest.raises(ValueError, match="this run cannot search: it was trained on captioning"):
        write_index(model, read_items(coco), tmp_path / "out", print)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(coco, tmp_path):
    """A folder of six pictures, all of them from before an index is made."""
    folder = tmp_path / "pictures"
    shutil.copytree(coco / "images" / "train", folder)
    for path in folder.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**10))
    return folder


def change(folder):
    """Changes one picture, removes another and adds two."""
    shutil.copy(folder / "2.jpg", folder / "0.jpg")
    (folder / "1.jpg").unlink()
    Image.new("RGB", (20, 20), "white").save(folder / "new.png")
    (folder / "below").mkdir()
    Image.new("RGB", (20, 20), "black").save(folder / "below" / "new.png")


def embedded_files(monkeypatch):
    """The names of the files that are embedded from here on."""
    seen = []
    read_ahead = LoadedModel.read_ahead

    def noting(self, parts, of="image"):
        seen.extend(sorted(str(path.name) for part in parts for path in part))
        return read_ahead(self, parts, of)

    monkeypatch.setattr(LoadedModel, "read_ahead", noting)
    return seen


def same_but_for_the_order(one, other):
    found = [dict(zip(i.rows.names, i.nearest["image"].vectors, strict=True)) for i in (one, other)]
    assert found[0].keys() == found[1].keys()
    for name, vector in found[0].items():
        np.testing.assert_allclose(vector, found[1][name], atol=1e-6)


def no_times(index):
    """Makes an index one of an earlier version, which kept no times."""
    header = json.loads((index / "index.json").read_text())
    del header["times"]
    (index / "index.json").write_text(json.dumps(header))
    write_seal(index)


@pytest.mark.parametrize("earlier", [False, True])
def test_an_index_follows_its_folder(model, folder, tmp_path, monkeypatch, capsys, earlier):
    out = tmp_path / "index"
    write_index(model, read_items(folder), out, print, shard=2)
    if earlier:
        no_times(out)
    change(folder)
    seen = embedded_files(monkeypatch)
    write_index(model, read_items(folder), out, print, shard=2)
    assert seen == ["0.jpg", "new.png", "new.png"]
    assert "4 pictures stay, 3 are new or changed, 2 are changed or gone" in capsys.readouterr().out
    fresh = tmp_path / "fresh"
    write_index(model, read_items(folder), fresh, print, shard=2)
    same_but_for_the_order(SearchIndex.open(out), SearchIndex.open(fresh))
    seen.clear()
    (folder / "new.png").unlink()
    write_index(model, read_items(folder), out, print, shard=2)
    assert seen == [] and "new.png" not in SearchIndex.open(out).rows.names
    assert "made already" not in capsys.readouterr().out
    write_index(model, read_items(folder), out, print, shard=2)
    assert "made already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "index", "pictures"]


def test_captions_follow_their_pictures(model, coco, tmp_path, monkeypatch):
    data = shutil.copytree(coco, tmp_path / "data")
    out = tmp_path / "index"
    write_index(model, read_items(data, ["train"]), out, print, shard=4)
    file = data / "annotations" / "captions_train.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["caption"] = "a white square"
    file.write_text(json.dumps(content))
    seen = embedded_files(monkeypatch)
    write_index(model, read_items(data, ["train"]), out, print, shard=4)
    index = SearchIndex.open(out)
    assert seen == ["1.jpg"] and len(index.rows.texts) == 12
    wanted = model.embed_texts(index.rows.texts)
    np.testing.assert_allclose(index.nearest["text"].vectors, wanted, atol=1e-6)
    assert [index.rows.names[n] for n in index.rows.owners][-2:] == ["images/train/1.jpg"] * 2


def test_killed_an_index_is_the_old_or_the_new_one(model, folder, tmp_path, monkeypatch):
    out = tmp_path / "index"
    write_index(model, read_items(folder), out, print, shard=2)
    before = contents(out)
    change(folder)

    class Killed(BaseException):
        pass

    rename, names = os.rename, []

    def killing(source, target):
        if len(names) == at:
            raise Killed
        names.append(target)
        rename(source, target)

    for at in (0, 1):
        names.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(index_writer.os, "rename", killing)
            write_index(model, read_items(folder), out, print, shard=2)
        assert len(SearchIndex.open(out).rows.names) == 6
        assert at == 1 or contents(out) == before
    seen = embedded_files(monkeypatch)
    write_index(model, read_items(folder), out, print, shard=2)
    assert seen == []  # what was embedded before it was killed is taken
    assert len(SearchIndex.open(out).rows.names) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "pictures"]


@pytest.mark.parametrize("when", ["index.json", "rows.json"])
def test_an_index_that_is_replaced_while_it_is_opened_is_its_successor(
    when, copy, tmp_path, monkeypatch
):
    """As `_finish` does: two renames, and then the old one goes."""
    later = shutil.copytree(copy, tmp_path / "later")
    name = copy / "index.json"
    header = json.loads((later / "index.json").read_text()) | {"folder": "/of/the/successor"}
    (later / "index.json").write_text(json.dumps(header))
    (later / "SHA256SUMS").unlink()
    write_seal(later)
    read, swapped = search_index.read_json, []

    def swapping(path):
        if not swapped and path.name == when:
            swapped.append(path)
            os.rename(copy, search_index.replaced_folder(copy))
            shutil.rmtree(search_index.replaced_folder(copy))
            os.rename(later, copy)
        return read(path)

    monkeypatch.setattr(search_index, "read_json", swapping)
    assert str(SearchIndex.open(copy).pictures) == "/of/the/successor"
    assert swapped and name.is_file()


def test_an_index_between_its_two_names_is_the_old_one_and_then_the_new_one(
    copy, tmp_path, monkeypatch
):
    later = shutil.copytree(copy, tmp_path / "later")
    replaced = search_index.replaced_folder(copy)
    os.rename(copy, replaced)
    assert SearchIndex.open(copy).path == replaced
    read, swapped = search_index.read_json, []

    def swapping(path):
        if not swapped:
            swapped.append(path)
            os.rename(later, copy)
            shutil.rmtree(replaced)
        return read(path)

    monkeypatch.setattr(search_index, "read_json", swapping)
    assert SearchIndex.open(copy).path == copy and swapped
