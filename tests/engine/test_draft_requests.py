# SPDX-License-Identifier: Apache-2.0
"""What each request's drafts are made of: its own LoRA adapter, its own draft rows, the checkpoint's calibration.

One engine drafts for two adapters in turn, with prompts of one length whose draft rows reach beyond their blocks, so
that all of them need scratch at once. What it drafted is compared with an independent draft pass in transformers, with
the adapter merged into the weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.test_draft_pass import assert_best_trees, reference_draft_logits
from tests.support.answers import ask
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import SMALL, counters_of, engine, planted_options, random_prompts
from tests.support.models import add_tokenizer, random_adapter, random_model
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource
from vllm_hidden_transfer.tree import TokenTree

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner

pytestmark = pytest.mark.engine

CHECKPOINT_VARIABLE = "VLLM_HIDDEN_TRANSFER_TEST_CHECKPOINT"
TEMPERATURES = (0.3, 0.3, 0.3, 0.3)
"""Random targets draft flatly, and their best trees are all roots. So sharp a calibration makes deep trees the best:
those of the uncalibrated drafts are worth 0.5 to 0.7 of them."""
NUM_PROMPTS, NUM_TOKENS, BUDGET = 4, 10, 8
PROMPT_TOKENS = SMALL["block_size"] - 2
"""The first draft rows of every request end in a block that it does not have."""


@dataclass(frozen=True)
class Drafted:
    """One request's draft pass."""

    tokens: np.ndarray
    """Its tokens, the one just sampled included."""
    logits: torch.Tensor
    """[k, vocabulary]"""
    tree: TokenTree


class RecordingSource(TransferSource):
    """Real drafts, which are kept."""

    drafted: list[Drafted]

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        super().__init__(runner, os.environ[CHECKPOINT_VARIABLE])
        RecordingSource.drafted = []

    def draft_logits(self, batch: DraftBatch, columns: torch.Tensor | None) -> torch.Tensor:
        self._logits = super().draft_logits(batch, columns)
        return self._logits

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        trees = super().propose(batch)
        rows = zip(batch.token_ids, self._logits, trees, strict=True)
        self.drafted += [Drafted(ids.copy(), row.clone(), tree) for ids, row, tree in rows]
        return trees


@dataclass(frozen=True)
class Run:
    """What the engine drafted, and the target that it drafted with."""

    target: Path
    checkpoint: Path
    adapters: list[Path]
    prompts: list[list[int]]
    drafted: list[Drafted]

    @cached_property
    def models(self) -> list[Any]:
        """transformers' model with each adapter merged into its weights."""
        return [merged(self.target, adapter) for adapter in self.adapters]

    def adapter_of(self, drafted: Drafted) -> int:
        """Which adapter the request asked for."""
        return self.prompts.index(drafted.tokens[:PROMPT_TOKENS].tolist()) % len(self.adapters)


def merged(target: Path, adapter: Path) -> Any:
    """The target with a LoRA adapter merged into its weights, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    )
    about = json.loads((adapter / "adapter_config.json").read_text())
    scale = about["lora_alpha"] / about["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, before in tensors.items():
            if ".lora_A." in name:
                after = tensors[name.replace(".lora_A.", ".lora_B.")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(module).weight += scale * (after @ before).float()
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    target = add_tokenizer(random_model(folder / "target"))
    checkpoint = random_checkpoint(folder / "maps", target, temperatures=TEMPERATURES)
    adapters = [random_adapter(folder / f"adapter-{seed}", target, seed) for seed in (1, 2)]
    asked = [LoRARequest(path.name, at, str(path)) for at, path in enumerate(adapters, start=1)]
    prompts = random_prompts(NUM_PROMPTS, seed=5, lengths=[PROMPT_TOKENS] * NUM_PROMPTS)
    options = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 2,
        "skip_tokenizer_init": False,
        **planted_options(BUDGET, f"{RecordingSource.__module__}:{RecordingSource.__name__}"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECKPOINT_VARIABLE, str(checkpoint))
        with engine(target, **options) as llm:
            sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
            lora = [asked[index % 2] for index in range(NUM_PROMPTS)]
            ask(llm, prompts, [sampling] * NUM_PROMPTS, lora)
            assert counters_of(llm).drafts > NUM_PROMPTS
    return Run(target, checkpoint, adapters, prompts, RecordingSource.drafted)


@torch.inference_mode()
def off(run: Run, drafted: Drafted, adapter: int) -> float:
    """Largest difference of a draft pass's logits to transformers' with this adapter."""
    expected = reference_draft_logits(run.models[adapter], run.checkpoint, drafted.tokens)
    return float((expected - drafted.logits).abs().max())


def test_rows_without_a_block_are_the_requests_own(run: Run) -> None:
    """Right after the prompts, when the last two of four rows of every request lie in scratch."""
    first = [one for one in run.drafted if len(one.tokens) == PROMPT_TOKENS + 1]
    assert len(first) == NUM_PROMPTS
    assert max(off(run, one, run.adapter_of(one)) for one in first) < 1e-3


def test_drafts_are_made_with_the_requests_adapter(run: Run) -> None:
    later = run.drafted[NUM_PROMPTS :: NUM_PROMPTS // 2 + 1]
    assert {run.adapter_of(one) for one in later} == {0, 1}
    assert max(off(run, one, run.adapter_of(one)) for one in later) < 1e-3
    assert min(off(run, one, 1 - run.adapter_of(one)) for one in later) > 0.1


@torch.inference_mode()
def test_trees_are_the_best_under_the_calibration(run: Run) -> None:
    for adapter, model in enumerate(run.models):
        own = [one for one in run.drafted if run.adapter_of(one) == adapter]
        assert len(own) > NUM_TOKENS / 2
        kept = [(one.tokens, one.tree) for one in own]
        assert_best_trees(model, run.checkpoint, kept[::3], BUDGET)
