"""A reader: contrast reads its texts by another run's text model, in whatever fusion."""

import json
import pickle
import re
from dataclasses import replace

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.analysis.layer_features import text_features
from unified_mm.config import Config
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.data.text_tokenizer import TextTokenizer, reader_file
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor
from unified_mm.models.reader import SENTENCE
from unified_mm.nn.unstack import unstack_layers
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.folder import RunFolder
from unified_mm.task import build_task
from unified_mm.training.features import kept_preparers, write_features
from unified_mm.training.notices import cut_line
from unified_mm.training.start_from import config_from_run, load_params, weights_to_start_from

# A text model of another width and depth, which looks both ways and knows other tokens.
SOURCE = {
    "model__fusion": "late",
    "model__width": 24,
    "model__layers": 3,
    "model__norm_place": "post",
    "model__final_norm": False,
    "objectives__captioning__weight": 0.0,
    "objectives__matching__weight": 0.0,
}
OTHER = [f"{text} and more of it" for text in tiny.TEXTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The run that a reader is from."""
    tokenizer = TextTokenizer.train(OTHER, 290)
    config = tiny.config_dict(**SOURCE)
    params = tiny.params(build_task(Config(config.to_dict()), tokenizer))
    folder = tiny.write_run(tmp_path_factory.mktemp("runs") / "source", config, params)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def reading(source, **changes):
    """The config, task and parameters of a model with the reader."""
    given = {"objectives__matching__weight": 0.0, **changes}
    config = tiny.config_dict(model__start_from__reader=str(source), **given)
    config = config_from_run(config, ())
    fields = Config(config.to_dict())
    tokenizer = TextTokenizer.train(tiny.TEXTS, 300)
    tokenizer.reader = TextTokenizer.load(source / "tokenizer.json")
    task = build_task(fields, tokenizer)
    params = load_params(tiny.params(task, seed=1), fields, weights_to_start_from(fields))
    return config, task, params


def rows(modality, texts):
    encoded = [modality.encode("", text) for text in texts]
    return {key: jnp.stack([each[key] for each in encoded]) for key in encoded[0]}


TEXTS = ("a red square of size 1", "a blue square", "")


@pytest.mark.parametrize("fusion", ("early", "gated_cross_attention", "late"))
def test_it_reads_as_the_run_that_it_is_from(source, fusion):
    weights = {} if fusion != "late" else {"objectives__captioning__weight": 0.0}
    _, task, params = reading(source, model__fusion=fusion, **weights)
    of_reader, valid = task.model.apply(
        {"params": params},
        method=lambda model: model.head["reader"](rows(task.modalities["text"], TEXTS)),
    )
    whole = unified_mm.load(source)
    (contrast,) = whole.task.objectives
    own = rows(whole.task.modalities["text"], TEXTS)
    method = lambda model: model.read_text(own, contrast.view)  # noqa: E731
    x = np.asarray(whole.task.model.apply({"params": whole.params}, method=method))
    where = np.asarray(own["valid"])[..., None]
    np.testing.assert_allclose(of_reader[:, 0], (x * where).sum(1) / where.sum(1), atol=1e-5)
    assert of_reader.shape == (3, 1, 24) and valid.all()
    by_layer, _ = task.model.with_options(unstacked=True).apply(
        {"params": unstack_layers(params)},
        method=lambda model: model.head["reader"](rows(task.modalities["text"], TEXTS)),
    )
    np.testing.assert_allclose(by_layer, of_reader, atol=1e-5)


def test_contrast_reads_by_it_and_captions_do_not(source):
    _, task, params = reading(source)
    batch = tiny.batch(task)
    text = rows(task.modalities["text"], ("a red square", "a green one", "a blue one", "green"))
    batch["text"] = text

    @jax.jit
    def of_batch(text):
        key = jax.random.key(0)
        found = task.metrics(params, {**batch, "text": text}, key, deterministic=True)
        return {name: found[f"{name}/loss"][0] for name in ("contrastive", "captioning")}

    def losses(changed):
        return {name: float(loss) for name, loss in of_batch(text | changed).items()}

    plain = losses({})
    others = losses({"reader_ids": jnp.flip(text["reader_ids"], 0)})
    written = losses({"ids": jnp.flip(text["ids"], 0)})
    assert others["captioning"] == plain["captioning"]
    assert abs(others["contrastive"] - plain["contrastive"]) > 1e-3
    assert written["contrastive"] == plain["contrastive"]
    assert abs(written["captioning"] - plain["captioning"]) > 1e-3


def test_texts_that_were_read_before_are_the_same(source, tmp_path):
    """They are read in the order of their lengths, without padding, and kept in that of views."""
    _, task, params = reading(source)
    texts = ("red", "a blue square of size 1", "a green one", "a square", "blue and red") * 4
    records = [
        Record(n, {}, (Text("", text), Text("", "red")), True) for n, text in enumerate(texts)
    ]
    shapes = jax.tree_util.tree_map_with_path(lambda path, _: "reader" not in path_of(path), params)
    (kept,) = kept_preparers(task, records, params, shapes).values()
    predictor = Predictor(task, params, one_device_mesh())
    write_features(kept, records, task, predictor, False)(tmp_path / "features")
    kept = replace(kept, folder=str(tmp_path / "features"))
    for record in records:
        found = kept.prepare(record, np.random.default_rng(record.id))
        seen = task.modalities["text"].prepare(record, np.random.default_rng(record.id))
        assert set(seen) - set(found) == {"reader_ids", "reader_valid"}
        assert set(found) - set(seen) == {SENTENCE}
        np.testing.assert_array_equal(found["ids"], seen["ids"])
        one = {key: jnp.asarray(value)[None] for key, value in seen.items()}
        method = lambda model, one=one: model.head["reader"](one)  # noqa: E731
        again, _ = task.model.apply({"params": params}, method=method)
        np.testing.assert_allclose(found[SENTENCE], again[0], atol=1e-5)


def test_the_tokenizers_are_kept_together(tmp_path):
    tokenizer = TextTokenizer.train(tiny.TEXTS, 300)
    tokenizer.reader = TextTokenizer.train(OTHER, 290)
    names = tokenizer.reader.special_tokens
    folder = RunFolder(tmp_path)
    tokenizer.save(folder.tokenizer)
    for again in (
        TextTokenizer.load(folder.tokenizer, names),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.reader.as_json() == tokenizer.reader.as_json()
        assert again.as_json() == tokenizer.as_json()
    both = folder.tokenizer_digest()
    TextTokenizer.train(tiny.TEXTS, 300).save(reader_file(folder.tokenizer))
    assert folder.tokenizer_digest() != both
    reader_file(folder.tokenizer).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*reader_tokenizer.json"):
        TextTokenizer.load(folder.tokenizer, names)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"objectives__contrastive__between": "text"}, "holds nothing against a text"),
        ({"objectives__contrastive__weight": 0.0}, "no objective reads by it"),
    ),
)
def test_a_reader_that_nothing_reads_by_is_refused(source, changes, said):
    with pytest.raises(ValueError, match=said):
        reading(source, **changes)


def test_a_reader_that_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="name the run of a text model in model.start_from.reader"):
        tiny.task(objectives__contrastive__reader=True)
    config = tiny.config_dict(model__start_from__reader=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="model.start_from.reader=.* is no run"):
        config_from_run(config, ())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    (
        ("model.feed_forward_type", "experts", "has experts"),
        ("model.fusion", "gated_cross_attention", "has gated layers"),
        ("objectives.contrastive.text_pool", "attention", "pools its texts by attention"),
        ("objectives.contrastive.weight", 0.0, "learned no contrast with texts"),
        ("objectives.contrastive.between", "image,audio", "learned no contrast with texts"),
        ("objectives.contrastive.reader", True, "has a reader itself"),
    ),
)
def test_a_run_that_reads_in_another_way_is_no_reader(source, tmp_path, field, value, said):
    saved = json.loads((source / "config.json").read_text())
    *groups, last = field.split(".")
    node = saved
    for name in groups:
        node = node[name]
    node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = tiny.config_dict(model__start_from__reader=str(tmp_path))
    with pytest.raises(ValueError, match=f"{said}.*: a reader is a text model"):
        config_from_run(config, ())


def test_padding_that_was_read_is_read(source, tmp_path):
    """And a model of experts may have a dense reader; a model without texts has none."""
    saved = json.loads((source / "config.json").read_text())
    saved["model"]["modalities"]["text"] |= {"attend_padding": True, "length": 20}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    lengths = []
    for run in (source, tmp_path):
        config = tiny.config_dict(
            model__start_from__reader=str(run), model__feed_forward_type="experts"
        )
        lengths.append(config_from_run(config, ()).model.reader.text.length)
    assert lengths == [12, 20]
    del config.model.modalities["text"]
    with pytest.raises(ValueError, match="model.modalities must declare text"):
        config_from_run(config, ())


def test_what_is_cut_for_the_reader_is_said(source):
    _, task, _ = reading(source)
    text = Record(0, {}, (Text("", "a red square of size 1 " * 3),), True)
    train = Manifest("train", (text,), "tests", "", "0")
    assert cut_line(task, train).endswith("; 100.0% of texts are cut for the reader of a contrast")


FROZEN = "--config.train.freeze_rules=(('heads_reader/.*', True), ('.*', False))"


@pytest.mark.slow
def test_a_run_with_a_frozen_reader_finds_writes_and_goes_on(source, tmp_path, capsys):
    """It keeps what was read, needs the run that it is from no more, and is itself started from."""
    data, run = tiny.write_coco(tmp_path / "data"), tmp_path / "run"
    given = (
        "--config=coco:tiny", f"--config.data.dir={data}", *commands.SMALL, FROZEN,
        f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.keep_features=True",
    )  # fmt: skip
    moved = tmp_path / "moved"
    source = source.rename(moved)
    try:
        first = (f"--config.model.start_from.reader={moved}", f"--workdir={run}")
        assert commands.run(*given, *first) == 0
    finally:
        moved.rename(source.parent / "source")
    said = capsys.readouterr().out
    assert re.search(r"features of \d+ views of text: computed once", said)
    assert "reader from" in said
    model = unified_mm.load(run)
    leaf = {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(model.params)}
    assert leaf["heads_reader/embedders_text/tokens"].shape[1] == 24
    pictures = sorted((data / "images" / "val").iterdir())[:2]
    assert len(model.caption(pictures)) == 2
    assert text_features(model, ["a red square"])
    apart = model.embed_texts(["a red square", "a blue square"])
    assert np.abs(apart[0] - apart[1]).max() > 1e-3
    with pytest.raises(ValueError, match="an exported program does not know"):
        from unified_mm.export import export

        export(model, tmp_path / "exported", platforms=("cpu",))
    whole = (f"--config.model.start_from.whole={run}", f"--workdir={tmp_path / 'more'}")
    assert commands.run(*given, *whole, "--config.train.learning_rate=1e-9") == 0
    again = unified_mm.load(tmp_path / "more")
    np.testing.assert_allclose(again.embed_texts(["a red square"]), apart[:1], atol=1e-6)
