# SPDX-License-Identifier: Apache-2.0
"""Only a command ends the process: a library that does takes its caller, and what it had computed, with it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vllm_hidden_transfer"
EXITS = {"sys.exit", "os._exit", "exit", "quit", "SystemExit", "typer.Exit"}


def exits_of(source: str) -> list[int]:
    """Lines that end the process, but for those behind ``if __name__ == "__main__"``."""
    tree = ast.parse(source)
    body = [node for node in tree.body if not _is_main(node)]
    return [
        node.lineno
        for part in body
        for node in ast.walk(part)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in EXITS)
        or (isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc) in EXITS)
    ]


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def test_exits_are_seen() -> None:
    assert exits_of("import sys\ndef f():\n    sys.exit(1)\n") == [3]
    assert exits_of("def f():\n    raise SystemExit\n") == [2]
    assert exits_of("if __name__ == '__main__':\n    sys.exit(main())\n") == []


def test_only_the_command_line_ends_the_process() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parts[len(PACKAGE.parts)] not in ("cli", "patches")
        for line in exits_of(path.read_text(encoding="utf-8"))
    ]
    assert not found
