# SPDX-License-Identifier: Apache-2.0
"""Ways into a server that other tests do not take: what comes back is as without speculation."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.doubles import planted
from tests.matrix.settings import reasoning_target
from tests.support.engines import PLANTED, Texts, assert_identical
from tests.support.http_cases import assert_alike, post, stream
from tests.support.models import VOCABULARY, random_adapter
from tests.support.servers import ALWAYS, VLLM, chat, metric, serve

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PLANTS = (
    "--speculative-config",
    json.dumps({"method": "hidden_transfer", "num_speculative_tokens": 16}),
    "--additional-config",
    json.dumps({"hidden_transfer": {"draft_source": PLANTED}}),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint a wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A random target whose tokenizer knows the beginning and the end of reasoning."""
    return reasoning_target(tmp_path)


def sequences_of(replies: Any) -> Iterator[list[int]]:
    """Prompt and answer of all replies that tell their token ids."""
    if isinstance(replies, list):
        for each in replies:
            yield from sequences_of(each)
    elif isinstance(replies, dict):
        for choice in replies.get("choices", ()):
            prompt: list[int] = choice.get("prompt_token_ids") or replies["prompt_token_ids"]
            yield [*prompt, *choice["token_ids"]]
        yield from sequences_of([each for key, each in replies.items() if key != "choices"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool_calls(url: str) -> dict[str, Any]:
    """Tools by every choice, after reasoning that ends of itself (a bias) and within the answer."""
    named = {"type": "function", "function": {"name": "paint"}}
    replies: dict[str, Any] = {}
    for choice in ("auto", "required", named):
        for seed in (None, 4):
            body = {
                "messages": [{"role": "user", "content": "Which colour shall the wall have?"}],
                "tools": [TOOL],
                "tool_choice": choice,
                "max_tokens": 100,
                "return_token_ids": True,
                "logit_bias": {str(VOCABULARY + 1): 7},
                "temperature": 0 if seed is None else 0.8,
                "seed": seed,
            }
            name = choice if isinstance(choice, str) else "named"
            replies[f"{name} {seed}"] = post(url, CHAT, body)
            streamed = {"content": "", "reasoning": "", "arguments": ""}
            for chunk in stream(url, CHAT, {**body, "return_token_ids": False}):
                delta = chunk["choices"][0]["delta"]
                for key in ("content", "reasoning"):
                    streamed[key] += delta.get(key) or ""
                for call in delta.get("tool_calls") or ():
                    streamed["arguments"] += call["function"].get("arguments") or ""
            replies[f"{name} {seed} streamed"] = {"parts": streamed}
    return without_call_ids(replies)


def without_call_ids(replies: Any) -> Any:
    """Calls get random ids."""
    if isinstance(replies, list):
        return [without_call_ids(each) for each in replies]
    if not isinstance(replies, dict):
        return replies
    return {
        key: [{**call, "id": ""} for call in each]
        if key == "tool_calls" and each
        else without_call_ids(each)
        for key, each in replies.items()
    }


def adapters(url: str, folder: Path, target: Path) -> list[Any]:
    """An adapter that is loaded while the server runs, and the base model before and after it.

    Not beside it: stock 0.32 on CPUs applies an adapter to requests without one in the same batch.
    """
    body = {"prompt": "def first(values):", "max_tokens": 30, "temperature": 0}
    asked = {**body, "return_token_ids": True}
    base = post(url, COMPLETIONS, asked)
    path = str(random_adapter(folder / "adapter", target))
    post(url, "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": path})
    adapted = post(url, COMPLETIONS, {**asked, "model": "late"})
    post(url, "/v1/unload_lora_adapter", {"lora_name": "late"})
    after = post(url, COMPLETIONS, asked)
    assert adapted["choices"][0]["text"] != base["choices"][0]["text"]
    assert after["choices"][0]["text"] == base["choices"][0]["text"]
    return [base, adapted]


def quick_chat(url: str) -> str:
    """``vllm chat`` as a user types it."""
    done = subprocess.run(
        [str(VLLM), "chat", "--url", f"{url}/v1", "-q", "Tell me a story of a fox."],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@dataclass
class Stored:
    """The KV cache's blocks, as a subscriber to its events learns of them."""

    blocks: dict[Any, tuple[Any, tuple[int, ...]]] = field(default_factory=dict)
    """hash -> (hash of the block before, tokens)"""

    def read(self, subscriber: Any) -> None:
        while subscriber.poll(1000):
            *_, payload = subscriber.recv_multipart()
            for kind, *event in msgspec.msgpack.decode(payload)[1]:
                if kind == "BlockStored":
                    self._store(*event[:4])

    def _store(self, hashes: list[Any], parent: Any, tokens: list[int], size: int) -> None:
        for place, block in enumerate(hashes):
            own = tuple(tokens[place * size : (place + 1) * size])
            assert self.blocks.setdefault(block, (parent, own)) == (parent, own)
            parent = block


def test_tools_reasoning_adapters_events_and_chat(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tool calls behind a reasoning parser, an adapter loaded at run time, ``vllm chat``, and KV events.

    With speculation the last full block of an answer may be missing in the events, because blocks are cached when the
    next pass is planned and an answer that ends within a path has no next pass; none is stored that stock does not
    store.
    """
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # of block hashes
    port = free_port()
    events = {"enable_kv_cache_events": True, "endpoint": f"tcp://127.0.0.1:{port}"}
    options = (
        *("--dtype", "float32", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3", "--enable-lora", "--max-lora-rank", "8"),
        *("--kv-events-config", json.dumps(events)),
        *(
            "--generation-config",
            "vllm",
            "--override-generation-config",
            '{"temperature": 0, "max_new_tokens": 60}',
        ),
    )
    planted.write_answers(tmp_path / "answers.json", [], VOCABULARY)
    both: list[Any] = []
    blocks: list[Stored] = []
    for name, way in (("off", ()), ("on", PLANTS)):
        with contextlib.ExitStack() as stack:
            # vLLM's publisher binds to addresses with a star only, and connects to any other.
            subscriber = stack.enter_context(zmq.Context().socket(zmq.SUB))
            subscriber.setsockopt(zmq.SUBSCRIBE, b"")
            subscriber.bind(f"tcp://127.0.0.1:{port}")
            url = stack.enter_context(serve(target, *options, *way, log=tmp_path / f"{name}.log"))
            found = {
                "tools": tool_calls(url),
                "adapters": adapters(url, tmp_path, target),
                "chat": quick_chat(url),
            }
            stored = Stored()
            stored.read(subscriber)
            accepted = metric(url, ACCEPTED)
        assert (accepted > 100) == bool(way)
        both.append(found)
        blocks.append(stored)
        planted.write_answers(tmp_path / "answers.json", [*sequences_of(found)], VOCABULARY)
    called = [
        reply["choices"][0]["message"]
        for name, reply in both[0]["tools"].items()
        if "choices" in reply
    ]
    assert any(message.get("tool_calls") for message in called)
    assert any(message.get("reasoning") for message in called)
    assert_alike(*both)
    without, with_drafts = (stored.blocks for stored in blocks)
    assert with_drafts.items() <= without.items()
    assert len(with_drafts) > len(without) / 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "way",
    [
        ("--data-parallel-size", "2"),
        ("--api-server-count", "2"),
        ("--data-parallel-size", "2", "--api-server-count", "2"),
    ],
    ids=" ".join,
)
def test_several_processes(way: tuple[str, ...], demo_target: Path, tmp_path: Path) -> None:
    questions = [
        "Name three colours.",
        "What is 12 plus 30?",
        "Write one sentence about bread.",
        "Who was Ada Lovelace?",
    ]
    options = ("--dtype", "float32", "--speculative-model", "hidden_transfer")
    texts = []
    for name, more in (("off", ()), ("on", (*way, *options[2:]))):
        with (
            serve(
                demo_target, *options[:2], *more, log=tmp_path / f"{name}.log", seconds=800
            ) as url,
            ThreadPoolExecutor() as pool,
        ):
            texts.append(list(pool.map(lambda question: chat(url, [question])[0], questions * 2)))
    assert texts[0] == texts[1]
    log = (tmp_path / "on.log").read_text()
    assert log.count("hidden_transfer is on") == (2 if "--data-parallel-size" in way else 1)


LONG = 2800
"""Tokens of the longest prompt."""


def test_long_prompts_with_stock_kv_split_and_two_threads(
    demo_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user's ``vllm serve`` runs with: attention splits long contexts, and shares them among threads."""
    monkeypatch.delenv("VLLM_CPU_ATTN_SPLIT_KV", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    sentence = "On day {} the traveller counted {} birds and wrote a line about the weather. "
    story = "".join(sentence.format(day, day * 7 % 50) for day in range(LONG // 16))
    options = (
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
        "--kv-cache-memory-bytes",
        str(1 << 30),
    )
    bodies = [
        {"prompt": story[-length:], "max_tokens": 48, "temperature": 0, "return_token_ids": True}
        for length in (len(story), len(story) // 2, 300)
    ]
    both: list[list[Any]] = []
    ways: dict[str, tuple[str, ...]] = {"off": (), "on": ALWAYS}
    for name, way in ways.items():
        with (
            serve(demo_target, *options, *way, log=tmp_path / f"{name}.log") as url,
            ThreadPoolExecutor() as pool,
        ):
            both.append(list(pool.map(lambda body: post(url, COMPLETIONS, body), bodies)))
            assert (metric(url, ACCEPTED) > 40) == bool(way)
    choices = [[reply["choices"][0] for reply in replies] for replies in both]
    prompts = [choice["prompt_token_ids"] for choice in choices[0]]
    off, on = ([choice["token_ids"] for choice in side] for side in choices)
    assert_identical(Texts(prompts, off), Texts(prompts, on), demo_target, max_model_len=4096)
