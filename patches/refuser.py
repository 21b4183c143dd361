# SPDX-License-Identifier: Apache-2.0
"""Beside a vLLM that the plugin cannot run with: asking for ``hidden_transfer`` is refused in one sentence.

This acts in place of all other patches. It passes on whatever does not ask for our method, and where a surface of its
own is missing too, vLLM's own error stands.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm_hidden_transfer.asking import ConfigurationError, requested
from vllm_hidden_transfer.names import METHOD
from vllm_hidden_transfer.patches.base import MissingSurfaceError, Patch, Surface

_FIELDS = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
_reasons: list[str] = []


def install(reason: str) -> None:
    """Refuse our method with the sentence ``reason`` from now on, in this process."""
    _reasons[:] = [reason]
    for patch in (ENGINES, OPTIONS):
        with contextlib.suppress(MissingSurfaceError):
            patch.apply()


def _asks(args: Any) -> bool:
    """Whether engine arguments, of whatever vLLM, ask for our method."""
    given = SimpleNamespace(**{name: getattr(args, name, None) for name in _FIELDS})
    try:
        return requested(given) is not None
    except ConfigurationError:
        return False  # nonsense, of which vLLM has its own word


def _refuse_engines() -> None:
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asks(self):
            return stock(self, *args, **kwargs)
        usage_context = args[0] if args else kwargs.get("usage_context")
        if getattr(usage_context, "name", None) == "OPENAI_API_SERVER":
            sys.exit(f"vllm serve: {_reasons[0]}")
        raise ConfigurationError(_reasons[0])

    EngineArgs.create_engine_config = create_engine_config


def _refuse_options() -> None:
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.add_cli_args

    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = stock(parser, *args, **kwargs)
        for action in parser._actions:
            if action.dest == "spec_method":
                action.type = _refusing(action.type)
        with contextlib.suppress(argparse.ArgumentError):  # a vLLM that has this option itself
            parser.add_argument(
                "--speculative-model",
                dest="speculative_model",
                default=argparse.SUPPRESS,
                type=_refuse,
                help=argparse.SUPPRESS,
            )
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _refusing(stock: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """An option's type that refuses our method; argparse converts before it looks at the choices."""

    def convert(value: str) -> Any:
        if value == METHOD:
            return _refuse(value)
        return value if stock is None else stock(value)

    return convert


def _refuse(value: str) -> Any:
    raise argparse.ArgumentTypeError(_reasons[0])


ENGINES = Patch(
    name="refuser_engines",
    why="Beside another vLLM nothing of ours is patched, and stock's words about an unknown method name no version.",
    how="Wraps EngineArgs.create_engine_config: arguments that ask for our method are refused, others pass through.",
    versions="any",
    retired_by="a registry of speculative methods in vLLM",
    surfaces=(Surface("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),),
    install=_refuse_engines,
)

OPTIONS = Patch(
    name="refuser_options",
    why="The same on the command line, where the choices of --spec-method are closed and --speculative-model is none.",
    how="Wraps EngineArgs.add_cli_args: the type of --spec-method refuses our method, and a hidden --speculative-model "
    "refuses.",
    versions="any",
    retired_by="the same",
    surfaces=(Surface("vllm.engine.arg_utils", "EngineArgs.add_cli_args"),),
    install=_refuse_options,
)
