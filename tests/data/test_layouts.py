"""Folders as people have them: each layout on a small one of its kind, and the broken ones."""

import copy
import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from unified_mm import default_config
from unified_mm.config import Config
from unified_mm.data.manifest import summary
from unified_mm.data.records import Problem
from unified_mm.data.sources import open_source
from unified_mm.modalities.image import ImageModality


def coded(seed, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (1, 1, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.tile(pixels, (12, 16, 1))).save(out, format, quality=95)
    return out.getvalue()


jpeg = coded


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(coded(len(name), "PNG" if name.endswith("png") else "JPEG"))


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def opened(folder, source="auto", **options):
    config = copy.deepcopy(default_config.defaults()["data"])
    config |= {"dir": str(folder), "source": source, "cache_dir": str(folder.parent / "cache")}
    fields = options.pop("fields", {})
    config |= options
    config["fields"] |= fields
    return open_source(Config(config))


def texts(source, split="train"):
    """Each record's id with its texts; a question before its answer."""
    return {
        record.id: [f"{t.prompt}|{t.target}" if t.prompt else t.target for t in record.texts]
        for record in source.manifest(split).records
    }


def coco(folder):
    pictures(folder, "images/a.jpg", "images/b.jpg")
    for split, name in (("train", "a"), ("val", "b")):
        write(
            folder,
            f"annotations/captions_{split}.json",
            {
                "images": [{"id": 1, "file_name": f"{name}.jpg"}],
                "annotations": [{"image_id": 1, "caption": f"picture {name}"}],
            },
        )
    return {"train": {1: ["picture a"]}, "val": {1: ["picture b"]}}


def karpathy(folder):
    pictures(folder, "train2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg")
    rows = [("train", "train2014", "a"), ("restval", "val2014", "b"), ("val", "val2014", "c")]
    write(
        folder,
        "dataset_coco.json",
        {
            "dataset": "coco",
            "images": [
                {
                    "filepath": where,
                    "filename": f"{name}.jpg",
                    "split": split,
                    "cocoid": number,
                    "sentences": [{"raw": f"one {name}"}, {"raw": f"two {name}"}],
                }
                for number, (split, where, name) in enumerate(rows)
            ],
        },
    )
    return {
        "train": {0: ["one a", "two a"], 1: ["one b", "two b"]},
        "val": {2: ["one c", "two c"]},
    }


def lavis(folder):
    pictures(folder, "images/val2014/a.jpg", "images/val2014/b.jpg")
    write(
        folder,
        "annotations/coco_karpathy_train.json",
        [
            {"caption": "one a", "image": "val2014/a.jpg", "image_id": "coco_1"},
            {"caption": "two a", "image": "val2014/a.jpg", "image_id": "coco_1"},
        ],
    )
    write(
        folder,
        "annotations/coco_karpathy_val.json",
        [
            {"caption": ["one b", "two b"], "image": "val2014/b.jpg"},
        ],
    )
    return {"train": {"coco_1": ["one a", "two a"]}, "val": {"val2014/b.jpg": ["one b", "two b"]}}


def llava(folder):
    pictures(folder, "coco/train2017/a.jpg")
    says = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A cat."),
        ("human", "Where?"),
        ("gpt", "On it."),
    ]
    turns = [{"from": who, "value": what} for who, what in says]
    write(
        folder,
        "chat_train.json",
        [
            {"id": "7", "image": "coco/train2017/a.jpg", "conversations": turns},
            {
                "id": "7",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
            },
        ],
    )
    write(folder, "chat_val.json", [{"image": "a.jpg", "conversations": turns[:2]}])
    return {
        "train": {
            "coco/train2017/a.jpg": ["What is it?|A cat.", "Where?|On it."],
            "chat_train.json[1]": ["Hi|Ho"],
        },
        "val": {"a.jpg": ["What is it?|A cat."]},
    }


def vizwiz(folder):
    pictures(folder, "train/V_0.jpg", "val/V_1.jpg")
    for number, split in enumerate(("train", "val")):
        write(
            folder,
            f"Annotations/{split}.json",
            [
                {
                    "image": f"V_{number}.jpg",
                    "question": "What?",
                    "answer_type": "other",
                    "answerable": 1,
                    "answers": [
                        {"answer": a, "answer_confidence": "yes"} for a in ("soap", "can", "can")
                    ],
                }
            ],
        )
    return {"train": {"V_0.jpg": ["What?|can"]}, "val": {"V_1.jpg": ["What?|can"]}}


def textvqa(folder):
    pictures(folder, "train_images/0a.jpg", "train_images/1b.jpg")
    for name, split in (("0a", "train"), ("1b", "val")):
        write(
            folder,
            f"TextVQA_0.5.1_{split}.json",
            {
                "data": [
                    {
                        "question": "which?",
                        "question_id": 3,
                        "image_id": name,
                        "answers": ["no", "nok", "nok"],
                    }
                ]
            },
        )
    return {"train": {"0a": ["which?|nok"]}, "val": {"1b": ["which?|nok"]}}


def gqa(folder):
    pictures(folder, "images/11.jpg", "images/12.jpg")
    for image, split in (("11", "train"), ("12", "val")):
        write(
            folder,
            f"{split}_balanced_questions.json",
            {
                "q1": {
                    "imageId": image,
                    "question": "Is it?",
                    "answer": "yes",
                    "fullAnswer": "Yes, it is.",
                }
            },
        )
    return {"train": {"11": ["Is it?|yes"]}, "val": {"12": ["Is it?|yes"]}}


def okvqa(folder):
    pictures(folder, "COCO_train2014_000000000005.jpg", "COCO_val2014_000000000006.jpg")
    for image, split in ((5, "train"), (6, "val")):
        asked = {"question_id": image * 10, "image_id": image, "question": "Why?"}
        write(folder, f"OpenEnded_mscoco_{split}2014_questions.json", {"questions": [asked]})
        answers = [{"answer": a} for a in ("so", "so", "no")]
        answered = {**asked, "answers": answers, "question_type": "x", "answer_type": "other"}
        write(folder, f"mscoco_{split}2014_annotations.json", {"annotations": [answered]})
    return {"train": {5: ["Why?|so"]}, "val": {6: ["Why?|so"]}}


def imagefolder(folder):
    pictures(folder, "train/0.png", "train/1.png", "validation/0.png")
    for split, names in (("train", "01"), ("validation", "0")):
        lines = [json.dumps({"file_name": f"{n}.png", "text": f"{split} {n}"}) for n in names]
        write(folder, f"{split}/metadata.jsonl", "\n".join(lines) + "\n")
    return {
        "train": {"train/0.png": ["train 0"], "train/1.png": ["train 1"]},
        "val": {"validation/0.png": ["validation 0"]},
    }


def imagefolder_csv(folder):
    pictures(folder, "train/0.png", "test/0.png", "val/0.png")
    for split in ("train", "val", "test"):
        write(folder, f"{split}/metadata.csv", f'file_name,text\n0.png,"{split}, so"\n')
    return {s: {f"{s}/0.png": [f"{s}, so"]} for s in ("train", "val")}


def open_clip_tsv(folder):
    pictures(folder, "pics/a.jpg", "pics/b.jpg")
    write(folder, "train.tsv", "filepath\ttitle\npics/a.jpg\ta, b\npics/a.jpg\tagain\n")
    write(folder, "val.tsv", "filepath\ttitle\npics/b.jpg\tb\n")
    return {"train": {"pics/a.jpg": ["a, b", "again"]}, "val": {"pics/b.jpg": ["b"]}}


def flickr_csv(folder):
    """The table of Karpathy's splits of Flickr30k: captions as a list, splits as a column."""
    pictures(folder, "flickr30k-images/1.jpg", "flickr30k-images/2.jpg")
    out = io.StringIO()
    rows = [["raw", "sentids", "split", "filename", "img_id"]]
    rows += [
        ['["one", "two"]', "[0, 1]", "train", "1.jpg", "0"],
        ['["x"]', "[2]", "val", "2.jpg", "1"],
    ]
    csv.writer(out).writerows(rows)
    write(folder, "flickr_annotations_30k.csv", out.getvalue())
    return {
        "train": {"1.jpg": ["one", "two"]},
        "val": {"2.jpg": ["x"]},
    }


LAYOUTS = {
    "coco": coco,
    "karpathy": karpathy,
    "lavis": lavis,
    "llava": llava,
    "questions": vizwiz,
    "questions-textvqa": textvqa,
    "questions-gqa": gqa,
    "questions-okvqa": okvqa,
    "imagefolder": imagefolder,
    "table-csv": imagefolder_csv,
    "table-tsv": open_clip_tsv,
    "table-flickr": flickr_csv,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_and_read(layout, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    expected = LAYOUTS[layout](folder)
    source = opened(folder)
    assert source.name == layout.partition("-")[0]
    assert {split: texts(source, split) for split in ("train", "val")} == expected
    for split in ("train", "val"):
        manifest = source.manifest(split)
        assert not manifest.problems
        again = opened(folder).manifest(split)
        assert (again.fingerprint, again.records) == (manifest.fingerprint, manifest.records)


def views(source, split="train"):
    """The view of each record, by id."""
    config = Config(default_config.defaults())
    options = {**config.model.modalities["image"].as_dict(), "patch": 4}
    data = Config({**default_config.defaults()["data"], "image_size": 12})
    modality = ImageModality.from_config(
        "image", Config(options), SimpleNamespace(data=data, tokenizer=None)
    )
    return {r.id: modality.prepare(r, None)["pixels"] for r in source.manifest(split).records}


def tar_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars_are_read_by_number(tmp_path):
    folder = tmp_path / "data"
    sample = {f"00{i}.jpg": jpeg(i) for i in range(3)} | {"002.txt": b"two", "000.txt": b"zero"}
    told = {"001.json": json.dumps({"caption": "one", "key": "001"}).encode()}
    tar_of(folder / "train" / "00000.tar", sample | told)
    tar_of(folder / "train" / "00001.tar", {"009.png": jpeg(9), "009.txt": b"nine"})
    tar_of(folder / "val" / "00000.tar", {"000.jpg": jpeg(5), "000.txt": b"five"})
    for _ in range(2):  # the second time from the cache
        source = opened(folder)
        assert source.name == "webdataset"
        keys = ("00000.tar/000", "00000.tar/001", "00000.tar/002", "00001.tar/009")
        assert texts(source) == dict(zip(keys, (["zero"], ["one"], ["two"], ["nine"]), strict=True))
        for (_, pixels), seed in zip(views(source).items(), (0, 1, 2, 9), strict=True):
            expected = np.asarray(Image.open(io.BytesIO(jpeg(seed))))[0, 0]
            assert np.abs(pixels[6, 6].astype(int) - expected).max() <= 1
        record = pickle.loads(pickle.dumps(source.manifest("train").records[3]))
        assert record.image.read() == jpeg(9)
    before = source.manifest("train").fingerprint
    tar_of(folder / "train" / "00001.tar", {"009.png": jpeg(8), "009.txt": b"other"})
    changed = opened(folder)
    assert texts(changed)["00001.tar/009"] == ["other"]
    assert changed.manifest("train").fingerprint != before


@pytest.mark.parametrize("grouped", [True, False])
def test_parquet_files_are_read_by_number(tmp_path, grouped):
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    for split, seeds in (("train", (3, None, 4)), ("validation", (5,))):
        data = [None if seed is None else jpeg(seed) for seed in seeds]
        held = (
            [{"bytes": each, "path": f"{n}.jpg"} for n, each in enumerate(data)]
            if grouped
            else data
        )
        table = {"image": held, "caption": [[f"a {s}", "b"] for s in seeds]}
        parquet.write_table(pa.table(table), folder / f"data/{split}-00000-of-00001.parquet")
    for _ in range(2):
        source = opened(folder)
        assert source.name == "parquet"
        name = "train-00000-of-00001.parquet"
        assert texts(source) == {
            f"{name}/0": ["a 3", "b"],
            f"{name}/1": ["a None", "b"],
            f"{name}/2": ["a 4", "b"],
        }
        first, none, third = source.manifest("train").records
        assert (first.image.read(), none.image, third.image.read()) == (jpeg(3), None, jpeg(4))
        assert list(source.manifest("val").records[0].parts) == ["image"]


def whole(folder, layout):
    """A folder without splits: forty pictures, each with a text."""
    names = [f"{n}.jpg" for n in range(40)]
    if layout == "classes":
        names = [f"{'red_car' if n % 2 else 'cat'}/{n}.jpg" for n in range(40)]
    pictures(folder, *names)
    for n in range(40):
        if layout == "text_files":
            write(folder, f"{n}.txt", f"one {n}\n\ntwo {n}\n")
    lines = {
        "csv": "file_name,caption\n",
        "token": "",
        "bar": "image_name| comment_number| comment\n",
    }
    rows = {
        "csv": "{0}.jpg,number {0}\n",
        "token": "{0}.jpg#0\tnumber {0}\n",
        "bar": "{0}.jpg| 0| number {0}\n",
    }
    if layout in lines:
        write(
            folder,
            f"results.{layout if layout != 'bar' else 'csv'}",
            lines[layout] + "".join(rows[layout].format(n) for n in range(40)),
        )


@pytest.mark.parametrize(
    ("layout", "name", "seven"),
    [
        ("text_files", "text_files", ["one 7", "two 7"]),
        ("classes", "classes", ["red car"]),
        ("csv", "table", ["number 7"]),
        ("token", "table", ["number 7"]),
        ("bar", "table", ["number 7"]),
    ],
)
def test_a_folder_without_splits_is_divided_by_names_alone(tmp_path, layout, name, seven):
    folder = tmp_path / "data"
    whole(folder, layout)
    source = opened(folder)
    assert source.name == name and "'val' is 10% of it, by name" in source.described
    train, val = (texts(source, split) for split in ("train", "val"))
    assert not set(train) & set(val) and len(train | val) == 40 and 1 <= len(val) <= 12
    assert next(said for key, said in (train | val).items() if Path(key).name == "7.jpg") == seven
    more = folder / "cat" if layout == "classes" else folder
    pictures(more, "more.jpg")
    if layout == "text_files":
        write(folder, "more.txt", "more")
    again = opened(folder)
    assert set(texts(again, "val")) - {"more.jpg", "cat/more.jpg"} == set(val)
    with pytest.raises(ValueError, match="data.val_share=1.5: must be between 0 and 1"):
        opened(folder, val_share=1.5)
    with pytest.raises(ValueError, match="none of them falls into val by data.val_share=1e-09"):
        opened(folder, val_share=1e-9).manifest("val")


def test_a_column_without_a_name_is_left_alone(tmp_path):
    """It numbers the rows, as pandas writes them unless told not to."""
    folder = tmp_path / "data"
    pictures(folder, "a.jpg", "b.jpg")
    write(folder, "train.csv", ",image,caption\n0,a.jpg,one\n")
    write(folder, "val.csv", ",image,caption\n0,b.jpg,two\n")
    source = opened(folder)
    assert texts(source) == {"a.jpg": ["one"]}
    (record,) = source.manifest("train").records
    assert set(record.parts) == {"image"} and not record.labels


def test_fields_of_other_names_are_named(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, "a.jpg", "b.jpg")
    write(folder, "train.csv", "bild,unterschrift\na.jpg,ein Bild\n")
    write(folder, "val.csv", "bild,unterschrift\nb.jpg,noch eins\n")
    with pytest.raises(FileNotFoundError, match=r"train.csv, which begins 'bild,unterschrift'"):
        opened(folder)
    source = opened(folder, fields={"image": "bild", "caption": "unterschrift"})
    assert texts(source) == {"a.jpg": ["ein Bild"]}


def test_a_question_that_nobody_answered_is_counted(tmp_path):
    folder = tmp_path / "data"
    llava(folder)
    asked = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    asked += [{"from": "human", "value": "And?"}]
    write(folder, "chat_train.json", [{"image": "coco/train2017/a.jpg", "conversations": asked}])
    source = opened(folder, max_bad_share=0.5)
    assert texts(source) == {"coco/train2017/a.jpg": ["Hi|Ho"]}
    (problem,) = source.manifest("train").problems
    assert problem == Problem("chat_train.json[0]", "empty answer", "left out")


def test_a_layout_may_be_asked_for(tmp_path):
    folder = tmp_path / "data"
    lavis(folder)
    for n in "ab":
        write(folder, f"images/val2014/{n}.txt", f"beside {n}")
    assert "could be read too: data.source=text_files" in opened(folder).described
    found = texts(opened(folder, "text_files")) | texts(
        opened(folder, "text_files", val_share=0.9), "val"
    )
    assert set(map(tuple, found.values())) <= {("beside a",), ("beside b",)}
    with pytest.raises(FileNotFoundError, match="it is not laid out as WebDataset tars"):
        opened(folder, "webdataset")


BROKEN = {
    "nothing": (lambda f: None, "none of the known layouts; it is empty"),
    "pictures alone": (
        lambda f: pictures(f, "a.jpg"),
        "1 pictures have no texts; put a.txt beside a.jpg",
    ),
    "one folder too high": (
        lambda f: karpathy(f / "sub/below"),
        "Nearest is .*/sub, which is laid out as karpathy: set data.dir",
    ),
    "captions beside": (
        lambda f: write(f, "captions_train.json", {"images": []}),
        "move captions_train.json into .*annotations",
    ),
    "unknown keys": (
        lambda f: write(f, "x.json", [{"bild": 1}]),
        "x.json, which has bild: a list of objects needs an image",
    ),
    "unknown columns": (lambda f: write(f, "x.csv", "a,b\n1,2\n"), "x.csv, which begins 'a,b'"),
    "json cut off": (lambda f: write(f, "x.json", '[{"image": "a.jpg", '), "x.json.*not JSON"),
    "a list of no objects": (
        lambda f: write(f, "x.json", [{"image": "a", "caption": "b"}, 3]),
        r"x.json\[1\] must be an object",
    ),
    "an image that is a number": (
        lambda f: write(f, "x.json", [{"image": 3, "caption": "b"}]),
        "3 is no name of an image",
    ),
    "no turns": (
        lambda f: write(
            f, "x.json", [{"image": "a", "conversations": [{"from": "gpt", "value": "x"}] * 2}]
        ),
        "must take turns",
    ),
    "no answer": (
        lambda f: write(f, "x.json", [{"image": "a.jpg", "question": "b", "answers": []}]),
        "has no answer",
    ),
    "no words": (
        lambda f: write(f, "x.json", [{"image": "a.jpg", "question": " ", "answers": ["b"]}]),
        "question must be a text",
    ),
    "bad metadata": (
        lambda f: write(f, "metadata.jsonl", '{"file_name": "a.jpg", "text": "b"}\n{"file_'),
        "metadata.jsonl:2: not JSON",
    ),
    "metadata of no object": (
        lambda f: write(f, "metadata.jsonl", "[1]\n"),
        "metadata.jsonl:1: must be an object",
    ),
    "no pictures": (
        lambda f: write(f, "metadata.jsonl", '{"file_name": "a.jpg", "text": "b"}\n' * 2),
        "missing image.*looked for them below",
    ),
    "latin-1": (
        lambda f: (pictures(f, "a.jpg"), (f / "a.txt").write_bytes(b"caf\xe9")),
        "a.txt, byte 3: not UTF-8",
    ),
    "a cut tar": (
        lambda f: ((f / "train").mkdir(), (f / "train/0.tar").write_bytes(b"x" * 700)),
        "cannot be read as a WebDataset tar",
    ),
    "a tar of no pictures": (
        lambda f: tar_of(f / "0.tar", {"a.txt": b"x"}),
        "lists no|falls into|are bad|no picture",
    ),
    "a quote that is open at the end": (
        lambda f: write(f, "x.csv", 'image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n'),
        "x.csv:3: what begins here is no row.*unexpected end of data.*stands in quotes",
    ),
    "a quote that closes within a text": (
        lambda f: write(f, "x.csv", 'image,caption\na.jpg,"x\ny"\nb.jpg,"y\nc.jpg,"z"\n'),
        "x.csv:4: what begins here is no row.*expected after",
    ),
    "no parquet": (lambda f: write(f, "x.parquet", "PAR1"), "is no parquet file that can be read"),
    "empty captions": (
        lambda f: (
            pictures(f, *"a.jpg b.jpg".split()),
            write(f, "train.csv", "image,caption\na.jpg,\nb.jpg, \n"),
            write(f, "val.csv", "image,caption\na.jpg,x\n"),
        ),
        "captions of 'train'.*are bad",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_named(kind, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    make, message = BROKEN[kind]
    make(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(folder, val_share=0.5).manifest("train")


def test_bad_pictures_of_shards_are_named(tmp_path):
    folder = tmp_path / "data"
    members = {f"{i}.jpg": jpeg(i) for i in range(20)} | {f"{i}.txt": b"x" for i in range(20)}
    tar_of(folder / "train.tar", members | {"3.jpg": b"no picture"})
    tar_of(folder / "val.tar", members)
    (problem,) = opened(folder).manifest("train").problems
    assert "train.tar: 3.jpg" in problem.file and problem.action == "left out"
    source = opened(folder, max_bad_share=0.0)
    with pytest.raises(ValueError, match="1 of the 20 images of 'train'.*are bad"):
        source.manifest("train")
    (folder / "train.tar").write_bytes((folder / "train.tar").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a WebDataset tar|cut off"):
        opened(folder).manifest("train")


@pytest.mark.parametrize("field", ["image", "caption", "label"])
def test_a_field_that_is_not_there_is_no_other(field, tmp_path):
    """A wrong name must not be read as the usual one."""
    folder = tmp_path / "data"
    pictures(folder, "a.jpg", "b.jpg")
    write(folder, "train.csv", "path,title,kind\na.jpg,one,x\n")
    with pytest.raises(FileNotFoundError, match=rf"must have data\.fields\.{field}='knd'"):
        opened(folder, fields={field: "knd"})
    (folder / "train.csv").unlink()
    write(folder, "metadata.jsonl", '{"file_name": "a.jpg", "text": "one", "kind": "x"}\n')
    with pytest.raises(FileNotFoundError, match=rf"must have data\.fields\.{field}='knd'"):
        opened(folder, fields={field: "knd"})
    (folder / "metadata.jsonl").unlink()
    write(folder, "train.json", [{"image": "a.jpg", "caption": "one", "kind": "x"}])
    with pytest.raises(FileNotFoundError, match=rf"needs data\.fields\.{field}='knd'"):
        opened(folder, fields={field: "knd"})
    write(folder, "a.txt", "one")
    with pytest.raises(ValueError, match=rf"data\.fields\.{field}='knd' is for data\.source=lavis"):
        opened(folder, fields={field: "knd"})


def test_a_field_beside_the_text_of_a_tar_is_read_where_it_is_named(tmp_path):
    folder = tmp_path / "data"
    told = json.dumps({"alt": "the other"}).encode()
    members = {"0.jpg": jpeg(0), "0.txt": b"the text", "0.json": told}
    tar_of(folder / "train/0.tar", members)
    tar_of(folder / "val/0.tar", members)
    assert texts(opened(folder)) == {"0.tar/0": ["the text"]}
    assert texts(opened(folder, fields={"caption": "alt"})) == {"0.tar/0": ["the other"]}
    assert texts(opened(folder, fields={"caption": "txt"})) == {"0.tar/0": ["the text"]}


def test_pictures_without_a_text_are_named(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, *(f"{split}/{n}.jpg" for split in ("train", "val") for n in range(3)))
    for split in ("train", "val"):
        write(folder, f"{split}/0.txt", "nought")
        write(folder, f"{split}/1.TXT", "one")
    problems = opened(folder).manifest("train").problems
    assert [(each.file, each.what, each.action) for each in problems] == [
        (f"train/{n}.jpg", "no .txt beside it", "left out") for n in (1, 2)
    ]


def test_bad_pictures_of_the_few_that_are_held_out_are_a_share_of_all(tmp_path):
    folder = tmp_path / "data"
    whole(folder, "text_files")
    held_out = sorted(texts(opened(folder), "val"))
    assert len(held_out) < 20  # one of them is more than a twentieth
    (folder / held_out[0]).write_bytes(b"")
    assert sorted(texts(opened(folder), "val")) == held_out[1:]
    (folder / held_out[1]).write_bytes(b"")
    (folder / held_out[2]).write_bytes(b"")
    with pytest.raises(ValueError, match="3 of the 40 images of 'val' in .* and its other part"):
        opened(folder).manifest("val")


def test_names_from_the_root_are_within_a_folder_however_it_is_given(tmp_path, monkeypatch):
    folder, link = tmp_path / "data", tmp_path / "link"
    pictures(folder, "img/a.jpg", "img/b.jpg", "img/c.jpg")
    pictures(tmp_path, "elsewhere/d.jpg")
    link.symlink_to(folder)
    named = [folder / "img/a.jpg", link / "img/b.jpg"]
    write(folder, "train.csv", "filepath,title\n" + "".join(f"{each},one\n" for each in named))
    write(folder, "val.csv", f"filepath,title\nimg/c.jpg,two\n{tmp_path}/elsewhere/d.jpg,three\n")
    monkeypatch.chdir(tmp_path)
    for given in (folder, Path("data"), link, folder / "img" / ".."):
        config = Config(copy.deepcopy(default_config.defaults()["data"]))
        source = open_source(config.changed({"dir": str(given), "cache_dir": str(tmp_path / "c")}))
        assert list(texts(source)) == ["img/a.jpg", "img/b.jpg"]
        with pytest.raises(ValueError, match="elsewhere/d.jpg .missing image"):
            source.manifest("val")


def test_splits_may_have_pictures_of_one_name(tmp_path):
    folder = tmp_path / "data"
    for split in ("train", "val"):
        pictures(folder, f"{split}/1.jpg", f"{split}/2.jpg")
        write(folder, f"{split}.csv", f"image,caption\n1.jpg,{split} one\n2.jpg,{split} two\n")
    source = opened(folder)
    for split in ("train", "val"):
        images = [record.image for record in source.manifest(split).records]
        assert images == [str(folder / split / name) for name in ("1.jpg", "2.jpg")]


def test_a_picture_that_is_missing_is_not_one_of_another_folder(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, "train/1.jpg", "val/2.jpg", "below/val/3.jpg")
    rows = "".join(f"train/{n}.jpg,one\n" for n in (1, 2)) + "/theirs/coco/val/3.jpg,three\n"
    write(folder, "train.csv", f"image,caption\n{rows}")
    write(folder, "val.csv", "image,caption\n2.jpg,two\n")
    source = opened(folder, max_bad_share=0.5)
    assert list(texts(source)) == ["train/1.jpg", "/theirs/coco/val/3.jpg"]
    assert "missing image (train/2.jpg)" in summary(source.manifest("train"))


def test_a_class_may_be_called_as_a_split(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, *(f"{name}/{n}.jpg" for name in ("boat", "car", "train") for n in range(9)))
    source = opened(folder)
    found = {split: set(map(tuple, texts(source, split).values())) for split in source.splits()}
    assert found == {"train": {("boat",), ("car",), ("train",)}, "val": found["val"]}
    split = tmp_path / "split"
    pictures(split, "train/boat/1.jpg", "train/car/2.jpg", "val/car/3.jpg", "test/4.jpg")
    assert set(opened(split).splits()) == {"train", "val", "test"}


def test_what_tells_no_split_beside_what_does_is_said(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, "a.jpg", "b.jpg", "c.jpg")
    for name, picture in (("train", "a"), ("val", "b"), ("more", "c")):
        write(folder, f"{name}.csv", f"image,caption\n{picture}.jpg,text\n")
    assert "what tells no split is 'all', which is not trained on" in opened(folder).described
    assert "no split" not in opened(folder, train_split="all").described


def test_a_text_with_the_delimiter_is_not_cut(tmp_path):
    folder = tmp_path / "data"
    pictures(folder, "a.jpg", "b.jpg")
    write(folder, "train.csv", 'image,caption\na.jpg,"a dog, a cat"\nb.jpg,a dog, a cat\n')
    write(folder, "val.csv", "image,caption,\na.jpg,a dog,,\n")
    assert texts(opened(folder), "val") == {"a.jpg": ["a dog"]}
    with pytest.raises(ValueError, match="train.csv:3 has 3 cells and the first line 2: put"):
        texts(opened(folder))


def test_captions_of_one_picture_are_never_in_two_splits(tmp_path):
    folder = tmp_path / "data"
    names = [f"{n}.jpg" for n in range(20)]
    pictures(folder, *names)
    rows = [{"id": n, "image": names[n % 20], "caption": f"text {n}"} for n in range(60)]
    write(folder, "all.json", rows)
    source = opened(folder, val_share=0.3)
    images = {
        split: [record.image for record in source.manifest(split).records]
        for split in ("train", "val")
    }
    assert len(images["train"]) + len(images["val"]) == 60
    assert not set(images["train"]) & set(images["val"])
