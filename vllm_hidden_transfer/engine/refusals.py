# SPDX-License-Identifier: Apache-2.0
"""What hidden_transfer is not served with: a table, a row each, applied before any weights are loaded.

Some options reach an engine by more than one way, and vLLM makes settings of its own from others. So a row looks at
the arguments where vLLM itself would say something less clear or fail on the way, and at the finished configuration,
which is what will run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from vllm_hidden_transfer.engine.asking import ConfigurationError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

WORKER = "vllm_hidden_transfer.engine.cpu.HiddenTransferCPUWorker"


@dataclass(frozen=True)
class Arguments:
    """What is known where vLLM makes the speculative configuration."""

    args: EngineArgs
    model: ModelConfig
    parallel: ParallelConfig
    v2: bool
    """Whether our method is being translated for the V2 runner."""


def _never(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class Refusal:
    """One thing that our method is not served with."""

    name: str
    sentence: str
    """What follows "hidden_transfer does not work with ": option and remedy. ``{model}`` is the architecture."""
    asked: Callable[[Arguments], bool] = _never
    resolved: Callable[[VllmConfig], bool] = _never


def _not_a_cpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def _v2_without_triton() -> bool:
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    return bool(envs.VLLM_USE_V2_MODEL_RUNNER) and not HAS_TRITON


def _of_model(predicate: Callable[[ModelConfig], bool]) -> dict[str, Callable[[Any], bool]]:
    return {"asked": lambda a: predicate(a.model), "resolved": lambda c: predicate(c.model_config)}


def _of_parallel(predicate: Callable[[ParallelConfig], bool]) -> dict[str, Callable[[Any], bool]]:
    return {
        "asked": lambda a: predicate(a.parallel),
        "resolved": lambda c: predicate(c.parallel_config),
    }


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "another device",
        "this device: it verifies trees on CPUs only so far, so serve on a CPU or without it",
        asked=lambda _: _not_a_cpu(),
    ),
    Refusal(
        "V2 without Triton",
        "VLLM_USE_V2_MODEL_RUNNER=1 without Triton, which vLLM's V2 runner needs: unset it",
        asked=lambda _: _v2_without_triton(),
    ),
    Refusal(
        "async scheduling under V1",
        "--async-scheduling under the V1 model runner, which vLLM here uses: leave it out",
        asked=lambda a: bool(a.args.async_scheduling) and not a.v2,
    ),
    Refusal(
        "LoRA under V2",
        "--enable-lora under the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0",
        asked=lambda a: a.args.enable_lora and a.v2,
        resolved=lambda c: c.lora_config is not None and bool(c.use_v2_model_runner),
    ),
    Refusal(
        "batch-sharded sampling",
        "batch-sharded sampling: leave --enable-batch-sharded-sampling off",
        **_of_parallel(lambda parallel: parallel.enable_batch_sharded_sampling),
    ),
    Refusal(
        "watermarks",
        "--watermark-config: its drafts and its target need noise of their own",
        asked=lambda a: a.args.watermark_config is not None,
        resolved=lambda c: c.watermark_config is not None,
    ),
    Refusal(
        "sampling masks",
        "--return-sampling-mask: leave it off",
        **_of_model(lambda model: model.return_sampling_mask),
    ),
    Refusal(
        "trace replay",
        "--enable-trace-replay: leave it off",
        **_of_model(lambda model: model.enable_trace_replay),
    ),
    Refusal(
        "pipeline parallel",
        "--pipeline-parallel-size above 1: use --tensor-parallel-size",
        **_of_parallel(lambda parallel: parallel.pipeline_parallel_size > 1),
    ),
    Refusal(
        "context parallel",
        "context parallelism: leave it off",
        **_of_parallel(
            lambda parallel: (
                parallel.decode_context_parallel_size > 1
                or parallel.prefill_context_parallel_size > 1
            )
        ),
    ),
    Refusal(
        "micro-batching",
        "micro-batching: leave --enable-dbo and --ubatch-size off",
        **_of_parallel(lambda parallel: parallel.use_ubatching),
    ),
    Refusal(
        "KV connectors",
        "KV connectors, which ship K/V before the accepted path is in place: leave out --kv-transfer-config and "
        "--kv-offloading-size",
        asked=lambda a: (
            a.args.kv_transfer_config is not None or a.args.kv_offloading_size is not None
        ),
        resolved=lambda c: c.kv_transfer_config is not None,
    ),
    Refusal(
        "another worker class",
        "--worker-cls: leave it at its default",
        asked=lambda a: a.args.worker_cls != "auto",
        resolved=lambda c: c.parallel_config.worker_cls != WORKER,
    ),
    Refusal(
        "custom logits processors",
        "custom logits processors: leave --logits-processors off and uninstall packages with entry "
        "points in vllm.logits_processors",
        asked=lambda a: (
            bool(a.args.logits_processors) or bool(entry_points(group="vllm.logits_processors"))
        ),
        resolved=lambda c: bool(c.model_config.logits_processors),
    ),
    Refusal(
        "latent attention",
        "this model ({model}): it has latent attention (MLA)",
        **_of_model(lambda model: model.use_mla),
    ),
    Refusal(
        "recurrent layers",
        "this model ({model}): it has recurrent layers",
        **_of_model(lambda model: model.is_hybrid or model.is_attention_free),
    ),
    Refusal(
        "multi-dimensional positions",
        "this model ({model}): its positions are multi-dimensional",
        **_of_model(lambda model: model.uses_mrope),
    ),
    Refusal(
        "encoder-decoder",
        "this model ({model}): it is an encoder-decoder",
        **_of_model(lambda model: model.is_encoder_decoder),
    ),
    Refusal(
        "pooling",
        "--runner pooling: it drafts for text generation",
        **_of_model(lambda model: model.runner_type != "generate"),
    ),
)


def check_arguments(arguments: Arguments) -> None:
    """Refuse what the arguments ask for.

    Raises:
        ConfigurationError: naming the option.
    """
    for refusal in REFUSALS:
        if refusal.asked(arguments):
            raise _error(refusal, arguments.model)


def check_resolved(config: VllmConfig) -> None:
    """Refuse what vLLM made of the arguments.

    Raises:
        ConfigurationError: naming the option.
    """
    for refusal in REFUSALS:
        if refusal.resolved(config):
            raise _error(refusal, config.model_config)


def _error(refusal: Refusal, model: ModelConfig) -> ConfigurationError:
    what = refusal.sentence.replace("{model}", str(model.architecture))
    return ConfigurationError(f"hidden_transfer does not work with {what}.")
