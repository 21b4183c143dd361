# SPDX-License-Identifier: Apache-2.0
"""Who asks for hidden_transfer: engine arguments, a slip in the name or the folder included, and what vLLM made of
them. Imports no vLLM."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from vllm_hidden_transfer.checkpoint.config import one_sentence
from vllm_hidden_transfer.names import METHOD, PROPOSER

NAME_CUTOFF = 0.8
"""How alike (difflib's ratio) a name must be to be taken for a slip of ours."""


class ConfigurationError(ValueError):
    """One sentence: what is wrong, which option, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message, limit=600))


def requested(args: Any) -> dict[str, Any] | None:
    """The speculative options of engine arguments if they ask for our method, else None.

    Args:
        args: vLLM's ``EngineArgs``, or something with its four speculative attributes.

    Raises:
        ConfigurationError: where they ask for it in a way that cannot be meant, or for something that is nearly it.
    """
    given = {} if args.speculative_config is None else args.speculative_config
    if not isinstance(given, dict):
        raise ConfigurationError(
            f"--speculative-config must be an object of options, not {shown(given)}."
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
    if method == METHOD or (method is None and (model == METHOD or is_checkpoint(model))):
        twice = {str(key).replace("-", "_") for key in given if "-" in str(key)} & set(given)
        if twice:
            raise ConfigurationError(
                f"--speculative-config gives {', '.join(sorted(twice))} twice, once with a hyphen."
            )
        return options
    if _nearly_ours(method):
        raise ConfigurationError(
            f"the speculative method {method!r} does not exist: did you mean {METHOD!r}?"
        )
    if method is None and isinstance(model, str):
        check_model_name(model)
    return None


def is_ours(speculative_config: Any) -> bool:
    """Whether vLLM's speculative configuration, None where there is none, was made for our method."""
    return speculative_config is not None and speculative_config.model == PROPOSER


def check_model_name(model: str) -> None:
    """Refuse a draft model, given without a method, that is neither of ours nor can be another method's.

    Raises:
        ConfigurationError: naming what was probably meant.
    """
    if model == METHOD or is_checkpoint(model):
        return
    if _nearly_ours(model):
        raise ConfigurationError(
            f"there is no speculative model {model!r}: did you mean {METHOD!r}?"
        )
    path = Path(model)
    if is_checkpoint(path.parent) and _exists(path):
        raise ConfigurationError(
            f"{model} is a file of a transfer checkpoint: give its folder {path.parent}."
        )
    if is_checkpoint(path / METHOD):
        raise ConfigurationError(
            f"{model} is a target with a transfer checkpoint in its folder, not the checkpoint: "
            f"give {METHOD}, or {path / METHOD}."
        )


def check_own_option(model: str) -> None:
    """Check the value of ``--speculative-model``, which is an option of ours: a folder is a transfer checkpoint's.

    A name that a hub may know (``org/name``) is left to vLLM, as with ``--spec-model``.

    Raises:
        ConfigurationError: for a folder that is not there or that is none.
    """
    check_model_name(model)
    if model == METHOD or is_checkpoint(model):
        return
    if _exists(Path(model)):
        raise ConfigurationError(
            f"{model} is no transfer checkpoint: give {METHOD} for the one in the target's folder, or the folder that "
            "`vllm-hidden-transfer train` wrote (a draft model of another method goes with --spec-model)."
        )
    if _is_path(model):
        raise ConfigurationError(
            f"there is no transfer checkpoint at {model}: give the folder that "
            "`vllm-hidden-transfer train` wrote."
        )


def is_checkpoint(model: object) -> bool:
    """Whether this names a folder with a transfer checkpoint."""
    if not isinstance(model, str | Path):
        return False
    try:
        path = Path(model) / "config.json"
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("speculators_model_type") == METHOD


def shown(value: object) -> str:
    """What the user gave, for a message: Python refuses to write out very long numbers and very deep lists."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _nearly_ours(name: object) -> bool:
    return isinstance(name, str) and bool(
        difflib.get_close_matches(name, [METHOD], cutoff=NAME_CUTOFF)
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_path(model: str) -> bool:
    """Whether this can only be meant as a path: a hub id has one slash at most and begins with a name."""
    return model.count("/") > 1 or model.startswith((".", "~", "/")) or model.endswith(os.sep)
