# SPDX-License-Identifier: Apache-2.0
"""README and docs as tests read them: commands, code, links, headings."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "not run by a test"
NO_COMMANDS = {"text", "python", "json"}
"""Languages of fenced blocks that show something else than commands."""


@dataclass(frozen=True)
class Command:
    """One command of a page, its continued lines joined."""

    page: str
    text: str
    comment: str

    @classmethod
    def of(cls, page: Path, line: str) -> Command:
        text, _, comment = line.partition(" #")
        return cls(page.name, " ".join(text.split()), comment.strip())

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands(page: Path) -> list[Command]:
    """Every line of every block of commands: fenced ones without another language, and indented ones."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(_block_lines(page.read_text())))
    return [Command.of(page, line) for line in joined.splitlines() if line.strip()]


def _block_lines(text: str) -> list[str]:
    found: list[str] = []
    fence: str | None = None
    indented, blank = False, True
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence is not None:
            found += [] if fence in NO_COMMANDS else [line]
        else:
            indented = line.startswith("    ") and (indented or blank)
            found += [line] if indented else []
        blank = not line.strip()
    return found


def prose(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def code(text: str) -> list[str]:
    """What a page sets as code within its prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Links that lead to no other site."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as public hosts make them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
