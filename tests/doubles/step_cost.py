# SPDX-License-Identifier: Apache-2.0
"""What a verification step costs: the engine-side parts of ``benchmarks/step_cost.py``.

The script and its engines share a folder, named by an environment variable: ``control.json`` says what to draft next,
``draft_seconds.jsonl`` collects how long draft passes took.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.doubles.planted import Answers, Shape, planted_tree
from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.tree import TokenTree

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner

FOLDER_VARIABLE = "VLLM_HIDDEN_TRANSFER_STEP_COST"
CHECKPOINT_VARIABLE = "VLLM_HIDDEN_TRANSFER_STEP_COST_CHECKPOINT"


class Control:
    """What the script wants drafted, read again whenever it changes."""

    def __init__(self) -> None:
        self.folder = Path(os.environ[FOLDER_VARIABLE])
        self.answers = Answers()
        self.shape = Shape("none", 0)
        self.draft_pass = False
        self._stamp = 0

    @staticmethod
    def write(folder: Path, shape: Shape, *, draft_pass: bool = False) -> None:
        """The script's side."""
        content = {"kind": shape.kind, "nodes": shape.nodes, "draft_pass": draft_pass}
        (folder / "control.json").write_text(json.dumps(content))

    def load(self) -> None:
        """The engine's side."""
        path = self.folder / "control.json"
        stamp = path.stat().st_mtime_ns
        if stamp != self._stamp:
            content = json.loads(path.read_text())
            self.shape = Shape(content["kind"], content["nodes"])
            self.draft_pass = content["draft_pass"]
            self._stamp = stamp
        self.answers.load()


class StepCostSource(DraftSource):
    """Plants what the script asks for; on request runs a real draft pass first, times it and throws it away."""

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource

        self._real = TransferSource(runner, os.environ[CHECKPOINT_VARIABLE])
        self.transfer_layer = self._real.transfer_layer
        self._control = Control()

    def describe(self) -> str:
        return "planted drafts (a measurement)"

    def on_target_loaded(self, model: Any) -> None:
        self._real.on_target_loaded(model)

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        self._control.load()
        if self._control.draft_pass:
            start = time.perf_counter()
            self._real.propose(batch)
            entry = {"requests": len(batch.token_ids), "seconds": time.perf_counter() - start}
            with (self._control.folder / "draft_seconds.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        shape, answers = self._control.shape, self._control.answers
        return [planted_tree(shape, answers, tokens) for tokens in batch.token_ids]


class StockChainProposer:
    """The same chains for stock vLLM's ``custom_class`` method."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._control = Control()

    def load_model(self, target: object) -> None:
        """Nothing to load."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        self._control.load()
        shape, answers = self._control.shape, self._control.answers
        return [
            planted_tree(
                shape, answers, token_ids_cpu[row, : num_tokens_no_spec[row]]
            ).tokens.tolist()
            if sampled
            else []
            for row, sampled in enumerate(sampled_token_ids)
        ]
