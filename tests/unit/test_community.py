# SPDX-License-Identifier: Apache-2.0
"""What is written for people and for a public host agrees with the sources and the Makefile."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import vllm_hidden_transfer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += [ROOT / "docs" / "developing.md", ROOT / ".github" / "pull_request_template.md"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.M))


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_has_one_place() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "vllm_hidden_transfer.__version__"
    }
    assert metadata.version("vllm-hidden-transfer") == vllm_hidden_transfer.__version__
    others = [*(ROOT / "vllm_hidden_transfer").rglob("*.py"), ROOT / "CITATION.cff"]
    written = [one for one in others if vllm_hidden_transfer.__version__ in one.read_text()]
    assert written == [ROOT / "vllm_hidden_transfer" / "__init__.py"]
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[0] == "Unreleased" or newest[0] == vllm_hidden_transfer.__version__


def test_every_requirement_has_a_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        assert re.search(r"==[\d.]+$|>=[\d.]+,<[\d.]+$", requirement), requirement


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_targets_files_and_tests_that_exist(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"^make ([a-z]+)", code(text), re.M)) <= TARGETS
    for path in re.findall(r"\b(?:scripts|tests|benchmarks|docs|patches)/[\w./]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def code(text: str) -> str:
    """What a page sets as code, one piece a line."""
    pieces = re.findall(r"`([^`]+)`|^    (.+)$", text, re.M)
    return "\n".join(one or other for one, other in pieces)


def test_the_workflow_calls_make_only() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert set(jobs) == {"lint", "unit", "engine"}
    ran = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {command.split()[1] for command in ran} == {"lint", "unit", "test"}
    assert all(re.fullmatch(r"make [a-z]+", command) for command in ran)
    for job in jobs.values():
        (python,) = [one for one in job["steps"] if "setup-python" in one.get("uses", "")]
        assert python["with"]["python-version"] == "3.11"


def test_hooks_run_what_lint_runs() -> None:
    lint = MAKEFILE.split("\nlint:")[1].split("\n\n")[0].replace("$(BIN)", ".venv/bin")
    (local,) = load(".pre-commit-config.yaml")["repos"]
    for hook in local["hooks"]:
        assert hook["entry"].removesuffix(" --force-exclude").replace("check .", "check") in lint
    assert {hook["id"] for hook in local["hooks"]} == {"ruff-check", "ruff-format", "mypy"}


def test_the_citation_names_both_papers() -> None:
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    papers = {one["url"].rpartition("/")[2]: one for one in citation["references"]}
    assert set(papers) == {"2404.12022", "2410.20488"}
    for number, paper in papers.items():
        assert paper["identifiers"][0]["value"] == f"arXiv:{number}"
        assert len(paper["authors"]) == 8


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_forms_have_what_a_host_needs(form: str) -> None:
    content = load(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= set(content)
    identifiers = [one["id"] for one in content["body"]]
    assert len(identifiers) == len(set(identifiers))
    for one in content["body"]:
        assert one["type"] in {"textarea", "dropdown", "checkboxes", "input"}
        assert one["attributes"]["label"]
