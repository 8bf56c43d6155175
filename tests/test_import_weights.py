"""The two commands: what they write, and what they refuse without leaving anything behind."""

import json
import re
from pathlib import Path

import commands
import jax
import numpy as np
import published
import pytest
import safetensors.numpy

import unified_mm
from unified_mm import export_weights, import_weights
from unified_mm.import_weights import import_directory, write_run
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.checkpoints import Checkpoints


def imported_by_command(source, out):
    with pytest.raises(SystemExit) as stopped:
        import_weights.main(["--from", str(source), "--out", str(out)])
    return stopped.value.code


def exported_by_command(run, out):
    with pytest.raises(SystemExit) as stopped:
        export_weights.main(["--run", str(run), "--out", str(out)])
    return stopped.value.code


def leaves(params):
    return {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    source = published.write(folder / "theirs")
    assert imported_by_command(source, folder / "run") == 0
    return source, folder / "run"


def test_a_run_that_loads_and_writes(run):
    _, folder = run
    assert not (folder / "result.json").exists()
    model = unified_mm.load(folder)
    assert model.step == 0 and model.config.imported.family == "GPT-2"
    written = model.predictor.write({}, ["a red", "a blue square"])
    assert len(written) == 2 and all(isinstance(text, str) for text in written)
    with pytest.raises(ValueError, match="reads no images"):
        model.caption([np.zeros((8, 8, 3), np.uint8)])


def test_an_imported_run_says_how_it_is_trained_on(run, capsys):
    recipe = f"--config={Path(__file__).parents[1] / 'configs' / 'coco.py'}:tiny"
    assert commands.run(recipe, f"--workdir={run[1]}") == 1
    said = capsys.readouterr().err
    assert f"error: {run[1]} holds imported weights (GPT-2)" in said
    assert f"in another --workdir, with --config.model.start_from.text={run[1]}" in said


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(folder, name="someone/small-gpt2"):
    """A model in the layout of the Hub's cache: snapshots are links to blobs."""
    model = folder / f"models--{name.replace('/', '--')}"
    whole = published.write(folder / "whole")
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(whole.iterdir())):
        path.rename(model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(model / "blobs" / str(number))
    return snapshot


@pytest.mark.parametrize("variable", ("HF_HUB_CACHE", "HF_HOME"))
@pytest.mark.parametrize("revision", ("", f"@{COMMIT}"), ids=("main", "commit"))
def test_a_model_by_its_name(variable, revision, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    in_cache(tmp_path / "hub" if variable == "HF_HOME" else tmp_path)
    assert imported_by_command(f"someone/small-gpt2{revision}", tmp_path / "run") == 0
    origin = json.loads((tmp_path / "run" / "config.json").read_text())["imported"]
    assert (origin["name"], origin["revision"]) == ("someone/small-gpt2", COMMIT)


def test_a_model_by_its_name_without_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    in_cache(tmp_path)
    model, same = unified_mm.load("someone/small-gpt2"), unified_mm.load(run[1])
    assert all(np.array_equal(x, leaves(same.params)[n]) for n, x in leaves(model.params).items())
    assert model.predictor.write({}, ["a red"]) == same.predictor.write({}, ["a red"])
    with pytest.raises(ValueError, match="has no step 3"):
        unified_mm.load("someone/small-gpt2", step=3)


def test_a_name_that_is_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (in_cache(tmp_path) / "model.safetensors").unlink()  # half of it: as good as none
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert imported_by_command("someone/small-gpt2@v2", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert re.search(r"no folder someone/small-gpt2 .*revision v2.*unified_mm\[hub\]", said), said
    assert imported_by_command("someone/small-gpt2", tmp_path / "run") == 1


def test_a_name_that_the_hub_is_asked_for(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    asked = []

    def fetch(name, **options):
        asked.append((name, options["revision"], options["cache_dir"]))
        return str(in_cache(tmp_path))

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert imported_by_command("someone/small-gpt2", tmp_path / "run") == 0
    assert asked == [("someone/small-gpt2", "main", tmp_path)]


def test_answers_are_joined_by_a_space_where_words_begin_with_theirs(tmp_path):
    def joined(folder):
        return import_directory(folder).config["data"]["special_tokens"]["space_before_target"]

    folder = published.write(tmp_path / "theirs")
    assert joined(folder) is False  # every text begins as a word
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = False
    content["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert joined(folder) is True


def test_what_is_said(run, tmp_path, capsys):
    source, _ = run
    weights = published.tensors()
    weights["transformer.h.0.attn.bias"] = np.zeros((1, 1, 20, 20), np.float32)
    published.write(tmp_path / "theirs", weights)
    assert imported_by_command(tmp_path / "theirs", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "family: GPT-2 (part: text)" in said
    assert "transformer.h.0.attn.bias (a causal mask, not learned)" in said
    assert "  transformer 1,760\n" in said


def test_shards_give_the_same(run, tmp_path):
    source, _ = run
    one = leaves(import_directory(source).params)
    other = leaves(import_directory(published.write_shards(tmp_path / "shards")).params)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)


def test_there_and_back_gives_the_same_bits(run, tmp_path):
    source, folder = run
    assert exported_by_command(folder, tmp_path / "back") == 0
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    theirs = safetensors.numpy.load_file(source / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[name], theirs[name]) for name in theirs)
    one, again = import_directory(source), import_directory(tmp_path / "back")
    assert all(np.array_equal(x, leaves(again.params)[n]) for n, x in leaves(one.params).items())
    assert {**one.config, "imported": 0} == {**again.config, "imported": 0}


def test_what_exists_is_not_overwritten(run, tmp_path, capsys):
    source, folder = run
    assert imported_by_command(source, folder) == 1
    assert exported_by_command(folder, source) == 1
    said = capsys.readouterr().err
    assert said.count("exists and is not overwritten") == 2 and said.count("\n") == 2


def test_a_model_of_no_family_is_not_exported(run, tmp_path):
    _, folder = run
    model = unified_mm.load(folder)
    config = model.config.as_dict()
    config["model"] = {**config["model"], "norm_place": "post"}
    with pytest.raises(ValueError, match=r"GPT-2: model.norm_place\n"):
        export_weights.export(config, model.params, model.task.tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def drop(folder, name):
    weights = published.tensors()
    del weights[name]
    return published.write(folder, weights)


def no_config(folder):
    published.write(folder)
    (folder / "config.json").unlink()


def no_directory(folder):
    pass


def damaged_config(folder):
    published.write(folder)
    (folder / "config.json").write_text("{")


def no_weights(folder):
    published.write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    published.write(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(folder):
    published.write_shards(folder)
    (folder / "model-2-of-2.safetensors").unlink()


def shard_without_its_tensor(folder):
    published.write_shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = "model-2-of-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown(folder):
    published.write(folder, model_type="mamba")


def naflex(folder):
    published.write(folder, model_type="siglip2")


def further_tensor(folder):
    published.write(folder, published.tensors() | {"transformer.h.0.gate": np.ones(3, np.float32)})


def missing_tensor(folder):
    drop(folder, "transformer.h.1.ln_2.bias")


def wrong_shape(folder):
    weights = published.tensors()
    weights["transformer.h.1.mlp.c_fc.weight"] = np.ones((8, 31), np.float32)
    published.write(folder, weights)


def wrong_reshape(folder):
    weights = published.tensors()
    weights["transformer.h.0.attn.c_attn.weight"] = np.ones((8, 21), np.float32)
    published.write(folder, weights)


def integers(folder):
    weights = published.tensors()
    weights["transformer.wpe.weight"] = np.ones((20, 8), np.int32)
    published.write(folder, weights)


def untied(folder):
    head = np.ones((310, 8), np.float32)
    published.write(folder, published.tensors() | {"lm_head.weight": head})


def unscaled(folder):
    published.write(folder, scale_attn_by_inverse_layer_idx=True)


def odd_activation(folder):
    published.write(folder, activation_function="mish")


def no_tokenizer(folder):
    published.write(folder)
    (folder / "tokenizer.json").unlink()


def too_few_rows(folder):
    published.write(folder, vocab_size=200)


def no_such_token(folder):
    published.write(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


WRONG = {
    no_directory: "theirs is no directory",
    no_config: "has no config.json",
    damaged_config: "config.json: not JSON",
    no_weights: "has neither model.safetensors nor .* pytorch_model.bin is not read",
    truncated: "model.safetensors is no whole safetensors file",
    missing_shard: "has no model-2-of-2.safetensors",
    shard_without_its_tensor: "model-2-of-2.safetensors: has no transformer.wte.weight",
    unknown: "model_type='mamba' is no architecture .* clip, .* gpt2, idefics, llama",
    naflex: r"pictures of any shape \(naflex\)",
    further_tensor: "no place in our model for transformer.h.0.gate",
    missing_tensor: "has no transformer.h.1.ln_2.bias, for our .*/feed_forward_norm/bias",
    wrong_shape: r"transformer.h.1.mlp.c_fc.weight \[8, 31\] does not fit our .*\[8, 32\]",
    wrong_reshape: r"transformer.h.0.attn.c_attn.weight \[8, 21\] does not fit our",
    integers: "transformer.wpe.weight is of type I32",
    untied: "lm_head.weight differs from transformer.wte.weight",
    unscaled: "scale_attn_by_inverse_layer_idx=True cannot be read here",
    odd_activation: "activation_function='mish' is none of",
    no_tokenizer: "has no tokenizer.json",
    too_few_rows: "its tokenizer has .* tokens, but config.json has embeddings for 200",
    no_such_token: "the tokenizer has no .*</s>",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_named_and_nothing_is_written(spoil, tmp_path, capsys):
    spoil(tmp_path / "theirs")
    assert imported_by_command(tmp_path / "theirs", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(WRONG[spoil], said), said
    assert {path.name for path in tmp_path.iterdir()} <= {"theirs"}


def test_nothing_is_left_of_a_run_that_cannot_be_written(run, tmp_path, monkeypatch):
    source, _ = run
    imported = import_directory(source)

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(OSError, match="disk"):
        write_run(imported, tmp_path / "run")
    assert not list(tmp_path.iterdir())
