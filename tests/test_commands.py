"""Every command line in the text and in the makefiles is one that its script takes: options, choices and numbers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    f"{folder}/{path.name}"
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()  # others are what scripts share
)
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
TEXTS = [*PAGES, ROOT / "Makefile", *(ROOT / script for script in SCRIPTS)]
OF_OTHERS = {"--no-deps", "--nproc-per-node"}  # pip, torchrun
COMMAND = re.compile(r"\b((?:examples|benchmarks)/\w+\.py)( --[^\n`]*)")


class Found(Exception):
    """The parser of a script, where the script would have begun."""


def stop(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
    raise Found(parser)


def refuse(message: str) -> NoReturn:
    raise ValueError(message)


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """What a script parses its command line with; options have to be written out."""
    module = importlib.import_module(Path(script).stem)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module.main()
    parser: argparse.ArgumentParser = found.value.args[0]
    parser.allow_abbrev, parser.error = False, refuse  # type: ignore[method-assign]
    return parser


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Scripts and the options behind them, if any."""
    lines = re.sub(r"\s*\\\n\s*", " ", text)
    return [(script, shlex.split(rest, comments=True)) for script, rest in COMMAND.findall(lines)]


def wrong(text: str) -> list[str]:
    """Command lines that their script would refuse, and why."""
    found = []
    for script, words in commands(text):
        try:
            parser_of(script).parse_args(words)
        except ValueError as error:
            found.append(f"{script} {shlex.join(words)}: {error}")
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_a_text_are_taken(path: Path) -> None:
    assert wrong(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_a_sentence_are_those_of_some_script(page: Path) -> None:
    known = {option for script in SCRIPTS for option in parser_of(script)._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
    assert named - known - OF_OTHERS == set()


def test_commands_of_the_recorded_results_are_taken() -> None:
    command = ["make", "-n", "-f", "benchmarks/results.mk", "OUT=made", "CIFAR=cifar.npz", "TREEDIFF_DATA=data"]
    command += [
        "FEATURES=data/ham.npz data/adult.npz data/fashion-{seed}.npz",
        "HAM=ham.npz",
        "PNEUMONIA=pneumonia.npz",
        "FLOWERS=flowers.npz",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert len(commands(done.stdout)) > 30 and wrong(done.stdout) == []


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in PAGES) > 30
    told = "run `examples/forget.py --nothing 3`, python examples/generate.py --ste 5 \\\n    --count 3  # --more"
    first, second = wrong(told)
    assert first.startswith("examples/forget.py --nothing 3: ")
    assert second == "examples/generate.py --ste 5 --count 3: unrecognized arguments: --ste 5"
    (choice,) = wrong("examples/generate.py --away-from parents")
    assert "invalid choice: 'parents'" in choice


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_asked_for_help(script: str) -> None:
    assert parser_of(script).format_help()
