# SPDX-License-Identifier: Apache-2.0
"""The command `generate` with real vLLM: answers, a second sitting, and what vLLM says when asked directly."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.support import engines
from tests.support.models import add_tokenizer, random_model
from vllm_hidden_transfer.offline.cache import Example, is_held_out, read_examples
from vllm_hidden_transfer.training.generate import GenerateSettings, answer_with, generate
from vllm_hidden_transfer.training.prompts import Prompt, requests_of

pytestmark = pytest.mark.engine

COMMAND = Path(sys.executable).with_name("vllm-hidden-transfer")
TOKENS = 24


def test_two_sittings_and_the_target_itself(tmp_path: Path) -> None:
    target = add_tokenizer(random_model(tmp_path / "target", layers=4))
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    texts = prompts_of_which_the_fourth_is_held_out(target)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings = GenerateSettings(
        target=str(target),
        prompts=(prompts,),
        output=output,
        max_tokens=TOKENS,
        dtype="float32",
        batch=2,
        kv_cache_memory_bytes=1 << 28,
    )
    options = {
        "--target": target,
        "--prompts": prompts,
        "--output": output,
        "--max-tokens": TOKENS,
        "--dtype": "float32",
        "--batch": 2,
        "--kv-cache-memory-bytes": 1 << 28,
        "--limit": 3,
    }
    given = [str(part) for option in options.items() for part in option]
    result = subprocess.run([str(COMMAND), "generate", *given], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    first = output.read_text()
    assert first.count("\n") == 3
    with engines.engine(target, skip_tokenizer_init=False) as llm:
        console = Console(file=StringIO())
        generate(settings, console, lambda settings, length: answer_with(llm, settings))
        assert output.read_text().startswith(first)
        examples = read_examples(output, min_answer=1)
        # Two sittings take turns as one: the fourth prompt is held out, and those begin anew.
        assert [example.temperature for example in examples] == [0.0, 0.8, 0.0, 0.0, 0.8, 0.0]
        greedy = [example for example in examples if example.temperature == 0]
        asked = engines.generate(
            llm, [e.prompt for e in greedy], max_tokens=TOKENS, ignore_eos=False
        )
        assert [example.answer for example in greedy] == asked.outputs
        # The sampled one of the first sitting comes out again: its seed is its own.
        again = generate_again(llm, settings, tmp_path / "again.jsonl")
    assert again == examples


def prompts_of_which_the_fourth_is_held_out(target: Path) -> list[str]:
    """Six prompts; their tokens decide."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [f"def f{number}(x): " * (number % 6 + 1) for number in range(200)]
    prompts = [Prompt(str(number), "code", text) for number, text in enumerate(texts)]
    asked = requests_of(prompts, tokenizer, [0.0], 0)
    held_out = {number for number, one in enumerate(asked) if is_held_out(one.tokens)}
    others = [text for number, text in enumerate(texts) if number not in held_out]
    return [*others[:3], texts[min(held_out)], *others[3:5]]


def generate_again(llm: Any, settings: GenerateSettings, output: Path) -> list[Example]:
    settings = settings.model_copy(update={"output": output, "batch": 6})
    generate(settings, Console(file=StringIO()), lambda settings, _: answer_with(llm, settings))
    return read_examples(output, min_answer=1)
