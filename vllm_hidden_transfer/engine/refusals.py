# SPDX-License-Identifier: Apache-2.0
"""What hidden_transfer is not served with: a table of sentences, and who can tell whether one applies.

Some options reach an engine by more than one way, and vLLM makes settings of its own from others. So the arguments are
looked at, where vLLM itself would say something less clear or fail on the way, and then the finished configuration,
which is what will run. All before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from vllm_hidden_transfer.asking import ConfigurationError
from vllm_hidden_transfer.engine import devices

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

SENTENCES: Mapping[str, str] = {
    "another device": "this device: it verifies trees on CPUs, so serve on a CPU or without it",
    "a GPU": "GPUs yet, where it never ran: serve on a CPU or without it, or set "
    f"{devices.OVERRIDE_VARIABLE}=1 to try it and compare the texts",
    "V1 on a GPU": "the V1 model runner on a GPU: leave VLLM_USE_V2_MODEL_RUNNER unset, and leave out what makes vLLM "
    "choose V1",
    "quantised KV caches on a GPU": "--kv-cache-dtype on a GPU: leave it at auto",
    "another attention backend": "this --attention-backend on a GPU: give FLASH_ATTN or TRITON_ATTN, or leave it out",
    "batch invariance": "VLLM_BATCH_INVARIANT=1 on a GPU but with --attention-backend TRITON_ATTN",
    "V2 without Triton": "VLLM_USE_V2_MODEL_RUNNER=1 without Triton, which vLLM's V2 runner needs: unset it",
    "async scheduling": "--async-scheduling under the V1 model runner, which runs here: leave it out",
    "LoRA under V2": "--enable-lora under the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0",
    "batch-sharded sampling": "batch-sharded sampling: leave --enable-batch-sharded-sampling off",
    "watermarks": "--watermark-config: its drafts and its target need noise of their own",
    "sampling masks": "--return-sampling-mask: leave it off",
    "trace replay": "--enable-trace-replay: leave it off",
    "pipeline parallel": "--pipeline-parallel-size above 1: use --tensor-parallel-size",
    "context parallel": "context parallelism: leave it off",
    "micro-batching": "micro-batching: leave --enable-dbo and --ubatch-size off",
    "KV connectors": "KV connectors, which ship K/V before the accepted path is in place: leave out "
    "--kv-transfer-config and --kv-offloading-size",
    "another worker class": "--worker-cls: leave it at its default",
    "another scheduler": "--scheduler-cls: leave it at its default",
    "custom logits processors": "custom logits processors: leave --logits-processors off and uninstall packages with "
    "entry points in vllm.logits_processors",
    "latent attention": "this model ({model}): it has latent attention (MLA)",
    "recurrent layers": "this model ({model}): it has recurrent layers",
    "multi-dimensional positions": "this model ({model}): its positions are multi-dimensional",
    "encoder-decoder": "this model ({model}): it is an encoder-decoder",
    "pooling": "--runner pooling: it drafts for text generation",
}
"""By name, what follows "hidden_transfer does not work with ": the option, and what to do about it."""


def check_arguments(
    args: EngineArgs, model: ModelConfig, parallel: ParallelConfig, *, v2: bool
) -> None:
    """Refuse what the arguments ask for.

    Args:
        args: as the user gave them.
        model: what vLLM made of them so far.
        parallel: the same.
        v2: whether our method is being translated for the V2 runner.

    Raises:
        ConfigurationError: naming the option.
    """
    applies = of_machine() | of_arguments(args, v2=v2) | of_parallel(parallel) | of_model(model)
    _refuse(applies, str(model.architecture))


def check_resolved(config: VllmConfig) -> None:
    """Refuse what vLLM made of the arguments.

    Raises:
        ConfigurationError: naming the option.
    """
    applies = (
        of_config(config)
        | devices.of_config(config)
        | of_parallel(config.parallel_config)
        | of_model(config.model_config)
    )
    _refuse(applies, str(config.model_config.architecture))


def of_machine() -> dict[str, bool]:
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    return {
        "another device": devices.kind() == "other",
        "a GPU": devices.kind() == "GPU" and not devices.gpu_allowed(),
        "V2 without Triton": bool(envs.VLLM_USE_V2_MODEL_RUNNER) and not HAS_TRITON,
    }


def of_arguments(args: EngineArgs, *, v2: bool) -> dict[str, bool]:
    return {
        "async scheduling": bool(args.async_scheduling) and not v2,
        "LoRA under V2": args.enable_lora and v2,
        "watermarks": args.watermark_config is not None,
        "KV connectors": (
            args.kv_transfer_config is not None or args.kv_offloading_size is not None
        ),
        "another worker class": args.worker_cls != "auto",
        "another scheduler": args.scheduler_cls is not None,
        "custom logits processors": (
            bool(args.logits_processors) or bool(entry_points(group="vllm.logits_processors"))
        ),
    }


def of_parallel(parallel: ParallelConfig) -> dict[str, bool]:
    return {
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "pipeline parallel": parallel.pipeline_parallel_size > 1,
        "context parallel": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batching": parallel.use_ubatching,
    }


def of_model(model: ModelConfig) -> dict[str, bool]:
    return {
        "sampling masks": model.return_sampling_mask,
        "trace replay": model.enable_trace_replay,
        "latent attention": model.use_mla,
        "recurrent layers": model.is_hybrid or model.is_attention_free,
        "multi-dimensional positions": model.uses_mrope,
        "encoder-decoder": model.is_encoder_decoder,
        "pooling": model.runner_type != "generate",
    }


def of_config(config: VllmConfig) -> dict[str, bool]:
    return {
        "LoRA under V2": config.lora_config is not None and bool(config.use_v2_model_runner),
        "watermarks": config.watermark_config is not None,
        "KV connectors": config.kv_transfer_config is not None,
        "another worker class": config.parallel_config.worker_cls != devices.worker_cls(),
        "custom logits processors": bool(config.model_config.logits_processors),
    }


def _refuse(applies: Mapping[str, bool], architecture: str) -> None:
    for name, sentence in SENTENCES.items():
        if applies.get(name, False):
            what = sentence.replace("{model}", architecture)
            raise ConfigurationError(f"hidden_transfer does not work with {what}.")
