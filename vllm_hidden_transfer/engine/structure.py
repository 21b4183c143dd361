# SPDX-License-Identifier: Apache-2.0
"""Whether a target's upper layers can be run by hand: decided by structure, never by a list of names.

A draft pass needs the hidden state that enters layer t (vLLM's interface for auxiliary hidden states), layers that
take and return (positions, hidden states, residual), and the stack's embedding and last norm.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_LAYER_PARAMETERS = ["positions", "hidden_states", "residual"]
_STACK = ("embed_tokens", "layers", "norm")


class UnfitTargetError(ValueError):
    """One sentence: what the model lacks."""


def check_model_config(model_config: ModelConfig) -> None:
    """Check a model's classes, before any weights are loaded.

    Raises:
        UnfitTargetError: for a model that we cannot draft with.
    """
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_eagle3

    model_class = get_model_cls(model_config)
    name = model_class.__name__
    if not supports_eagle3(model_class):
        raise UnfitTargetError(
            f"hidden_transfer does not work with {name}: vLLM's implementation does not hand out "
            "the hidden states of intermediate layers."
        )
    layer = _decoder_layer(model_class)
    if layer is None:
        raise UnfitTargetError(
            f"hidden_transfer does not work with {name}: its decoder layers are not vLLM's own "
            "(a model of the Transformers backend, for example), so they cannot be run by hand."
        )
    _check_layer(name, layer)


def check_model(model: Any, transfer_layer: int | None) -> None:
    """Check a model that is loaded; what the classes could not say.

    Raises:
        UnfitTargetError: for a model that we cannot draft with.
    """
    if transfer_layer is None:
        return
    name = type(model).__name__
    decoder: Any = getattr(model, "model", None)
    missing = [part for part in _STACK if not hasattr(decoder, part)]
    if missing:
        raise UnfitTargetError(
            f"hidden_transfer does not work with {name}: it has no {', '.join(missing)} to draft with."
        )
    _check_layer(name, type(decoder.layers[transfer_layer]))


def _decoder_layer(model_class: type) -> type | None:
    """The decoder layer class defined beside a model class or beside the nearest class that it inherits from."""
    for parent in model_class.__mro__:
        module = sys.modules[parent.__module__]
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and value.__module__ == module.__name__
                and value.__name__.endswith("DecoderLayer")
            ):
                return value
    return None


def _check_layer(name: str, layer: type) -> None:
    parameters = [*inspect.signature(layer.forward).parameters]  # type: ignore[attr-defined]
    if parameters[1:4] != _LAYER_PARAMETERS:
        raise UnfitTargetError(
            f"hidden_transfer does not work with {name}: its layers take "
            f"({', '.join(parameters[1:])}) and not ({', '.join(_LAYER_PARAMETERS)})."
        )
