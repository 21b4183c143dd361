# SPDX-License-Identifier: Apache-2.0
"""The list of patches, and the other surfaces of vLLM that our subclasses build on."""

from __future__ import annotations

from vllm_hidden_transfer.patches import (
    attention_backend,
    cli_options,
    cpu_model_runner,
    engine_args,
    log_lines,
    sampling_parameters,
    seeded_chunks,
    streaming_sessions,
    thinking_budgets,
)
from vllm_hidden_transfer.patches.base import Patch, Surface

AT_START: tuple[Patch, ...] = (
    engine_args.PATCH,
    cli_options.PATCH,
    log_lines.PATCH,
    sampling_parameters.PATCH,
    streaming_sessions.PATCH,
)
"""Applied in every process in which vLLM loads plugins."""

IN_WORKERS: tuple[Patch, ...] = (
    cpu_model_runner.PATCH,
    attention_backend.PATCH,
    seeded_chunks.PATCH,
    thinking_budgets.PATCH,
)
"""Applied in workers of an engine that uses our method on a CPU."""

IN_GPU_WORKERS: tuple[Patch, ...] = (attention_backend.PATCH,)
"""The same on a GPU."""

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"

EVERYWHERE: tuple[Surface, ...] = (
    *sampling_parameters.SURFACES_IN_WORKERS,
    *streaming_sessions.SURFACES_IN_ENGINES,
    Surface(
        "vllm.model_executor.model_loader.weight_utils",
        "download_weights_from_hf",
        ("model_name_or_path", "cache_dir", "allow_patterns", "revision", "ignore_patterns"),
    ),
    Surface(
        "vllm.model_executor.model_loader.weight_utils",
        "maybe_download_from_modelscope",
        ("model", "revision"),
    ),
)
"""What every engine of ours builds on."""

SUBCLASSED: tuple[Surface, ...] = (
    *EVERYWHERE,
    Surface(
        _RUNNER, "GPUModelRunner._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")
    ),
    Surface(_RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata")),
    Surface(
        _RUNNER,
        "GPUModelRunner.propose_draft_token_ids",
        (
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
    ),
    Surface(_RUNNER, "GPUModelRunner._get_eagle3_aux_layers_from_config"),
    Surface(_RUNNER, "GPUModelRunner._on_request_state_removed", ("req_id", "req_state")),
    Surface(
        _RUNNER,
        "GPUModelRunner.initialize_kv_cache_tensors",
        ("kv_cache_config", "kernel_block_sizes", "kv_cache_allocation_context"),
    ),
    Surface(_CPU_ATTENTION, "CPUAttentionBackend.get_builder_cls"),
    Surface(
        _CPU_ATTENTION,
        "CPUAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Surface(
        _CPU_ATTENTION,
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    Surface(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache",
        ("key", "value", "slot_mapping", "isa", "k_scale", "v_scale", "kv_cache_dtype"),
    ),
    Surface("vllm.v1.sample.sampler", "Sampler.forward", ("logits", "sampling_metadata")),
    Surface("vllm.v1.sample.logits_processor", "MinTokensLogitsProcessor"),
)


_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_REJECTION_V2 = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"

CPU_RUNNER_V2 = Surface("vllm.v1.worker.cpu.model_runner", "CPUModelRunner")

SUBCLASSED_V2: tuple[Surface, ...] = (
    Surface(_RUNNER_V2, "GPUModelRunner.add_requests", ("scheduler_output",)),
    Surface(_RUNNER_V2, "GPUModelRunner.prepare_attn", ("input_batch",)),
    Surface(
        _RUNNER_V2, "GPUModelRunner.sample", ("hidden_states", "input_batch", "grammar_output")
    ),
    Surface(_RUNNER_V2, "GPUModelRunner.initialize_kv_cache", ("kv_cache_config",)),
    Surface(
        _REJECTION_V2,
        "RejectionSampler.__call__",
        ("logits", "input_batch", "draft_logits", "invalid_drafts"),
    ),
    Surface(
        _REJECTION_V2,
        "RejectionSampler._verify",
        (
            "logits",
            "draft_logits",
            "draft_sampled",
            "pos",
            "cu_num_logits",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "verify_draft_sampled",
        ),
    ),
    Surface(
        _REJECTION_V2,
        "RejectionSampler._get_logprobs_tensors",
        (
            "sampled",
            "num_sampled",
            "logits",
            "cu_num_logits",
            "cu_num_logits_np",
            "max_num_logprobs",
        ),
    ),
    Surface(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator.propose",
        ("input_batch", "aux_hidden_states", "num_sampled", "last_sampled", "dummy_run"),
    ),
    Surface(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.sample",
        ("logits", "expanded_idx_mapping", "pos", "expanded_local_pos", "return_logprobs"),
    ),
    Surface("vllm.v1.worker.gpu.sample.penalties", "PenaltiesState.apply", ("logits", "ctx")),
    Surface(
        "vllm.v1.worker.gpu.sample.penalties",
        "apply_penalties",
        (
            "logits",
            "expanded_idx_mapping",
            "token_ids",
            "expanded_local_pos",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "prompt_bin_mask",
            "output_bin_counts",
        ),
    ),
)
"""What the V2 adapter builds on beyond that; checked for engines that run it, because it is heavy to import."""

_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_FORWARD = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_BUILD = ("common_prefix_len", "common_attn_metadata", "fast_build")

SUBCLASSED_GPU: tuple[Surface, ...] = (
    Surface("vllm.v1.worker.gpu_worker", "Worker._make_model_runner"),
    Surface("vllm.v1.worker.gpu_worker", "Worker.load_model"),
    Surface("vllm.v1.attention.backends.triton_attn", "TritonAttentionImpl.forward", _FORWARD),
    Surface(
        "vllm.v1.attention.backends.triton_attn", "TritonAttentionMetadataBuilder.build", _BUILD
    ),
    Surface("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl.forward", _FORWARD),
    Surface("vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadataBuilder.build", _BUILD),
    Surface(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        ("common_attn_metadata",),
    ),
    Surface(
        "vllm.v1.attention.backends.utils",
        "split_decodes_and_prefills",
        ("common_attn_metadata", "decode_threshold"),
    ),
    Surface(
        "vllm.v1.worker.ubatch_utils",
        "split_attn_metadata",
        ("ubatch_slices", "common_attn_metadata"),
    ),
    Surface(_GRAPHS, "CudaGraphManager.capture", ("create_forward_fn", "progress_bar_desc")),
    Surface(
        _GRAPHS,
        "CudaGraphManager.dispatch",
        ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    Surface(_GRAPHS, "CudaGraphManager.run_fullgraph", ("desc",)),
)
"""What the GPU adapter builds on beyond the V2 adapter."""


def install() -> None:
    """Check every patch of AT_START before the first of them is applied."""
    for patch in AT_START:
        patch.check()
    for patch in AT_START:
        patch.apply()


def check_engine(*, v2: bool = False, gpu: bool = False) -> None:
    """Check what an engine with our method needs beyond that. Imports vLLM's runner.

    Args:
        v2: whether it runs vLLM's V2 model runner.
        gpu: whether it runs on a GPU, always under V2.

    Raises:
        MissingSurfaceError: naming what is missing.
    """
    surfaces: tuple[Surface, ...]
    if gpu:
        patches, surfaces = IN_GPU_WORKERS, (*EVERYWHERE, *SUBCLASSED_V2, *SUBCLASSED_GPU)
    else:
        patches, surfaces = IN_WORKERS, SUBCLASSED
        if v2:
            surfaces += (*SUBCLASSED_V2, CPU_RUNNER_V2)
    for patch in patches:
        patch.check()
    for surface in surfaces:
        surface.check()
