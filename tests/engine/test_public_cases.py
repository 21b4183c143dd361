# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests in which users of speculation elsewhere met faults: here they are as without speculation.

Each test is named for its case. The numbers of public reports are of vllm-project/vllm.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.doubles import planted
from tests.support.answers import Answer, ask, assert_same
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import counters_of, engine, planted_options, random_prompts
from tests.support.http_cases import assert_alike, post, stream
from tests.support.models import VOCABULARY, add_tokenizer, random_model
from tests.support.servers import ALWAYS, metric, serve

pytestmark = pytest.mark.engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONTEXT = 512
QUESTION = [{"role": "user", "content": "Say the days of the week in order."}]
MULTIBYTE = (
    "日本語の文章を書いてください。東京は日本の",
    "Les élèves français étaient à l'école, où ils",
    "Emoji of a party: 🎉🎊🥳🎉🎊🥳🎉🎊",
)


def text_of(chunks: Iterator[Any]) -> str:
    return "".join(c["choices"][0].get("text", "") for c in chunks if c["choices"])


def multibyte(url: str, target: Path) -> Any:
    replies = []
    for prompt in MULTIBYTE:
        body = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
        whole = post(url, COMPLETIONS, body)
        assert text_of(stream(url, COMPLETIONS, body)) == whole["choices"][0]["text"]
        replies.append(whole)
    return replies


def prompt_logprobs(url: str, target: Path) -> Any:
    """5890, 7742, 17876, 34497."""
    body = {"prompt": "The capital of France is", "temperature": 0, "logprobs": 3}
    echoed = [
        post(url, COMPLETIONS, {**body, "echo": True, "max_tokens": tokens})
        for tokens in (0, 1, 12)
    ]
    chat = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    in_chat = post(url, CHAT, {**chat, "prompt_logprobs": 2, "logprobs": True, "top_logprobs": 2})
    # How many tokens come in a chunk is speculation's own; what they are is not.
    parts: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for chunk in stream(url, COMPLETIONS, {**body, "max_tokens": 12}):
        found = chunk["choices"][0]["logprobs"] or {}
        for name, values in parts.items():
            values.extend(found.get(name, []))
    assert len(parts["tokens"]) == 12
    return [*echoed, in_chat, parts]


def full_context(url: str, target: Path) -> Any:
    """7047, 57941."""
    prompt = random_prompts(1, lengths=[490], vocabulary=40000)[0]
    replies = [
        post(
            url,
            COMPLETIONS,
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        )
        for tokens in (CONTEXT - 490, CONTEXT - 490 - 1)
    ]
    assert [reply["usage"]["total_tokens"] for reply in replies] == [CONTEXT, CONTEXT - 1]
    return replies


def embeddings(target: Path) -> torch.Tensor:
    """The target's own, [vocabulary, hidden size]."""
    with safe_open(target / "model.safetensors", "pt") as weights:
        table: torch.Tensor = weights.get_tensor("model.embed_tokens.weight").float()
    return table


def prompt_embeds(url: str, target: Path) -> Any:
    """57356."""
    table = embeddings(target)
    encoded = io.BytesIO()
    torch.save(table[random_prompts(1, lengths=[37], vocabulary=40000)[0]], encoded)
    body = {"prompt_embeds": base64.b64encode(encoded.getvalue()).decode(), "max_tokens": 24}
    embedded = [{**body, "temperature": 0}, {**body, "temperature": 0.8, "seed": 5}]
    text = {"prompt": "One, two, three,", "max_tokens": 40, "temperature": 0}
    alone = [post(url, COMPLETIONS, request) for request in embedded]
    return [*alone, *at_once(url, [*embedded, text])]


def at_once(
    url: str, bodies: list[dict[str, Any]], meanwhile: Callable[[str], None] | None = None
) -> list[Any]:
    """All replies to requests that run together; `meanwhile` is done in the middle of the answers."""
    replies: list[Any] = [None] * len(bodies)
    started = threading.Barrier(len(bodies) + 1)

    def run(index: int) -> None:
        chunks = stream(url, COMPLETIONS, bodies[index])
        choices = []
        for number, chunk in enumerate(chunks):
            if number == 2:
                started.wait(120)
            choices.extend(chunk["choices"])
        replies[index] = {
            "text": "".join(choice["text"] for choice in choices),
            "finish_reason": choices[-1]["finish_reason"],
        }

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    started.wait(120)
    if meanwhile is not None:
        meanwhile(url)
    for thread in threads:
        thread.join(240)
    return replies


LONG = [
    {"prompt": prompt, "max_tokens": 90, "temperature": 0, "ignore_eos": True}
    for prompt in ("Count: 1, 2, 3,", "Once upon a time", "def fibonacci(n):")
]


def kept(url: str) -> None:
    post(url, "/pause?mode=keep")
    with urllib.request.urlopen(f"{url}/is_paused", timeout=30) as reply:
        assert json.load(reply) == {"is_paused": True}
    before = metric(url, "vllm:generation_tokens_total")
    time.sleep(1)
    assert metric(url, "vllm:generation_tokens_total") == before
    post(url, "/resume")


def aborted(url: str) -> None:
    post(url, "/pause?mode=abort")
    post(url, "/resume")


def all_aborted(url: str) -> None:
    post(url, "/abort_requests", {"request_ids": []})


def pauses(url: str, target: Path) -> Any:
    """What is aborted is the beginning of the answer; what is kept, and asked again, is the answer."""
    whole = [post(url, COMPLETIONS, body)["choices"][0]["text"] for body in LONG]
    after_pause = at_once(url, LONG, kept)
    assert [reply["text"] for reply in after_pause] == whole
    for end in (aborted, all_aborted):
        for reply, text in zip(at_once(url, LONG, end), whole, strict=True):
            assert reply["finish_reason"] == "abort"
            assert text.startswith(reply["text"])
    assert [reply["text"] for reply in at_once(url, LONG)] == whole
    return whole


CASES: dict[str, Callable[[str, Path], Any]] = {
    "multibyte": multibyte,
    "prompt_logprobs": prompt_logprobs,
    "full_context": full_context,
    "prompt_embeds": prompt_embeds,
    "pauses": pauses,
}
Replies = dict[str, Any]


def outcome(case: Callable[[str, Path], Any], url: str, target: Path) -> Any:
    """What a case gave; its failure waits for the test of its name."""
    try:
        return case(url, target)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def replies(demo_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Replies, Replies]:
    """Every case's replies of a server without and of one with speculation."""
    folder = tmp_path_factory.mktemp("servers")
    options = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--enable-prompt-embeds")
    both = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /pause
        for name, way in (("off", ()), ("on", ALWAYS)):
            with serve(demo_target, *options, *way, log=folder / f"{name}.log") as url:
                both.append({case: outcome(CASES[case], url, demo_target) for case in CASES})
                assert (metric(url, "vllm:spec_decode_num_accepted_tokens_total") > 100) == bool(
                    way
                )
    return both[0], both[1]


@pytest.mark.matrix
@pytest.mark.xdist_group("public_cases")
@pytest.mark.parametrize("case", CASES)
def test_over_http(case: str, replies: tuple[Replies, Replies]) -> None:
    for reply in (replies[0][case], replies[1][case]):
        if isinstance(reply, Exception):
            raise reply
    assert_alike(replies[0][case], replies[1][case])
    if case == "multibyte":
        texts = [reply["choices"][0]["text"] for reply in replies[0][case]]
        assert any(ord(letter) > 127 for text in texts for letter in text)
        assert not any("�" in text for text in texts)


def in_process(llm: Any, target: Path) -> dict[str, list[Answer]]:
    """Multi-byte text, log-probabilities of prompts, a nearly full context, and embedded prompts, without a server."""
    from vllm import SamplingParams

    from tests.support.answers import answers_of

    table = embeddings(target)
    long, short = random_prompts(2, lengths=[490, 37], vocabulary=40000)
    embedded = {"prompt_embeds": table[short]}
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40}
    seeded = {**greedy, "temperature": 0.8, "seed": 5}
    scored = {**greedy, "logprobs": 3, "prompt_logprobs": 2}
    to_the_end = {**greedy, "ignore_eos": True}
    cases: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "multibyte": [(text, greedy) for text in MULTIBYTE],
        "prompt_logprobs": [
            ("The capital of France is", {**scored, "max_tokens": tokens}) for tokens in (1, 12)
        ],
        "full_context": [
            ({"prompt_token_ids": long}, {**to_the_end, "max_tokens": CONTEXT - 490 - less})
            for less in (0, 1)
        ],
        "embeddings alone": [(embedded, greedy)],
        "embeddings beside text": [(embedded, greedy), (embedded, seeded), ("One, two,", greedy)],
    }
    found = {}
    for name, requests in cases.items():
        prompts = [prompt for prompt, _ in requests]
        sampling = [SamplingParams(**each) for _, each in requests]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found[name] = [answer for output in outputs for answer in answers_of(output)]
    assert [len(answer.token_ids) for answer in found["full_context"]] == [22, 21]
    return found


def test_without_a_server(demo_target: Path) -> None:
    """5890, 7742, 17876, 34497 (log-probabilities of prompts), 7047, 57941 (contexts), 57356 (embeddings)."""
    options = {
        "skip_tokenizer_init": False,
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        "max_model_len": CONTEXT,
    }
    with engine(demo_target, **options) as llm:
        reference = in_process(llm, demo_target)
    way = {"speculative_config": {"method": "hidden_transfer", "always_draft": True}}
    with engine(demo_target, **options, **way) as llm:
        answers = in_process(llm, demo_target)
        assert counters_of(llm).accepted_tokens > 50
    for name, expected in reference.items():
        assert_same(expected, answers[name])
    texts = [answer.text for answer in reference["multibyte"]]
    assert any(ord(letter) > 127 for text in texts for letter in text)
    assert not any("�" in text for text in texts)


CROWDED: dict[str, Any] = {
    "scheduling_policy": "priority",
    "num_gpu_blocks_override": 11,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": False,
}
PROCESSED = {
    "temperature": 0.8,
    "top_k": 50,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "logit_bias": {7: 4.0},
    "logprobs": 5,
}


def crowded(llm: Any) -> tuple[list[Answer], float]:
    """Nine requests of falling urgency, four at a time, greedy and with processed log-probabilities; and how often
    one was preempted."""
    from vllm import SamplingParams

    from tests.support.answers import answers_of

    sampling = [
        SamplingParams(
            max_tokens=60,
            ignore_eos=True,
            detokenize=False,
            **({"seed": index, **PROCESSED} if index % 2 else {"temperature": 0.0, "logprobs": 5}),
        )
        for index in range(9)
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in random_prompts(9, lengths=[50] * 9)]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, priority=[*range(9, 0, -1)])
    preemptions = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return [answer for output in outputs for answer in answers_of(output)], preemptions


def test_priorities_and_processed_logprobs(random_target: Path, tmp_path: Path) -> None:
    """9342, 28558 (requests preempted for want of blocks) and 26060 (--logprobs-mode processed_logprobs)."""
    with engine(random_target, **CROWDED) as llm:
        reference, preemptions = crowded(llm)
    assert preemptions > 0
    sequences = [answer.sequence for answer in reference]
    planted.write_answers(tmp_path / "answers.json", sequences, VOCABULARY)
    with engine(random_target, **CROWDED, **planted_options(16)) as llm:
        answers, preemptions = crowded(llm)
    assert preemptions > 0
    assert_same(reference, answers)


WAYS: dict[str, list[str]] = {
    "a trailing slash": ["--speculative-model", "{checkpoint}/"],
    "dotted options": [
        "--speculative-config.method",
        "hidden_transfer",
        "--speculative-config.model",
        "{checkpoint}",
        "--speculative-config.num_speculative_tokens",
        "5",
    ],
    "a file of options": ["--config", "{options}"],
}


@pytest.mark.parametrize("way", WAYS)
def test_names_of_folders_and_options(way: str, random_target: Path, tmp_path: Path) -> None:
    """A target with spaces in its path, reached through a link, and the other ways to name its maps."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (tmp_path / "a folder").mkdir()
    target = tmp_path / "a folder" / "the target"
    target.symlink_to(random_target)
    checkpoint = random_checkpoint(tmp_path / "some maps", random_target)
    options = tmp_path / "options.yaml"
    options.write_text(f"speculative-model: {checkpoint}\nmax-num-seqs: 3\n")
    filled = [each.format(checkpoint=checkpoint, options=options) for each in WAYS[way]]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    known = ["--model", str(target), "--skip-tokenizer-init", "--dtype", "float32"]
    config = AsyncEngineArgs.from_cli_args(
        parser.parse_args([*known, *filled])
    ).create_engine_config()
    assert Path(config.additional_config["hidden_transfer"]["checkpoint"]) == checkpoint
    assert config.model_config.model == str(target)


ODD: dict[str, tuple[int, dict[str, Any]]] = {
    "16 nodes with 8 batched tokens": (16, {"max_num_batched_tokens": 8, "max_num_seqs": 4}),
    "256 nodes with 64 batched tokens": (256, {"max_num_batched_tokens": 64}),
    "1 node and 1 request": (1, {"max_num_seqs": 1}),
    "blocks of 128": (16, {"block_size": 128}),
    "float16": (16, {"dtype": "float16"}),
}


@pytest.mark.matrix
@pytest.mark.parametrize("size", ODD)
def test_odd_sizes(size: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """50708."""
    from vllm.sampling_params import StructuredOutputsParams

    nodes, options = ODD[size]
    target = add_tokenizer(random_model(tmp_path_factory.mktemp("odd") / "llama"))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="[a-z]{30}")},
    ]
    sampling = [{"max_tokens": 40, **kinds[index % 3]} for index in range(6)]
    prompts = random_prompts(6, lengths=(5, 20, 33, 60, 31, 90))
    # Stock dies of a seeded prompt in chunks (test_stock_bugs.py), and half precision is asked one by one, because
    # stock's own texts depend on the batch.
    whole = {**options, "max_num_batched_tokens": 512, "skip_tokenizer_init": False}
    group = 1 if "dtype" in options else len(prompts)

    def answers(llm: Any) -> list[Answer]:
        starts = range(0, len(prompts), group)
        parts = [ask(llm, prompts[i : i + group], sampling[i : i + group]) for i in starts]
        return [answer for part in parts for answer in part]

    with engine(target, **whole) as llm:
        reference = answers(llm)
    sequences = [answer.sequence for answer in reference]
    planted.write_answers(tmp_path / "answers.json", sequences, VOCABULARY)
    with engine(target, **{**whole, **options}, **planted_options(nodes)) as llm:
        assert_same(reference, answers(llm))
