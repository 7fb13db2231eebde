from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hyperflexis import __version__, cli
from hyperflexis.config import ENGINE_ARGS


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    program = """
import sys
from hyperflexis.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {"pydantic", "torch", "aiohttp", "numpy", "msgspec", "tokenizers", "rich", "asyncio"} & set(sys.modules)
assert not heavy, heavy
"""
    source = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": source}, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert (f"\n    {name}" in done.stdout) == bool(command.help)
    assert "examples:" in done.stdout


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.help])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert name in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_an_error_for_people_is_one_message_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path / "nothing.yaml")]) == 2
    assert cli.main(["instance", "--engine", "emulated"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2
    assert "nothing.yaml" in error and "--profile" in error


def test_a_wrong_flag_says_where_help_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--fast", "x.yaml"])
    assert stop.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "emulated", "--threads", "2"], "--threads is not an option of engine emulated"),
        (["--engine", "emulated", "--seed", "x"], "--seed x: "),
        (["--engine", "torch"], "make-model"),
        (["--engine", "openai"], "--url"),
        (["--engine", "emulated", "--profile", "h999"], "h999"),
    ],
)
def test_mistakes_of_an_instance_by_hand(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["instance", *flags]) == 2
    assert words in capsys.readouterr().err


def test_every_engine_option_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["instance", "--help"])
    text = capsys.readouterr().out
    for options in ENGINE_ARGS.values():
        for name in options.model_fields:
            assert f"--{name.replace('_', '-')} " in text
