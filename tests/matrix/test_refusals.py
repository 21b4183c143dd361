# SPDX-License-Identifier: Apache-2.0
"""What is refused when the configuration is checked: one sentence each, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import random_model

pytestmark = pytest.mark.engine

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "decode context parallel": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "context parallelism",
    ),
    "KV connectors": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    "custom logits processors": (
        {"logits_processors": ["some.module:Processor"]},
        "custom logits processors",
    ),
    "another worker class": ({"worker_cls": "some.Worker"}, "--worker-cls"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target without weights: nothing here may read them."""
    folder = random_model(tmp_path_factory.mktemp("target") / "llama", layers=2)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("feature", REFUSALS)
@pytest.mark.scope("refused", "{feature}")
def test_is_refused_in_one_sentence(feature: str, target: Path, record_property: Any) -> None:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    options, sentence = REFUSALS[feature]
    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    args = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        dtype="float32",
        speculative_config={"method": "hidden_transfer"},
        **options,
    )
    with pytest.raises(ValueError, match=sentence) as refusal:
        args.create_engine_config()
    message = str(refusal.value)
    assert message.startswith("hidden_transfer does not work with")
    assert "\n" not in message
    record_property("outcome", "refused")
    record_property("sentence", message)
