# SPDX-License-Identifier: Apache-2.0
"""``--speculative-model`` and ``--spec-method hidden_transfer`` on vLLM's command lines."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_hidden_transfer.asking import ConfigurationError, check_own_option
from vllm_hidden_transfer.names import METHOD
from vllm_hidden_transfer.patches.base import Patch, Surface

OPTION = "--speculative-model"
HELP = (
    "hidden_transfer: draft with the transfer checkpoint in the target's folder hidden_transfer/. "
    "A folder: that checkpoint (the same as --spec-model)."
)


class OneModel(argparse._StoreAction):
    """Stores the draft model, and refuses it from two options that differ. The same option may come twice: a command
    line goes over a --config file."""

    _last: tuple[argparse.Namespace, str | None] | None = None
    """Of the whole class, since two actions share it: what was parsed into last, and the option that did."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        last, OneModel._last = OneModel._last, (namespace, option_string)
        before = last[1] if last is not None and last[0] is namespace else option_string
        earlier = getattr(namespace, self.dest, None)
        if before != option_string and earlier != values:
            parser.error(
                f"{before} {earlier} and {option_string} {values} say different things: give one."
            )
        super().__call__(parser, namespace, values, option_string)


def _own_model(value: str) -> str:
    try:
        check_own_option(value)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _install() -> None:
    from vllm.config import SpeculativeConfig
    from vllm.engine import arg_utils

    stock = arg_utils.EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        choices = arg_utils._compute_kwargs(SpeculativeConfig)["method"].get("choices")
        if choices is not None and METHOD not in choices:
            choices.append(METHOD)
        parser = stock(parser)
        try:
            parser.add_argument(
                OPTION, dest="spec_model", default=None, help=HELP, type=_own_model, action=OneModel
            )
        except argparse.ArgumentError:  # vLLM has this option again: then it is vLLM's
            return parser
        for action in parser._actions:
            if action.dest == "spec_model" and type(action) is argparse._StoreAction:
                action.__class__ = OneModel
        return parser

    arg_utils.EngineArgs.add_cli_args = staticmethod(add_cli_args)


PATCH = Patch(
    name="cli_options",
    why="--speculative-model is no option of vLLM any more, and --spec-method has a closed list of choices.",
    how="Wraps EngineArgs.add_cli_args: appends to the choices of --spec-method in the cached field table and adds a "
    "second option for spec_model, whose folders must be transfer checkpoints. The two may not differ, so stock's "
    "action gets our class. Where vLLM has an option of that name, it is left alone.",
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
