# SPDX-License-Identifier: Apache-2.0
"""Hidden-transfer drafting under V2: the drafts of V1, no waiting for the device, and exact answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.v2 import VOCABULARY
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import Texts, counters_of, differences, engine, generate, random_prompts
from tests.support.host_syncs import HostSyncs
from tests.support.under_v2 import under_v2
from vllm_hidden_transfer.drafting.distributions import top_candidates
from vllm_hidden_transfer.tree import TokenTree

pytestmark = pytest.mark.engine

Key = tuple[int, ...]
Paths = set[tuple[int, ...]]


@dataclass
class Drafts:
    """What an engine drafted after each sequence of tokens."""

    texts: Texts | None = None
    logits: dict[Key, np.ndarray] = field(default_factory=dict)
    """float32 [k, vocabulary]."""
    paths: dict[Key, Paths] = field(default_factory=dict)
    """Token paths of the live nodes."""
    accepted: int = 0
    syncs: list[str] = field(default_factory=list)
    calls: int = 0
    replays: int = 0
    """Of captured draft passes."""
    host_reads: list[str] = field(default_factory=list)
    """In what was captured."""


def paths_of(tokens: np.ndarray, parents: np.ndarray) -> Paths:
    tree = TokenTree(tokens, parents)
    return {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}


def run(
    target: Path,
    checkpoint: Path,
    drafts: Drafts,
    prepared: Callable[[Any], object] = lambda llm: None,
    **options: Any,
) -> Drafts:
    """prepared: is given the engine before its first request."""
    prompts = random_prompts(4, vocabulary=VOCABULARY, longest=60)
    speculative = {"method": "hidden_transfer", "model": str(checkpoint), "always_draft": True}
    chunked = {"max_num_batched_tokens": 48, "max_num_seqs": 4}
    with engine(target, speculative_config=speculative, **chunked, **options) as llm:
        prepared(llm)
        drafts.texts = generate(llm, prompts, max_tokens=20)
        drafts.accepted = counters_of(llm).accepted_tokens
    return drafts


def drafts_of_v1(target: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Drafts:
    from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource

    drafts = Drafts()
    draft_logits, propose = TransferSource.draft_logits, TransferSource.propose

    def recording_logits(self: TransferSource, batch: Any, columns: None) -> torch.Tensor:
        logits = draft_logits(self, batch, columns)
        for tokens, one in zip(batch.token_ids, logits, strict=True):
            drafts.logits[tuple(tokens.tolist())] = one.float().numpy().copy()
        return logits

    def recording_trees(self: TransferSource, batch: Any) -> list[TokenTree]:
        trees = propose(self, batch)
        for tokens, tree in zip(batch.token_ids, trees, strict=True):
            drafts.paths[tuple(tokens.tolist())] = paths_of(tree.tokens, tree.parents)
        return trees

    monkeypatch.setattr(TransferSource, "draft_logits", recording_logits)
    monkeypatch.setattr(TransferSource, "propose", recording_trees)
    return run(target, checkpoint, drafts)


def drafts_of_v2(target: Path, checkpoint: Path, way: str) -> Drafts:
    """In a process under V2: records, and counts waiting calls of the runner's steps.

    way: "cpu" for the CPU adapter, "gpu" for the GPU's on CPU tensors, "graphs" for that in captured graphs.
    """
    from tests.support import device_bed, fake_graph
    from vllm_hidden_transfer.engine.v2.cpu import TreeCPUModelRunnerV2
    from vllm_hidden_transfer.engine.v2.drafting import TreeSpeculator
    from vllm_hidden_transfer.engine.v2.transfer_source import TransferSourceV2

    drafts, syncs = Drafts(), HostSyncs()
    draft_logits, drafted = TransferSourceV2.draft_logits, TreeSpeculator._drafted
    runner_class: type = TreeCPUModelRunnerV2
    if way != "cpu":
        device_bed.use()
        runner_class = device_bed.BedRunner

    def keys(self: Any, batch: Any) -> list[tuple[int, Key]]:
        states = self._runner.req_states
        lengths = states.total_len.gpu[batch.slots]
        known = states.all_token_ids.gpu[batch.slots]
        return [
            (row, tuple(known[row, : int(lengths[row])].tolist()))
            for row, count in enumerate(batch.num_sampled.tolist())
            if count
        ]

    def recording_logits(self: Any, batch: Any) -> torch.Tensor:
        logits = draft_logits(self, batch)
        for row, key in keys(self, batch):
            drafts.logits[key] = logits[row].float().numpy().copy()
        return logits

    def recording_trees(self: Any, batch: Any) -> Any:
        trees = drafted(self, batch)
        for row, key in keys(self, batch):
            count = int(trees.alive[row].sum())
            drafts.paths[key] = paths_of(
                trees.tokens[row, :count].numpy(), trees.parents[row, :count].numpy()
            )
        return trees

    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with syncs:
                return method(*args, **kwargs)

        return call

    graphs: list[fake_graph.FakeGraph] = []

    def captured(llm: Any) -> None:
        found = fake_graph.capture_everything(device_bed.runner_of(llm))
        graphs.extend(found["drafts"])
        drafts.host_reads = [
            read for kind in found.values() for one in kind for read in one.host_reads
        ]

    if way != "graphs":
        TransferSourceV2.draft_logits = recording_logits  # type: ignore[method-assign]
    TreeSpeculator._drafted = recording_trees  # type: ignore[method-assign]
    for name in ("execute_model", "sample_tokens"):
        setattr(runner_class, name, counted(getattr(runner_class, name)))
    prepared: Callable[[Any], object] = captured if way == "graphs" else lambda llm: None
    run(target, checkpoint, drafts, prepared, async_scheduling=True)
    drafts.replays = sum(graph.replays for graph in graphs)
    drafts.syncs, drafts.calls = syncs.found, syncs.seen
    return drafts


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("cpu", marks=pytest.mark.scope("v2", "drafts-cpu")),
        pytest.param("gpu", marks=pytest.mark.scope("gpu", "drafts-gpu")),
        pytest.param("graphs", marks=pytest.mark.scope("gpu", "drafts-graphs")),
    ],
)
def test_drafts_are_those_of_v1(
    way: str, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = random_checkpoint(tmp_path / "maps", tiny_target, layer=1, bigram_rank=8, budget=7)
    one = drafts_of_v1(tiny_target, checkpoint, monkeypatch)
    two = under_v2(drafts_of_v2, tiny_target, checkpoint, way, async_scheduling=True)
    assert one.texts is not None
    assert two.texts is not None
    assert differences(one.texts, two.texts) == []
    shared = one.paths.keys() & two.paths.keys()
    assert len(shared) > 40
    for key in shared:
        assert_same_nodes(one.paths[key], two.paths[key], one.logits[key])
    assert two.syncs == []
    assert two.host_reads == []
    if way == "graphs":
        assert two.replays > 20
        return
    worst = max(float(np.abs(one.logits[key] - two.logits[key]).max()) for key in shared)
    print(f"{len(shared)} draft passes compared, largest difference of logits {worst:.1e}")
    assert worst < 1e-4
    assert two.calls > 1000


def assert_same_nodes(one: Paths, two: Paths, logits: np.ndarray) -> None:
    """The same live nodes; those that differ are ties, and are listed."""
    scores = torch.from_numpy(logits).log_softmax(-1)
    different = [
        (path, float(sum(scores[depth, token] for depth, token in enumerate(path))))
        for path in one ^ two
    ]
    if different:
        print("ties:", different)
        values = [score for _, score in different]
        assert max(values) - min(values) < 1e-3


def test_waiting_calls_are_counted() -> None:
    """The counter sees what the host builder of V1 does."""
    with HostSyncs() as syncs:
        top_candidates(torch.randn(1, 2, 8), [1.0, 1.0], 3)
    assert [one.split()[1] for one in syncs.found] == ["cpu", "numpy", "cpu", "numpy"]
