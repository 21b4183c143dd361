# SPDX-License-Identifier: Apache-2.0
"""From vLLM's engine arguments to our settings: with what our method is asked for, and how vLLM is to be configured.

Everything here runs before any weights are loaded. Every refusal is one sentence; what the engine as a whole may not be
combined with is a table in ``refusals.py``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidden_transfer.asking import ConfigurationError, is_ours, requested, shown
from vllm_hidden_transfer.engine import devices, refusals, target_files
from vllm_hidden_transfer.engine.settings import Settings
from vllm_hidden_transfer.engine.target_files import Target
from vllm_hidden_transfer.names import (
    METHOD,
    SOURCES,
    STAND_IN,
    TEST_DRAFTS_VARIABLE,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_hidden_transfer.checkpoint.config import TransferConfig

OPTIONS = (
    "method",
    "model",
    "num_speculative_tokens",
    "sources",
    "allow_target_mismatch",
    "always_draft",
)
MAX_BUDGET = 256
TEXT_BUDGET = 16
"""Nodes of a tree where no checkpoint says how many."""
CPU_BLOCK_SIZE = 32
"""vLLM's CPU default of 128 makes every copy of a partial block four times as large."""


@dataclass(frozen=True)
class Plan:
    """How vLLM is to be configured for our method."""

    settings: Settings
    budget: int
    worker_cls: str


def plan(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> Plan | None:
    """The plan for these arguments, None where they ask for something that is not ours.

    Raises:
        ConfigurationError: where our method cannot serve them.
    """
    options = requested(args)
    if options is None:
        return None
    _check_options(options)
    _check_combination(args, model_config, parallel_config)
    source = _draft_source(args.additional_config)
    budget = options.get("num_speculative_tokens")
    if source is not None:
        # Tests and measurements want the drafts that they name.
        always = options.get("always_draft", True)
        settings = Settings(checkpoint=None, draft_source=source, always_draft=always)
        return Plan(settings, _checked_budget(budget), devices.worker_cls())
    _check_structure(model_config)
    sources = _sources(options)
    always = options.get("always_draft", False)
    if "maps" not in sources:
        if parallel_config.tensor_parallel_size > 1:
            raise ConfigurationError(
                "sources in --speculative-config leaves maps out, which was not shown to work with "
                "--tensor-parallel-size above 1: add maps, or leave tensor parallelism out."
            )
        settings = Settings(checkpoint=None, sources=sources, always_draft=always)
        text_budget = TEXT_BUDGET if budget is None else budget
        return Plan(settings, _checked_budget(text_budget), devices.worker_cls())
    target = Target(
        model_config.model,
        args.revision,
        args.download_dir,
        args.ignore_patterns,
        str(args.load_format),
    )
    folder = _checkpoint_folder(options.get("model"), target)
    config = _load_config(folder)
    _check_shape(config, folder, model_config)
    mismatch = target_files.mismatch(config, folder, target)
    if mismatch and not options.get("allow_target_mismatch", False):
        raise ConfigurationError(
            f"{mismatch}; train maps for this target, or set "
            "allow_target_mismatch in --speculative-config to serve with fewer accepted drafts "
            "(the output stays exact)."
        )
    settings = Settings(
        checkpoint=str(folder), sources=sources, mismatch=mismatch, always_draft=always
    )
    if budget is None:
        budget = devices.default_budget(config.tree.node_budget)
    return Plan(settings, _checked_budget(budget), devices.worker_cls())


_only_v1: ContextVar[bool] = ContextVar("only_v1", default=False)


def stand_in_method() -> str:
    """The speculative method of vLLM's that ours is translated into, which decides on the model runner.

    ``VLLM_USE_V2_MODEL_RUNNER`` is honoured. Where it is unset, V2's is tried first, and if vLLM then picks V1
    (``fits_its_runner``) the configuration is made again ``for_v1``.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    v2 = HAS_TRITON if wanted is None else wanted
    return STAND_IN if v2 and not _only_v1.get() else "custom_class"


def fits_its_runner(config: VllmConfig) -> bool:
    """False where our method was translated for V2 and vLLM picked V1."""
    if not is_ours(config.speculative_config) or config.speculative_config.method != STAND_IN:
        return True
    return bool(config.use_v2_model_runner)


@contextmanager
def for_v1() -> Iterator[None]:
    """While this lasts, configurations are made for the V1 runner."""
    token = _only_v1.set(True)
    try:
        yield
    finally:
        _only_v1.reset(token)


@contextmanager
def preferences(args: EngineArgs) -> Iterator[None]:
    """While a configuration of our method is made: what it prefers where the user set nothing.

    On a CPU blocks of 32. On a GPU an attention backend that has trees, where vLLM's choice would have none. Under the
    V1 runner no async scheduling, which vLLM would turn off with a warning.
    """
    preferred: dict[str, Any] = {}
    if devices.kind() == "CPU":
        preferred["block_size"] = CPU_BLOCK_SIZE
    backend = devices.preferred_attention_backend()
    if backend is not None and args.attention_config.backend is None:
        preferred["attention_backend"] = backend
    if stand_in_method() != STAND_IN:
        preferred["async_scheduling"] = False
    unset = [name for name in preferred if getattr(args, name) is None]
    for name in unset:
        setattr(args, name, preferred[name])
    try:
        yield
    finally:
        for name in unset:
            setattr(args, name, None)


def check_resolved(config: VllmConfig) -> None:
    """Check a finished configuration, if it is one of our method's.

    Raises:
        ConfigurationError: where vLLM made something of the arguments that our method is not served with.
    """
    if is_ours(config.speculative_config):
        refusals.check_resolved(config)


def _check_combination(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    from vllm_hidden_transfer.patches import catalogue
    from vllm_hidden_transfer.patches.base import MissingSurfaceError

    v2 = stand_in_method() == STAND_IN
    refusals.check_arguments(args, model_config, parallel_config, v2=v2)
    devices.warn_of_gpu()
    try:
        catalogue.check_engine(v2=v2, gpu=devices.kind() == "GPU")
    except MissingSurfaceError as error:
        raise ConfigurationError(str(error)) from error


def _draft_source(additional: object) -> str | None:
    """The draft source that tests and measurements name in --additional-config."""
    if not isinstance(additional, dict | None):
        raise ConfigurationError(
            f"--additional-config must be an object of options, not {shown(additional)}."
        )
    own = (additional or {}).get(METHOD, {})
    source = own.get("draft_source") if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(source, str | None):
        raise ConfigurationError(
            f"{METHOD} in --additional-config is the plugin's own and holds nothing of this kind: "
            f"{shown(own)}."
        )
    if source is not None and os.environ.get(TEST_DRAFTS_VARIABLE) != "1":
        raise ConfigurationError(
            f"draft_source in --additional-config is for tests and measurements, which set {TEST_DRAFTS_VARIABLE}=1: "
            "leave it out."
        )
    return source


def _check_options(options: dict[str, Any]) -> None:
    for key in options:
        if key not in OPTIONS:
            near = difflib.get_close_matches(key[:64], OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(OPTIONS)}."
            raise ConfigurationError(
                f"hidden_transfer has no option {key!r} in --speculative-config: {hint}"
            )
    for key in ("allow_target_mismatch", "always_draft"):
        value = options.get(key, False)
        if not isinstance(value, bool):
            raise ConfigurationError(
                f"{key} in --speculative-config must be true or false, not {shown(value)}."
            )


def _sources(options: dict[str, Any]) -> tuple[str, ...]:
    """Where drafts are to come from."""
    given = options.get("sources")
    if given is None:
        return SOURCES
    several = isinstance(given, list | tuple) and len(given) > 0
    if not several or not all(isinstance(one, str) and one in SOURCES for one in given):
        raise ConfigurationError(
            f"sources in --speculative-config must be a list of some of {', '.join(SOURCES)}, "
            f"not {shown(given)}."
        )
    sources = tuple(one for one in SOURCES if one in given)
    if "maps" not in sources and options.get("model") not in (None, METHOD):
        raise ConfigurationError(
            f"sources in --speculative-config leaves maps out, but model names {shown(options['model'])}: "
            "leave model out, or add maps."
        )
    if stand_in_method() == STAND_IN and sources != ("maps",):
        raise ConfigurationError(
            f"sources in --speculative-config names {', '.join(sources)}, but the V2 model runner drafts with maps "
            "alone: leave it out, or set VLLM_USE_V2_MODEL_RUNNER=0 on a CPU."
        )
    return sources


def _checked_budget(budget: object) -> int:
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= MAX_BUDGET:
        raise ConfigurationError(
            f"num_speculative_tokens (the nodes of a tree) must be an integer from 1 to "
            f"{MAX_BUDGET}, not {shown(budget)}."
        )
    return budget


def _checkpoint_folder(model: object, target: Target) -> Path:
    if model is not None and not isinstance(model, str):
        raise ConfigurationError(
            "model in --speculative-config must be the folder of a transfer checkpoint, "
            f"not {shown(model)}."
        )
    if model in (None, METHOD):
        return target_files.own_checkpoint(target)
    folder = Path(model)
    try:
        exists = folder.exists()
    except OSError as error:
        raise ConfigurationError(
            f"the transfer checkpoint {folder} cannot be read ({error.strerror})."
        ) from error
    if not exists:
        raise ConfigurationError(
            f"there is no transfer checkpoint at {folder}: give the folder that "
            "`vllm-hidden-transfer train` wrote."
        )
    return folder


def _load_config(folder: Path) -> TransferConfig:
    from vllm_hidden_transfer.checkpoint.maps import CheckpointError, load_checkpoint
    from vllm_hidden_transfer.checkpoint.vocabulary import load_vocabulary

    try:
        config = load_checkpoint(folder)[0]
        load_vocabulary(folder, config)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    if config.conditioning == "chained":
        raise ConfigurationError(
            f"the maps in {folder} are chained, which the engine cannot serve yet: "
            "serve one-pass maps (conditioning token or none)."
        )
    return config


def _check_shape(config: TransferConfig, folder: Path, model_config: ModelConfig) -> None:
    text = model_config.hf_text_config
    pairs = {
        "hidden size": (config.target.hidden_size, text.hidden_size),
        "number of layers": (config.target.num_hidden_layers, text.num_hidden_layers),
        "vocabulary": (config.target.vocab_size, text.vocab_size),
    }
    differences = [
        f"{name} {of_checkpoint} against the target's {of_target}"
        for name, (of_checkpoint, of_target) in pairs.items()
        if of_checkpoint != of_target
    ]
    if differences:
        raise ConfigurationError(
            f"the transfer checkpoint {folder} is for another shape of target "
            f"({', '.join(differences)}): train maps for this target."
        )


def _check_structure(model_config: ModelConfig) -> None:
    from vllm_hidden_transfer.engine.structure import UnfitTargetError, check_model_config

    try:
        check_model_config(model_config)
    except UnfitTargetError as error:
        raise ConfigurationError(str(error)) from error
