# SPDX-License-Identifier: Apache-2.0
"""What calls 4 to 7 share: targets, engine options, and jobs that children do one after the other.

A job is one engine in a process of its own with a limit: what it measured before it broke stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import INTERPRETED, ROOM, Output
from random_maps import STEPS, write_random_maps

LEAST_SECONDS = 25
"""With less left of a call no engine is started."""
ON_A_GPU = {
    "VLLM_HIDDEN_TRANSFER_ALLOW_UNTESTED_GPU": "1",
    "VLLM_HIDDEN_TRANSFER_TEST_DRAFTS": "1",
    # The runner is looked into, and one process is what a profiler sees.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
NO_SYNCS = {"VLLM_GPU_SYNC_CHECK": "error"}
BATCH_INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Setting:
    """What is served, and with how much of everything."""

    target: Path
    options: Mapping[str, Any]
    """Of every engine."""
    requests: tuple[int, ...]
    context: int
    """Tokens of a prompt, where prompts are random."""
    steps: int
    """Decode steps of a measurement, or tokens of a text at most."""
    warm_up: int
    """Steps before it."""
    budgets: tuple[int, ...]
    tiny: bool = False
    """On a CPU, in the V2 test bed."""

    @classmethod
    def of(cls, tiny: bool) -> Setting:
        """An 8B Llama with dummy weights, or what a CPU can serve under the interpreter."""
        if tiny:
            return cls.of_tiny()
        target = ROOM / "llama-8b"
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(LLAMA_8B))
        options = {
            "dtype": "bfloat16",
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 10 << 30,
        }
        return cls(target, options, (1, 8, 32), 1024, 40, 8, (7, 15, 31))

    @classmethod
    def of_tiny(cls) -> Setting:
        from tests.support.models import random_model

        target = random_model(ROOM / "tiny-llama", layers=3, vocabulary=256)
        options = {
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 2,
            "kv_cache_memory_bytes": 1 << 26,
            "block_size": 32,
        }
        return cls(target, options, (1, 2), 20, 4, 2, (7,), tiny=True)

    def engine(self, *, graph: bool, nodes: int = 0, **more: Any) -> dict[str, Any]:
        """Options of an engine; nodes: drafts of a request in a step, for graphs of as many rows."""
        common = {"model": str(self.target), "enable_prefix_caching": False, **self.options, **more}
        if not graph or self.tiny:
            return {**common, "enforce_eager": True}
        rows = {nodes + 1, STEPS} if nodes else {1}
        sizes = sorted(count * each for count in self.requests for each in rows)
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        return {**common, "compilation_config": {"mode": 0, **graphs}}

    def maps(self) -> Path:
        """Random maps that fit the target's shape and enter at three quarters of its layers, made once."""
        folder = ROOM / f"{self.target.name}-maps"
        if not (folder / "config.json").is_file():
            write_random_maps(folder, json.loads((self.target / "config.json").read_text()))
        return folder


def ours(nodes: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Engine options of the plugin: with maps, or with fixed trees where there are none."""
    speculative: dict[str, Any] = {"method": "hidden_transfer", "num_speculative_tokens": nodes}
    if checkpoint is None:
        source = {"hidden_transfer": {"draft_source": "drafts:FixedTrees"}}
        return {"speculative_config": speculative, "additional_config": source}
    # Dummy weights have no fingerprint, and random maps fit no weights.
    maps = {"model": str(checkpoint), "allow_target_mismatch": True}
    return {"speculative_config": {**speculative, **maps}}


def ngram(nodes: int) -> dict[str, Any]:
    """Engine options of stock's n-gram chains on the device."""
    return {
        "speculative_config": {
            "method": "ngram_gpu",
            "num_speculative_tokens": nodes,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        }
    }


@dataclass(frozen=True)
class Job:
    """What one engine is to do."""

    name: str
    work: tuple[str, ...]
    """Functions of ``engine_child``, in this order."""
    engine: dict[str, Any]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def do(output: Output, setting: Setting, jobs: Sequence[Job], limit: float) -> None:
    """Do jobs until ``limit`` seconds after the call's start; what was not reached is said."""
    on = {**ON_A_GPU, **INTERPRETED} if setting.tiny else ON_A_GPU
    patience = 10 if setting.tiny else 1
    for job in jobs:
        left = patience * limit - output.seconds()
        if left < LEAST_SECONDS:
            output.say(f"NOT REACHED {job.name}")
            continue
        asked = {"setting": asdict(setting), "job": asdict(job)}
        command = ["engine_child.py", json.dumps(asked, default=str)]
        seconds = min(patience * job.seconds, left)
        ended = output.child(job.name, command, seconds, {**on, **job.environment})
        output.say(f"{'done' if ended else '----'} {job.name}, {output.seconds():.0f} s so far")


def report_steps(output: Output) -> None:
    """The tables of what ``steps`` and ``draft_pass`` measured."""
    for row in output.results("started"):
        output.say(f"{row['job']}: ready after {row['seconds']:.0f} s, {row['free']}")
    names = ("job", "requests", "ms a step", "tokens a step")
    rows = [{name: row[name] for name in names} for row in output.results("steps")]
    output.table("decode steps, medians", rows)
    drafts = [{k: v for k, v in row.items() if k != "kind"} for row in output.results("drafts")]
    if drafts:
        output.table("draft pass alone, medians with the wait for the device", drafts)
