# SPDX-License-Identifier: Apache-2.0
"""``--speculative-model`` and ``--spec-method hidden_transfer`` on vLLM's command lines."""

from __future__ import annotations

from typing import Any

from vllm_hidden_transfer.engine.settings import METHOD
from vllm_hidden_transfer.patches.base import Patch, Surface


def _install() -> None:
    from vllm.config import SpeculativeConfig
    from vllm.engine import arg_utils

    stock = arg_utils.EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        choices = arg_utils._compute_kwargs(SpeculativeConfig)["method"].get("choices")
        if choices is not None and METHOD not in choices:
            choices.append(METHOD)
        parser = stock(parser)
        parser.add_argument(
            "--speculative-model",
            dest="spec_model",
            default=None,
            help="hidden_transfer: draft with the transfer checkpoint in the target's folder hidden_transfer/. "
            "A folder: that checkpoint (the same as --spec-model).",
        )
        return parser

    arg_utils.EngineArgs.add_cli_args = staticmethod(add_cli_args)


PATCH = Patch(
    name="cli_options",
    why="--speculative-model is no option of vLLM any more, and --spec-method has a closed list of choices.",
    how="Wraps EngineArgs.add_cli_args: appends to the choices of --spec-method in the cached field table and adds a "
    "second option string for spec_model.",
    versions="0.32",
    retired_by="a registry of speculative methods in vLLM",
    surfaces=(
        Surface("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",)),
        Surface("vllm.engine.arg_utils", "_compute_kwargs", ("cls",)),
        Surface("vllm.engine.arg_utils", "EngineArgs.spec_model"),
        Surface("vllm.engine.arg_utils", "EngineArgs.spec_method"),
    ),
    install=_install,
)
