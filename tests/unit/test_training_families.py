# SPDX-License-Identifier: Apache-2.0
"""Every family trains: masking proof and falling loss on random models, refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.support.models import FAMILIES, random_model
from vllm_hidden_transfer.checkpoint.config import Conditioning
from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget, SharedPrefixes, UnfitTargetError
from vllm_hidden_transfer.training.ridge import ridge_maps
from vllm_hidden_transfer.training.trainer import Trainer, TrainingConfig

pytestmark = pytest.mark.slow

SUPPORTED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Qwen3Moe")
UNFIT: dict[str, dict[str, Any]] = {"Gemma2": {}, "Granite": {"logits_scaling": 8.0}}
LAYER, STEPS, VOCABULARY = 2, 4, 512


def load(folder: Path, family: str, layer: int = LAYER, **more: object) -> FrozenTarget:
    return FrozenTarget.load(random_model(folder / family, family, 4, VOCABULARY, **more), layer)


def worst_difference(target: FrozenTarget, length: int, layer_roots: list[int]) -> float:
    """How far logits from true states are off, over the largest frozen logit."""
    torch.manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (length,))
    prefix = target.prefix(tokens)
    roots = torch.tensor([layer_roots])
    places = roots[0][:, None] + torch.arange(1, STEPS + 1)
    shared = SharedPrefixes(prefix.keys[None], prefix.values[None])
    found = target.run_rows(prefix.hidden[places][None], roots, shared)[0] @ target.head_weight.T
    frozen = target.model(tokens[None]).logits[0].detach()
    return float((found - frozen[places]).abs().max() / frozen.abs().max())


@pytest.mark.parametrize("family", SUPPORTED)
def test_true_states_give_the_frozen_logits(family: str, tmp_path: Path) -> None:
    assert worst_difference(load(tmp_path, family), 40, [0, 7, 35]) < 1e-5


@pytest.mark.parametrize("family", ["Mistral", "Phi3"])
def test_sliding_windows_are_kept(family: str, tmp_path: Path) -> None:
    target = load(tmp_path, family, sliding_window=16)
    assert worst_difference(target, 60, [3, 15, 16, 40, 55]) < 1e-5


@pytest.mark.parametrize("family", UNFIT)
def test_what_does_not_fit_is_refused_in_one_sentence(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnfitTargetError) as caught:
        load(tmp_path, family, **UNFIT[family])
    assert family in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decoder_inside_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """As the engine refuses it, which has no layers of such a model to draft with."""
    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnfitTargetError, match="decoder inside another model") as caught:
        FrozenTarget.load(tmp_path, LAYER)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnfitTargetError, match="has 4 layers"):
        load(tmp_path, "Llama", layer=4)


def test_every_family_is_asked() -> None:
    assert set(SUPPORTED) | set(UNFIT) <= set(FAMILIES)


@pytest.mark.parametrize("conditioning", ["none", "token", "chained"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_loss_falls_in_20_steps(family: str, conditioning: Conditioning, tmp_path: Path) -> None:
    target = load(tmp_path, family)
    rng = np.random.default_rng(0)
    examples = [
        Example(str(number), "text", None, rng.integers(0, VOCABULARY, 2).tolist(), answer.tolist())
        for number, answer in enumerate(rng.integers(0, VOCABULARY, (6, 40)))
    ]
    prefixes = PrefixPasses(target, len(examples))
    maps = ridge_maps(prefixes, target, examples, STEPS, conditioning)
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.mul_(0.3)
    config = TrainingConfig(
        steps=20, sequences=4, roots=8, learning_rate=2e-3, warmup=2, negatives=-1, log_every=1
    )
    losses: list[float] = []
    trainer = Trainer(target, prefixes, examples, maps, config, tmp_path / "run")
    trainer.run(lambda entry: losses.append(entry["loss"]))
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])


def test_chained_maps_see_the_token_of_their_step() -> None:
    torch.manual_seed(0)
    maps = TransferMaps(3, 8, "chained")
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter)
    hidden, seen = torch.randn(5, 8), torch.randn(5, 3, 8)
    whole = maps(hidden, seen)
    assert maps.token_weight is not None
    for step in range(3):
        expected = hidden @ maps.weight[step].T + seen[:, step] @ maps.token_weight[step].T
        torch.testing.assert_close(whole[:, step], expected)
        torch.testing.assert_close(maps(hidden, seen[:, : step + 1]), whole[:, : step + 1])
    with pytest.raises(ValueError, match="tokens on the path"):
        maps(hidden, seen[:, 0])
