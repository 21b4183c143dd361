# SPDX-License-Identifier: Apache-2.0
"""Call 6: the demo target with its real maps. Are the texts those of no speculation, and how fast do they come?

Texts are compared in fp32 with TRITON_ATTN, and in bf16 with it under VLLM_BATCH_INVARIANT=1. Token ids are kept: what
parts can be judged afterwards (vllm_hidden_transfer/bench/identity.py).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import ROOM, ROOT, Output, Row, need_gpu, need_kit, parser
from engines import BATCH_INVARIANT, Job, Setting, do, ngram, ours
from parts import PartsError, found, join

LIMIT = 225
NODES = 15
TOKENS = 128
MAPS = ROOT / "examples" / "smollm2-135m" / "hidden_transfer"
EXACT = ("fp32", "bf16 batch-invariant")
"""Jobs whose texts must be those of no speculation."""


def make_target() -> Path:
    """The demo target from its parked parts.

    Raises:
        PartsError: where one is missing, or what they hold cannot be read.
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    import demo_target

    folder, gguf = ROOM / "smollm2-135m", ROOM / "target.gguf"
    if not demo_target.is_good(folder):
        join(found(ROOM, gguf.name), gguf)
        if demo_target.file_sha256(gguf) != demo_target.GGUF_SHA256:
            raise PartsError("the joined target.gguf is not the demo target's.")
        folder.mkdir(exist_ok=True)
        try:
            demo_target.write_model(gguf, folder)
        except demo_target.DemoTargetError as error:
            raise PartsError(str(error)) from error
    return folder


def setting_of(tiny: bool) -> tuple[Setting, Path]:
    """What is served, and the maps."""
    if tiny:
        from tests.support.models import VOCABULARY, add_tokenizer, random_model

        target = random_model(ROOM / "tiny-chat", layers=3, vocabulary=VOCABULARY)
        add_tokenizer(target)
        small = replace(Setting.of(tiny), target=target)
        small = replace(small, options={**small.options, "skip_tokenizer_init": False})
        return small, small.maps()
    options = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory_bytes": 8 << 30}
    return Setting(make_target(), options, (1, 8, 32), 0, TOKENS, 8, ()), MAPS


def jobs_of(setting: Setting, maps: Path) -> list[Job]:
    """With and without speculation, the exact ones first."""
    nodes = 7 if setting.tiny else NODES
    kinds: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "fp32": ({"dtype": "float32"}, {}),
        "bf16 batch-invariant": ({"dtype": "bfloat16"}, BATCH_INVARIANT),
        "bf16": ({"dtype": "bfloat16"}, {}),
    }
    sides = {"off": {}, "maps": ours(nodes, maps), "n-gram": ngram(nodes)}
    jobs = []
    for kind, (more, environment) in kinds.items():
        if kind in EXACT and not setting.tiny:
            more["attention_backend"] = "TRITON_ATTN"
        for side, speculation in sides.items():
            if setting.tiny and (kind != "fp32" or side == "n-gram"):
                continue
            if kind in EXACT and side == "n-gram":
                continue
            rows = 0 if side == "off" else nodes
            engine = setting.engine(graph=True, nodes=rows, **more, **speculation)
            jobs.append(Job(f"{kind}, {side}", ("texts",), engine, 60, environment))
    return jobs


def compared(row: Row, reference: Row | None) -> Row:
    """A line of the table; reference: the same without speculation."""
    from vllm_hidden_transfer.bench.identity import parting

    tokens = sum(map(len, row["outputs"]))
    line = {
        "job": row["job"],
        "requests": row["requests"],
        "tokens/s": tokens / row["seconds"],
        "to off": None,
        "texts as off": None,
        "first parting (text, token)": None,
    }
    if reference is None:
        return line
    pairs = list(zip(row["outputs"], reference["outputs"], strict=True))
    partings = [
        (index, place)
        for index, place in enumerate(parting(*pair) for pair in pairs)
        if place is not None
    ]
    per_second = sum(map(len, reference["outputs"])) / reference["seconds"]
    line["to off"] = line["tokens/s"] / per_second
    line["texts as off"] = f"{len(pairs) - len(partings)} of {len(pairs)}"
    line["first parting (text, token)"] = str(partings[0]) if partings else None
    return line


def main() -> None:
    tiny = parser(__doc__, "--tiny").parse_args().tiny
    if not tiny:
        need_gpu("call 6")
    need_kit("call 6")
    output = Output("call6_demo")
    try:
        setting, maps = setting_of(tiny)
    except PartsError as error:
        sys.exit(f"call 6: {error}")
    output.say(f"the target is there after {output.seconds():.0f} s")
    do(output, setting, jobs_of(setting, maps), LIMIT)
    rows = output.results("texts")
    references = {
        (row["job"].removesuffix(", off"), row["requests"]): row
        for row in rows
        if row["job"].endswith(", off")
    }
    output.table(
        "real prompts, greedy",
        [
            compared(row, references.get((row["job"].split(", ")[0], row["requests"])))
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
