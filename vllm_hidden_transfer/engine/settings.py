# SPDX-License-Identifier: Apache-2.0
"""What reaches the workers: resolved settings, carried in vLLM's ``additional_config``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_hidden_transfer.names import METHOD, SOURCES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Settings(BaseModel):
    """The plugin's settings for one engine. vLLM hashes them into its compile cache key."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = Field(
        description="folder of the transfer checkpoint; None where drafts come from elsewhere"
    )
    sources: tuple[str, ...] = Field(
        default=SOURCES, description="where drafts come from, of ``names.SOURCES``"
    )
    mismatch: str | None = Field(
        default=None,
        description="why the checkpoint may not fit the target, where the user allowed that",
    )
    always_draft: bool = Field(
        default=False, description="draft at every step, also where it makes serving slower"
    )
    draft_source: str | None = Field(
        default=None,
        description="module:Class of another DraftSource, made with the runner, in place of the "
        "checkpoint's: for tests and measurements",
    )

    def source_class(self) -> Any:
        """The class that ``draft_source`` names."""
        assert self.draft_source is not None
        module, _, name = self.draft_source.partition(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Settings:
        """The settings that ``patches/engine_args.py`` put into this configuration."""
        additional = vllm_config.additional_config
        assert isinstance(additional, dict)
        return cls.model_validate(additional[METHOD])
