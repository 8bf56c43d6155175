"""One vocabulary of flags: what it has is read, and what a command is not told is refused."""

import importlib
from pathlib import Path

import pytest

import unified_mm
from unified_mm.cli import flags
from unified_mm.cli.flags import FLAGS, parse

NO_COMMANDS = {"__init__", "config", "default_config", "files", "registry", "task"}
COMMANDS = sorted({p.stem for p in Path(unified_mm.__file__).parent.glob("*.py")} - NO_COMMANDS)


def test_every_flag_is_some_commands_and_every_command_has_a_main():
    named = set()
    assert len(COMMANDS) > 12
    for name in COMMANDS:
        module = importlib.import_module(f"unified_mm.{name}")
        assert (module.main.name, module.main.doc) == (name, module.__doc__)
        named.update(module.main.flags.get("needs", ()), module.main.flags.get("takes", ()))
        with pytest.raises(SystemExit) as stopped:
            module.main(["--nothing-of-the-kind"])
        assert stopped.value.code == 1
    assert named == FLAGS.keys()


def test_values_are_read_and_what_was_given_is_known():
    found = parse("x", "", ["--run=a", "--top", "3"], needs=["run"], takes=["top", "image", "json"])
    assert (found.run, found.top, found.image, found.json) == ("a", 3, [], False)
    assert found.given == {"run", "top"}
    found = parse("x", "", ["a", "--json", "b"], names="runs", takes=["json"])
    assert found.runs == ["a", "b"] and found.json


def test_the_home_of_a_user_is_known_in_every_path(monkeypatch):
    """Shells leave the `~` of `--run=~/runs` to the command."""
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["--run=~/runs/a", "--image=~/a.jpg", "--image=b.jpg", "--output=~/x", "--query=~/y"]
    found = parse("x", "", typed, takes=["run", "image", "output", "query"])
    assert (found.run, found.image) == ("/home/me/runs/a", ["/home/me/a.jpg", "b.jpg"])
    assert (found.output, found.query) == ("/home/me/x", "~/y")
    assert parse("x", "", ["~/a", "b"], names="runs").runs == ["/home/me/a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --run"),
        (["--run=a", "--topp=3"], "--topp=3 is no flag; did you mean --top?"),
        (["--run=a", "--top=0"], "--top: 0 must be at least 1"),
        (["--run=a", "--top=x"], "--top: 'x' is not a whole number"),
        (["--run=a", "--quality=101"], "--quality: 101 must be at least 1 and at most 100"),
        (["--run=a", "--kind=sound"], "--kind: invalid choice: 'sound'"),
        (["--run=a", "stray"], "stray is no flag"),
        (["--run"], "--run: expected one argument"),
        (["--run=a", "--config.train.steps=3"], "--config.train.steps=3 is no flag"),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse("x", "", arguments, needs=["run"], takes=["top", "kind", "quality"])


def test_flags_are_read_beside_others():
    options = parse("x", "", ["--top=3"], takes=["top", "query"])
    with pytest.raises(ValueError, match="--top is read beside --query alone"):
        flags.refuse_unread(options, {"top": ("query",)})


def test_a_recipe_and_its_fields():
    recipe = "configs/coco.py:tiny"
    fields = ["--config.train.steps=7", "--config.seed", "3", "--config.mesh.data", "-1"]
    found = parse("x", "", [f"--config={recipe}", *fields], takes=["config"]).recipe
    assert found.overrides == ("mesh.data", "seed", "train.steps")
    assert (found.config.train.steps, found.config.seed) == (7, 3)
    assert parse("x", "", [], takes=["config"]).recipe is None
    with pytest.raises(ValueError, match="3 is no flag"):
        parse("x", "", [f"--config={recipe}", "--config.seed=1", "3"], takes=["config"])
    with pytest.raises(ValueError, match="'false' is no flag; is it the value"):
        parse("x", "", [f"--config={recipe}", "--config.data.mirror", "false"], takes=["config"])
    with pytest.raises(ValueError, match="--config=FILE is needed"):
        parse("x", "", ["--config.seed=1"], takes=["config"])
