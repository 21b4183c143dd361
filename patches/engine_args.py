# SPDX-License-Identifier: Apache-2.0
"""The method ``hidden_transfer`` in vLLM's engine arguments."""

from __future__ import annotations

import copy
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from vllm_hidden_transfer.asking import ConfigurationError, requested
from vllm_hidden_transfer.names import METHOD, PROPOSER
from vllm_hidden_transfer.patches import log_lines
from vllm_hidden_transfer.patches.base import Patch, Surface

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

STANDS_FOR = (
    "hidden_transfer: vLLM's own lines name it by what stands for it there: method %s, model %s, and "
    "num_speculative_tokens for the nodes of a tree."
)


class Plan(Protocol):
    """How vLLM is to be configured for our method."""

    @property
    def settings(self) -> Any: ...
    @property
    def budget(self) -> int: ...
    @property
    def worker_cls(self) -> str: ...


class Planner(Protocol):
    """Who decides that; ``engine/configuration.py`` says what each of these does."""

    def plan(self, args: Any, model_config: Any, parallel_config: Any, /) -> Plan | None: ...
    def stand_in_method(self) -> str: ...
    def fits_its_runner(self, config: VllmConfig, /) -> bool: ...
    def for_v1(self) -> AbstractContextManager[None]: ...
    def preferences(self, args: EngineArgs, /) -> AbstractContextManager[None]: ...
    def check_resolved(self, config: VllmConfig, /) -> None: ...


_planners: list[Planner] = []


def plan_with(planner: Planner) -> None:
    """Name the planner that this patch asks, before it is installed: no patch imports the engine."""
    _planners[:] = [planner]


def _install() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logger import init_logger
    from vllm.usage.usage_lib import UsageContext

    (planner,) = _planners
    stock_speculative = EngineArgs.create_speculative_config
    stock_engine = EngineArgs.create_engine_config
    logger = init_logger("vllm.hidden_transfer")

    def create_speculative_config(
        self: EngineArgs, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        plan = planner.plan(self, target_model_config, target_parallel_config)
        if plan is None:
            return stock_speculative(self, target_model_config, target_parallel_config)
        self.additional_config = {
            **(self.additional_config or {}),
            METHOD: plan.settings.model_dump(),
        }
        target_parallel_config.worker_cls = plan.worker_cls
        # On a copy, because vLLM may build a configuration from the same arguments twice.
        translated = copy.copy(self)
        translated.spec_method = translated.spec_model = translated.spec_tokens = None
        translated.speculative_config = {
            "method": planner.stand_in_method(),
            "model": PROPOSER,
            "num_speculative_tokens": plan.budget,
        }
        return stock_speculative(translated, target_model_config, target_parallel_config)

    def create_engine_config(
        self: EngineArgs, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if requested(self) is None:
                return stock_engine(self, usage_context, *args, **kwargs)
            with log_lines.left_out(), planner.preferences(self):
                config = stock_engine(self, usage_context, *args, **kwargs)
            if not planner.fits_its_runner(config):
                with log_lines.left_out(), planner.for_v1(), planner.preferences(self):
                    config = stock_engine(self, usage_context, *args, **kwargs)
            planner.check_resolved(config)
            speculative = config.speculative_config
            logger.info_once(STANDS_FOR, speculative.method, speculative.model)
            return config
        except ConfigurationError as error:
            if usage_context is not UsageContext.OPENAI_API_SERVER:
                raise
            sys.exit(f"vllm serve: {error}")

    EngineArgs.create_speculative_config = create_speculative_config
    EngineArgs.create_engine_config = create_engine_config


PATCH = Patch(
    name="engine_args",
    why="SpeculativeConfig.method is a closed Literal and extra keys are forbidden.",
    how="Wraps EngineArgs.create_speculative_config: our method becomes custom_class for the V1 runner and ngram_gpu "
    "for V2, which keeps async scheduling and knows no custom class; our settings travel in additional_config (part of "
    "the compile hash), worker_cls names our worker. Wraps create_engine_config to make the configuration again where "
    "vLLM then picks V1, for our defaults, to check what vLLM made of the arguments, and so that a server start "
    "refuses in one sentence.",
    versions="0.32",
    retired_by="a registry of speculative methods in vLLM",
    surfaces=(
        Surface(
            "vllm.engine.arg_utils",
            "EngineArgs.create_speculative_config",
            ("target_model_config", "target_parallel_config"),
        ),
        Surface("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("usage_context",)),
        Surface("vllm.engine.arg_utils", "EngineArgs.speculative_config"),
        Surface("vllm.engine.arg_utils", "EngineArgs.spec_tokens"),
        Surface("vllm.engine.arg_utils", "EngineArgs.block_size"),
        Surface("vllm.engine.arg_utils", "EngineArgs.async_scheduling"),
        Surface("vllm.config", "ParallelConfig.worker_cls"),
        Surface("vllm.config", "VllmConfig.use_v2_model_runner"),
        Surface(
            "vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", ("vllm_config",)
        ),
    ),
    install=_install,
)
