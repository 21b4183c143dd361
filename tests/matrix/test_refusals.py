# SPDX-License-Identifier: Apache-2.0
"""What is refused when the configuration is checked: one sentence each, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support.checkpoints import random_checkpoint
from tests.support.models import random_model
from vllm_hidden_transfer.asking import ConfigurationError
from vllm_hidden_transfer.engine import configuration, devices, refusals
from vllm_hidden_transfer.engine.refusals import SENTENCES
from vllm_hidden_transfer.names import STAND_IN

pytestmark = pytest.mark.engine

CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
SMALL_MODEL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}

REFUSALS: dict[str, list[dict[str, Any]]] = {
    "pipeline parallel": [{"pipeline_parallel_size": 2}],
    "context parallel": [{"tensor_parallel_size": 2, "decode_context_parallel_size": 2}],
    "micro-batching": [{"ubatch_size": 2}],
    "batch-sharded sampling": [{"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}],
    "async scheduling": [{"async_scheduling": True}],
    "KV connectors": [{"kv_transfer_config": CONNECTOR}, {"kv_offloading_size": 1.0}],
    "custom logits processors": [{"logits_processors": ["some.module:Processor"]}],
    "another worker class": [{"worker_cls": "some.Worker"}],
    "another scheduler": [{"scheduler_cls": "some.Scheduler"}],
    "watermarks": [{"watermark_config": {"algorithm": "gumbel"}}],
    "sampling masks": [{"return_sampling_mask": True}],
    "trace replay": [{"enable_trace_replay": True}],
    "pooling": [{"runner": "pooling"}],
}
"""Engine arguments, in each way that a refused feature can be asked for."""

MODELS: dict[str, Callable[[], Any]] = {
    "latent attention": lambda: transformers.DeepseekV2Config(
        **SMALL_MODEL,
        architectures=["DeepseekV2ForCausalLM"],
        vocab_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "recurrent layers": lambda: transformers.MambaConfig(
        architectures=["MambaForCausalLM"], vocab_size=128, hidden_size=64, num_hidden_layers=2
    ),
    # vLLM's classes of models with images need torchvision, which is not installed here.
    "multi-dimensional positions": lambda: transformers.LlamaConfig(
        **SMALL_MODEL,
        architectures=["LlamaForCausalLM"],
        vocab_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [8, 4, 4], "rope_theta": 1e4},
    ),
    "encoder-decoder": lambda: transformers.WhisperConfig(
        architectures=["WhisperForConditionalGeneration"]
    ),
}

SET_LATER: dict[str, Callable[[Any], None]] = {
    "LoRA under V2": lambda c: setattr(c, "lora_config", object()),
    "watermarks": lambda c: setattr(c, "watermark_config", object()),
    "KV connectors": lambda c: setattr(c, "kv_transfer_config", object()),
    "another worker class": lambda c: setattr(c.parallel_config, "worker_cls", "some.Worker"),
    "custom logits processors": lambda c: setattr(c.model_config, "logits_processors", ["a:B"]),
    "batch-sharded sampling": lambda c: setattr(
        c.parallel_config, "enable_batch_sharded_sampling", True
    ),
    "pipeline parallel": lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2),
    "context parallel": lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2),
    "micro-batching": lambda c: setattr(c.parallel_config, "ubatch_size", 2),
    "sampling masks": lambda c: setattr(c.model_config, "return_sampling_mask", True),
    "trace replay": lambda c: setattr(c.model_config, "enable_trace_replay", True),
    "pooling": lambda c: setattr(c.model_config, "runner_type", "pooling"),
}
"""What vLLM might make of arguments that ask for nothing of the kind."""

OF_THE_MACHINE = {"another device", "a GPU", "V2 without Triton"}

ON_A_GPU: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "V1 on a GPU": lambda c, patch: patch.setattr(type(c), "use_v2_model_runner", False),
    "quantised KV caches on a GPU": lambda c, patch: setattr(c.cache_config, "cache_dtype", "fp8"),
    "another attention backend": lambda c, patch: setattr(
        c.attention_config, "backend", AttentionBackendEnum.FLASHINFER
    ),
    "batch invariance": lambda c, patch: patch.setenv("VLLM_BATCH_INVARIANT", "1"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a checkpoint and without weights: nothing here may read them."""
    folder = random_model(tmp_path_factory.mktemp("target") / "llama", layers=2)
    random_checkpoint(folder / "hidden_transfer", folder, layer=1)
    (folder / "model.safetensors").unlink()
    return folder


def configure(target: Path, **options: Any) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if "kv_transfer_config" in options:
        options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
    asked = {"method": "hidden_transfer", "allow_target_mismatch": True}
    args = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        speculative_config=asked,
        **{"dtype": "float32", **options},
    )
    return args.create_engine_config()


def refused(target: Path, name: str, **options: Any) -> str:
    """The sentence, which is the table's."""
    with pytest.raises(ConfigurationError) as refusal:
        configure(target, **options)
    message = str(refusal.value)
    assert message.startswith("hidden_transfer does not work with")
    assert "\n" not in message
    sentence = SENTENCES[name]
    assert sentence.rpartition("{model}")[2] in message
    return message


def test_every_refusal_is_tried() -> None:
    tried = {*REFUSALS, *MODELS, *OF_THE_MACHINE, *SET_LATER, *ON_A_GPU}
    assert tried == set(SENTENCES)


def test_nothing_is_refused_that_was_not_asked_for(target: Path) -> None:
    config = configure(target)
    assert config.parallel_config.worker_cls == devices.worker_cls()


@pytest.mark.parametrize("feature", REFUSALS)
@pytest.mark.scope("refused", "{feature}")
def test_is_refused_in_one_sentence(feature: str, target: Path, record_property: Any) -> None:
    for options in REFUSALS[feature]:
        message = refused(target, feature, **options)
    record_property("outcome", "refused")
    record_property("sentence", message)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MODELS)
def test_a_kind_of_model_is_refused(kind: str, tmp_path: Path) -> None:
    MODELS[kind]().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", kind)


@pytest.mark.parametrize("feature", SET_LATER)
def test_the_finished_configuration_is_checked(
    feature: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(target)
    configuration.check_resolved(config)
    if feature == "LoRA under V2":
        monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    SET_LATER[feature](config)
    with pytest.raises(ConfigurationError) as refusal:
        configuration.check_resolved(config)
    assert SENTENCES[feature] in str(refusal.value)


def test_what_vllm_adds_on_its_own_is_refused(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import KVTransferConfig, VllmConfig

    def add_connector(self: Any) -> None:
        self.kv_transfer_config = KVTransferConfig(**CONNECTOR)

    monkeypatch.setattr(VllmConfig, "_post_init_kv_transfer_config", add_connector)
    refused(target, "KV connectors")


def test_another_device_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert refusals.of_machine()["another device"]
    monkeypatch.undo()
    monkeypatch.setattr(devices, "kind", lambda: "other")
    refused(target, "another device")


def test_a_gpu_is_refused_until_it_is_asked_for(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "kind", lambda: "GPU")
    message = refused(target, "a GPU")
    assert f"{devices.OVERRIDE_VARIABLE}=1" in message
    monkeypatch.setenv(devices.OVERRIDE_VARIABLE, "1")
    refused(target, "V1 on a GPU")  # which vLLM picks here, without Triton
    monkeypatch.setattr(devices, "of_config", lambda config: {})
    config = configure(target)
    assert config.parallel_config.worker_cls.endswith("cuda.HiddenTransferGPUWorker")
    assert config.num_speculative_tokens == 7  # of the checkpoint's 8


@pytest.mark.parametrize("feature", ON_A_GPU)
def test_a_configuration_is_checked_for_gpus(
    feature: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(target)
    config.parallel_config.worker_cls = "vllm_hidden_transfer.engine.cuda.HiddenTransferGPUWorker"
    monkeypatch.setattr(devices, "kind", lambda: "GPU")
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    configuration.check_resolved(config)
    ON_A_GPU[feature](config, monkeypatch)
    with pytest.raises(ConfigurationError) as refusal:
        configuration.check_resolved(config)
    assert SENTENCES[feature] in str(refusal.value)


def test_v2_without_triton_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    refused(target, "V2 without Triton")


def test_lora_under_v2_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "stand_in_method", lambda: STAND_IN)
    refused(target, "LoRA under V2", enable_lora=True)
