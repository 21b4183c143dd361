# SPDX-License-Identifier: Apache-2.0
"""Call 3: join and unpack the kit, import what the calls behind need, and stand our kernel beside vLLM's own."""

from __future__ import annotations

import sys
import tomllib

from common import INTERPRETED, KIT, ROOM, ROOT, Output, need_gpu, parser
from parts import PartsError, found, unpack

IMPORT_SECONDS, EXACT_SECONDS, BESIDE_SECONDS = 50, 40, 60


def announce_plugin() -> None:
    """Let vLLM find the plugin by its entry point: the machine has this checkout, but nobody installed it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = KIT / "vllm_hidden_transfer-0.dist-info"
    folder.mkdir(exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n"
    (folder / "METADATA").write_text(about)
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def report(output: Output) -> None:
    for row in output.results("import"):
        output.say(f"  {row['name']}: {row['found'] if row['said'] is None else row['said'][:200]}")
    missing = [row["name"] for row in output.results("import") if row["said"] is not None]
    output.say(f"missing: {', '.join(map(str, missing)) or 'nothing'}")
    for row in output.results("exact"):
        output.say(f"exact rows, {row['name']}: {row['found'] or row['said'][:200]}")
    rows = output.results("beside")
    names = ("requests", "context", "K")
    output.table(
        "one layer, the engine's launch beside stock's, medians of CUDA graph replays",
        [
            dict(zip(names, row["name"], strict=True)) | row["found"]
            for row in rows
            if row["said"] is None
        ],
    )
    for row in [row for row in rows if row["said"] is not None][:5]:
        output.say(f"  {row['name']}: {row['said'][:200]}")


def main() -> None:
    quick = parser(__doc__, "--quick").parse_args().quick
    if not quick:
        need_gpu("call 3")
    output = Output("call3_unpack")
    device, env = ("cpu", INTERPRETED) if quick else ("cuda", {})
    if not quick:
        try:
            unpack(found(ROOM, "kit.tar.xz"), KIT)
        except PartsError as error:
            sys.exit(f"call 3: {error}")
        announce_plugin()
        size = sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file())
        output.say(f"unpacked {size >> 20} MiB after {output.seconds():.0f} s")
    for kind, seconds in (
        ("imports", IMPORT_SECONDS),
        ("exact", EXACT_SECONDS),
        ("beside", BESIDE_SECONDS),
    ):
        output.child(kind, ["stock_child.py", kind, device], seconds, env)
        output.say(f"{kind}: {output.seconds():.0f} s after the start")
    report(output)


if __name__ == "__main__":
    main()
