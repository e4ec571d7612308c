"""What commands say of themselves: examples that run, every key with its meaning, and no words of the parser."""

import re
import shlex

import pytest

from asa.cli import COMMANDS, main
from asa.cli.manual import examples, sections
from asa.config import compose, flatten

HYDRA = re.compile(r"\?\?\?|_target_|@package|_self_|_global_|\bdefaults\b|\boverride\b|\$\{")


@pytest.fixture
def shown(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit) as ended:
        COMMANDS[request.param].main(["--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def every_command(*names: str) -> pytest.MarkDecorator:
    """A test of each command, with its help in the first of some arguments if that is `shown`."""
    indirect = ["shown"] if "shown" in names else False
    return pytest.mark.parametrize(names, [(name,) * len(names) for name in COMMANDS], indirect=indirect)


@every_command("shown", "name")
def test_help_begins_with_three_examples_that_compose(shown: str, name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    usage, _, rest = shown.partition("\n\nexamples:\n")
    assert usage.startswith(f"usage: asa-{name} ") and usage.endswith(COMMANDS[name].about)
    lines = [line.strip() for line in rest.partition("\n\n")[0].splitlines()]
    reasons, commands = lines[::2], lines[1::2]
    assert len(commands) == 3 and all(reason.endswith(":") for reason in reasons)
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == f"asa-{name}"
        assert COMMANDS[name].main([*arguments, "--print"]) == 0, capsys.readouterr().err


@every_command("shown", "name")
def test_help_has_no_empty_section_and_shows_the_words_that_are_typed_without_a_key(shown: str, name: str) -> None:
    assert not any(section.keys == [] for section in sections(name))
    words = " ".join(map(str.upper, COMMANDS[name].words))
    assert f"[--traceback] {words and f'{words} '}key=value ...\n" in shown
    assert not re.search(r"\babove (is|are)\b", shown)  # the keys that a comment names are in another order there
    assert name != "finetune" or "asa://tiny-t1" in shown


@every_command("shown")
def test_help_has_no_words_of_the_parser_of_settings(shown: str) -> None:
    assert HYDRA.findall(shown) == []
    assert max(len(line) for line in shown.partition("settings:\n")[2].splitlines()) <= 110


@every_command("name")
def test_every_key_is_listed_once_with_its_meaning(name: str) -> None:
    for section in sections(name, every=True):
        assert [key.name for key in section.keys if not key.note] == [], section.title
    first, *groups = sections(name)
    others = [key for group in groups if group.title == "Others" for key in group.keys]
    names = [key.name for key in (*first.keys, *others)]
    assert len(names) == len(set(names)) and {key.name for key in first.keys if key.required} <= set(names)
    listed = {*names, *(key.name for group in groups for key in group.keys)}
    required = {key.name: "x" for key in first.keys if key.required}
    if name == "predict":
        del required["atlas"]
    for key in flatten(compose(name, [f"{key}={value}" for key, value in required.items()])):
        if not key.endswith("_target_") and not key.startswith("method.model."):
            parts = key.split(".")
            assert {".".join(parts[: end + 1]) for end in range(len(parts))} & listed, key


def test_required_keys_are_those_that_composing_asks_for() -> None:
    for name in COMMANDS:
        required = {key.name for key in sections(name)[0].keys if key.default == "required"}
        try:
            compose(name, [])
            asked = set()
        except ValueError as error:
            asked = set(str(error).partition(" has to be given")[0].split(", "))
        either = {"checkpoint", "atlas"} if name == "predict" else set()
        assert asked - either == required - {"labelled"}, name  # asa-run says itself what it needs


def test_the_keys_of_the_examples_come_first() -> None:
    keys = [key.name for key in sections("finetune")[0].keys]
    assert {"out", "data.store", "init", "experiment", "train.steps"} <= set(keys) and "transfer" not in keys
    assert "train.steps=5000" in examples("finetune")


@pytest.mark.parametrize("words", ["help", "prepare help", "help prepare", "run help"])
def test_help_is_asked_for_by_its_name_too(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    name = "-".join(["asa", *(word for word in words.split() if word != "help")])
    assert not ended.value.code and capsys.readouterr().out.startswith(f"usage: {name} ")
