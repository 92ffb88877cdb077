"""What must hold for the project as a whole, whatever the models do."""

import ast
import datetime
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import munkey
import treediff

ROOT = Path(__file__).parents[1]
PACKAGES = {"treediff": treediff, "munkey": munkey}
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
PUBLIC_NAMES = sorted((package, name) for package, module in PACKAGES.items() for name in module.__all__)
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
each_package = pytest.mark.parametrize("package", PACKAGES)

# Imports the package with each warning an error, and tells what that did to the process.
IMPORT_REPORT = """
import json, random, sys
import numpy, torch  # what these two do is not under test

def state():
    generators = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()
    return generators, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

modules, before = set(sys.modules), state()
import munkey, treediff
print(json.dumps({"modules": sorted(set(sys.modules) - modules), "state kept": state() == before}))
"""


def test_versions_agree() -> None:
    """A development version has an open changelog section; a release has a dated one, cited with its date."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    assert len(re.findall(r"^version:", text, re.MULTILINE)) == 1
    assert citation["version"] == treediff.__version__

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", changelog, re.MULTILINE)
    headings = re.findall(r"^## .*$", changelog, re.MULTILINE)
    assert len(sections) == len(headings), f"expected headings like '## [1.2.3] - 2026-01-31', found {headings}"
    base, dev, _ = treediff.__version__.partition(".dev")
    if dev:
        assert sections[0] == ("Unreleased", "")
        assert base not in dict(sections), f"{base} is released already, so {treediff.__version__} is too low"
        assert "date-released" not in citation
    else:
        assert sections[0][0] == treediff.__version__
        assert datetime.date.fromisoformat(sections[0][1]) == citation["date-released"]


def test_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "treediff"
    assert citation["message"] and citation["authors"]
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])


@pytest.fixture(scope="module")
def import_run() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", IMPORT_REPORT]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_import_warns_of_nothing(import_run: subprocess.CompletedProcess[str]) -> None:
    assert (import_run.returncode, import_run.stderr) == (0, "")


def test_import_needs_no_extra(import_run: subprocess.CompletedProcess[str]) -> None:
    modules = {name.partition(".")[0] for name in json.loads(import_run.stdout)["modules"]}
    assert {"munkey", "treediff"} <= modules
    assert modules & {"faiss", "huggingface_hub", "matplotlib", "PIL", "scipy", "sklearn", "tqdm"} == set()


def test_import_keeps_the_global_state(import_run: subprocess.CompletedProcess[str]) -> None:
    assert json.loads(import_run.stdout)["state kept"]


def test_modules_import_only_declared_dependencies() -> None:
    """At the top of a module; what an extra brings is imported in the function that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    undeclared = set()
    for file in FILES:
        # The tree knows nothing of the memory.
        own = {"treediff"} if file.is_relative_to(ROOT / "treediff") else set(PACKAGES)
        allowed = declared | own | sys.stdlib_module_names
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                names = [statement.module or ""]
            else:
                continue
            undeclared |= {
                (str(file.relative_to(ROOT)), name) for name in names if name.partition(".")[0] not in allowed
            }
    assert undeclared == set()


@each_package
def test_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


@each_package
def test_tests_see_the_checkout(package: str) -> None:
    assert Path(str(PACKAGES[package].__file__)).parent == ROOT / package


@pytest.mark.parametrize(("package", "name"), PUBLIC_NAMES)
def test_public_name_exists_and_is_documented(package: str, name: str) -> None:
    documentation = getattr(PACKAGES[package], name).__doc__
    assert documentation, f"{package}.{name} has no docstring"
    assert not documentation.startswith(f"{name}("), f"{package}.{name} has only the docstring that @dataclass made"


@each_package
def test_all_is_complete_and_free_of_doubles(package: str) -> None:
    listed = PACKAGES[package].__all__
    assert len(set(listed)) == len(listed)
    public = {
        name
        for name, value in vars(PACKAGES[package]).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith(package)
    }
    assert public <= set(listed)


@each_file
def test_names_in_a_module_all_exist(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
    assert missing == []


@each_file
def test_docstring_examples_stand_under_their_heading(file: Path) -> None:
    """The documentation shows `>>>` lines as code only in a section named "Examples:"."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    loose = [
        getattr(node, "name", "the module")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, documented)
        and ">>> " in (text := ast.get_docstring(node) or "")
        and "Examples:" not in text.partition(">>> ")[0].splitlines()
    ]
    assert loose == []
