# SPDX-License-Identifier: Apache-2.0
"""From vLLM's engine arguments to our settings: who asks for hidden_transfer, with what, and what is refused.

Everything here runs before any weights are loaded. Every refusal is one sentence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidden_transfer.config import one_sentence
from vllm_hidden_transfer.engine.settings import METHOD, Settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_hidden_transfer.config import TransferConfig

OPTIONS = ("method", "model", "num_speculative_tokens", "allow_target_mismatch")
MAX_BUDGET = 256
PROPOSER = "vllm_hidden_transfer.engine.runner.UnusedProposer"
"""What the speculative configuration of our method names as its model, under either runner."""
STAND_IN = "ngram_gpu"
"""Our method in vLLM's own words under the V2 runner, which takes it with async scheduling; V1 has ``custom_class``."""
CPU_BLOCK_SIZE = 32
"""vLLM's CPU default of 128 makes every copy of a partial block four times as large."""


class ConfigurationError(ValueError):
    """One sentence: what is wrong, which option, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message, limit=600))


@dataclass(frozen=True)
class Plan:
    """How vLLM is to be configured for our method."""

    settings: Settings
    budget: int
    worker_cls: str = "vllm_hidden_transfer.engine.cpu.HiddenTransferCPUWorker"
    proposer: str = PROPOSER


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
        settings = Settings(checkpoint=None, draft_source=source)
        return Plan(settings, _checked_budget(budget))
    _check_structure(model_config)
    folder = _checkpoint_folder(options.get("model"), model_config.model)
    config = _load_config(folder)
    _check_shape(config, folder, model_config)
    mismatch = _target_mismatch(config, folder, model_config.model)
    if mismatch and not options.get("allow_target_mismatch", False):
        raise ConfigurationError(
            f"{mismatch}; train maps for this target, or set "
            "allow_target_mismatch in --speculative-config to serve with fewer accepted drafts "
            "(the output stays exact)."
        )
    settings = Settings(checkpoint=str(folder), mismatch=mismatch)
    return Plan(settings, _checked_budget(config.tree.node_budget if budget is None else budget))


def requested(args: EngineArgs) -> dict[str, Any] | None:
    """The speculative options of these arguments if they ask for our method, else None."""
    given = {} if args.speculative_config is None else args.speculative_config
    if not isinstance(given, dict):
        raise ConfigurationError(
            f"--speculative-config must be an object of options, not {_shown(given)}."
        )
    options = {str(key).replace("-", "_"): value for key, value in given.items()}
    for flag, key, value in (
        ("--spec-method", "method", args.spec_method),
        ("--spec-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if key in options:
            raise ConfigurationError(
                f"{flag} and {key} in --speculative-config say the same thing: give one of them."
            )
        options[key] = value
    method, model = options.get("method"), options.get("model")
    if method == METHOD or (method is None and (model == METHOD or _is_checkpoint(model))):
        twice = {str(key).replace("-", "_") for key in given if "-" in str(key)} & set(given)
        if twice:
            raise ConfigurationError(
                f"--speculative-config gives {', '.join(sorted(twice))} twice, once with a hyphen."
            )
        return options
    if isinstance(method, str) and difflib.get_close_matches(method, [METHOD], cutoff=0.8):
        raise ConfigurationError(
            f"the speculative method {method!r} does not exist: did you mean {METHOD!r}?"
        )
    return None


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
    speculative = config.speculative_config
    if speculative is None or (speculative.model, speculative.method) != (PROPOSER, STAND_IN):
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
def preferred_block_size(args: EngineArgs) -> Iterator[None]:
    """On a CPU, while a configuration is made: blocks of 32 where the user set no size."""
    from vllm.platforms import current_platform

    if args.block_size is not None or not current_platform.is_cpu() or requested(args) is None:
        yield
        return
    args.block_size = CPU_BLOCK_SIZE
    try:
        yield
    finally:
        args.block_size = None


def _draft_source(additional: object) -> str | None:
    """The draft source that tests and measurements name in --additional-config."""
    if not isinstance(additional, dict | None):
        raise ConfigurationError(
            f"--additional-config must be an object of options, not {_shown(additional)}."
        )
    own = (additional or {}).get(METHOD, {})
    source = own.get("draft_source") if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(source, str | None):
        raise ConfigurationError(
            f"{METHOD} in --additional-config is the plugin's own and holds nothing of this kind: "
            f"{_shown(own)}."
        )
    return source


def _is_checkpoint(model: object) -> bool:
    if not isinstance(model, str):
        return False
    try:
        path = Path(model) / "config.json"
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("speculators_model_type") == METHOD


def _shown(value: object) -> str:
    """What the user gave, for a message: Python refuses to write out very long numbers and very deep lists."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _check_options(options: dict[str, Any]) -> None:
    for key in options:
        if key not in OPTIONS:
            near = difflib.get_close_matches(key[:64], OPTIONS, n=1, cutoff=0.0)[0]
            raise ConfigurationError(
                f"hidden_transfer has no option {key!r} in --speculative-config: "
                f"the nearest is {near!r} (all: {', '.join(OPTIONS)})."
            )
    allow = options.get("allow_target_mismatch", False)
    if not isinstance(allow, bool):
        raise ConfigurationError(
            f"allow_target_mismatch in --speculative-config must be true or false, "
            f"not {_shown(allow)}."
        )


def _checked_budget(budget: object) -> int:
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= MAX_BUDGET:
        raise ConfigurationError(
            f"num_speculative_tokens (the nodes of a tree) must be an integer from 1 to "
            f"{MAX_BUDGET}, not {_shown(budget)}."
        )
    return budget


def _check_combination(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    """Refuse what was not tried, naming the option."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from vllm_hidden_transfer.patches import catalogue

    refused = {
        "this device: it verifies trees on CPUs only so far, so serve on a CPU or without it": (
            not current_platform.is_cpu()
        ),
        "VLLM_USE_V2_MODEL_RUNNER=1 without Triton, which vLLM's V2 runner needs: unset it": (
            bool(envs.VLLM_USE_V2_MODEL_RUNNER) and not HAS_TRITON
        ),
        "--enable-lora under the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0": (
            args.enable_lora and stand_in_method() == STAND_IN
        ),
        "batch-sharded sampling: leave --enable-batch-sharded-sampling off": (
            parallel_config.enable_batch_sharded_sampling
        ),
        "--watermark-config: its drafts and its target need noise of their own": (
            args.watermark_config is not None
        ),
        "--return-sampling-mask: leave it off": args.return_sampling_mask,
        "--enable-trace-replay: leave it off": args.enable_trace_replay,
        "--pipeline-parallel-size above 1: use --tensor-parallel-size": (
            parallel_config.pipeline_parallel_size > 1
        ),
        "context parallelism: leave it off": (
            parallel_config.decode_context_parallel_size > 1
            or parallel_config.prefill_context_parallel_size > 1
        ),
        "micro-batching: leave --enable-dbo off": parallel_config.use_ubatching,
        "--kv-transfer-config: connectors ship K/V before the accepted path is in place": (
            args.kv_transfer_config is not None
        ),
        "--worker-cls: leave it at its default": args.worker_cls != "auto",
        "custom logits processors: leave --logits-processors off and uninstall packages with entry "
        "points in vllm.logits_processors": (
            bool(args.logits_processors) or bool(entry_points(group="vllm.logits_processors"))
        ),
        f"this model ({model_config.architecture}): it has latent attention (MLA)": (
            model_config.use_mla
        ),
        f"this model ({model_config.architecture}): it has recurrent layers": (
            model_config.is_hybrid or model_config.is_attention_free
        ),
        f"this model ({model_config.architecture}): its positions are multi-dimensional": (
            model_config.uses_mrope
        ),
        f"this model ({model_config.architecture}): it is an encoder-decoder": (
            model_config.is_encoder_decoder
        ),
        "--runner pooling: it drafts for text generation": model_config.runner_type != "generate",
    }
    for what, applies in refused.items():
        if applies:
            raise ConfigurationError(f"hidden_transfer does not work with {what}.")
    catalogue.check_engine(v2=stand_in_method() == STAND_IN)


def _checkpoint_folder(model: object, target: str) -> Path:
    if model is not None and not isinstance(model, str):
        raise ConfigurationError(
            "model in --speculative-config must be the folder of a transfer checkpoint, "
            f"not {_shown(model)}."
        )
    if model not in (None, METHOD):
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
    folder = _target_folder(target) / METHOD
    if not folder.is_dir():
        raise ConfigurationError(
            f"there is no transfer checkpoint in the target's folder (looked for {folder}): "
            'name one with --speculative-config \'{"method": "hidden_transfer", "model": "FOLDER"}\'.'
        )
    return folder


def _target_folder(target: str) -> Path:
    """The folder of a target given as a folder or as a hub id whose snapshot is in the local cache."""
    if Path(target).is_dir():
        return Path(target)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(target, local_files_only=True))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigurationError(
            f"the target {target} is no local folder, so no checkpoint can be found or checked "
            "beside it: name one with --speculative-config "
            '\'{"method": "hidden_transfer", "model": "FOLDER", "allow_target_mismatch": true}\'.'
        ) from error


def _load_config(folder: Path) -> TransferConfig:
    from vllm_hidden_transfer.transfer import CheckpointError, load_checkpoint

    try:
        config = load_checkpoint(folder)[0]
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


def _target_mismatch(config: TransferConfig, folder: Path, target: str) -> str | None:
    """What says that the checkpoint is for another target of the same shape; None where nothing does."""
    from vllm_hidden_transfer.fingerprint import FingerprintError, fingerprint_target

    try:
        found = fingerprint_target(_target_folder(target))
    except (FingerprintError, ConfigurationError) as error:
        return f"the weights of {target} cannot be compared with the transfer checkpoint ({error})"
    if found == config.target.fingerprint:
        return None
    return f"the transfer checkpoint {folder} was trained for other weights than those of {target}"
