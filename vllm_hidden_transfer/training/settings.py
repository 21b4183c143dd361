# SPDX-License-Identifier: Apache-2.0
"""What a user may set for `vllm-hidden-transfer train`: options, or keys of a YAML file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from vllm_hidden_transfer.checkpoint.config import Conditioning, one_sentence
from vllm_hidden_transfer.options import Device, TargetDtype
from vllm_hidden_transfer.training.trainer import TrainingConfig


class TrainSettings(BaseSettings, TrainingConfig):
    """Train transfer maps for a target: a checkpoint that vLLM serves with --speculative-model DIR.

    The target is never changed. Options win over the YAML file that --config names; every option can stand in it.
    Running the same command again goes on where it was stopped.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(default=None, description="YAML file with any of these settings")
    target: str = Field(
        description="folder or hub id of the target, any decoder that the engine supports"
    )
    data: list[Path] = Field(
        min_length=1,
        description="files or folders: what `generate` wrote, text, JSONL (text or messages), Parquet, saved datasets",
    )
    output: Path = Field(description="folder of the checkpoint")
    work: Path | None = Field(
        default=None,
        description="folder for the prefix cache and the training state; OUTPUT-work unless given",
    )
    own_share: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="share of the target's own answers among the taught tokens; everything there is unless given",
    )
    conditioning: Conditioning = Field(
        default="token",
        description="token: maps see the sampled token; none: as published; chained: a short pass per depth",
    )
    bigram_rank: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="rank of the re-weighting of drafted pairs, trained after one-pass maps; 0 trains none",
    )
    bigram_steps: PositiveInt = Field(default=400, description="optimiser steps of that")
    transfer_layer: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="layer t that the maps write into; auto tries some and shows the table",
    )
    transfer_steps: PositiveInt = Field(default=4, description="pseudo positions k")
    max_tokens: PositiveInt = Field(
        default=768, description="longest sequence; text is cut into pieces of it"
    )
    max_examples: PositiveInt | None = Field(default=None, description="use only the first ones")
    judged: PositiveInt = Field(
        default=40, description="held-out answers to calibrate and judge on"
    )
    dtype: TargetDtype = Field(
        default="float32", description="dtype of the frozen target; maps are trained in float32"
    )
    device: Device = Field(default="cpu", description="where to train; cuda was never run by us")
    disk_cache: bool = Field(
        default=True,
        description="keep prefixes on disk (2 bytes x (hidden size + upper layers' K/V) a token); "
        "else compute them at every step",
    )
    name: str | None = Field(
        default=None, description="the target's name for the model card; TARGET unless given"
    )

    @property
    def work_folder(self) -> Path:
        """Where cache and state are."""
        return self.work or self.output.with_name(self.output.name + "-work")

    @property
    def trains_bigrams(self) -> bool:
        """Whether there are drafts to re-weight: only one-pass maps of two steps or more have some."""
        return bool(self.bigram_rank) and self.conditioning != "chained" and self.transfer_steps > 1

    def training(self) -> TrainingConfig:
        """The optimiser's part."""
        return TrainingConfig(**{name: getattr(self, name) for name in TrainingConfig.model_fields})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options and the file only: an environment variable named SEED must not change a run."""
        return (init_settings,)


class SettingsProblem(ValueError):  # noqa: N818  the message is for users
    """Options or the YAML file are wrong; the message is one sentence."""


def read_settings(arguments: list[str]) -> TrainSettings:
    """Settings from command-line options and the YAML file that ``--config`` names; options win.

    Raises:
        SettingsProblem: one sentence that names the option.
    """
    try:
        given: dict[str, Any] = CliSettingsSource(
            TrainSettings,
            cli_parse_args=arguments,
            cli_exit_on_error=False,
            cli_prog_name="vllm-hidden-transfer train",
        )()
    except SettingsError as error:
        raise SettingsProblem(_parse_problem(str(error))) from error
    values = _read_yaml(Path(given["config"])) if given.get("config") else {}
    try:
        return TrainSettings(**(values | given))
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        said = "it is required"
        if first["type"] != "missing":
            said = f"{first['msg']}, not {first['input']!r}"
        raise SettingsProblem(one_sentence(f"{option}: {said}")) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsProblem(f"--config {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsProblem(
            one_sentence(f"--config {path} is not valid YAML ({error})")
        ) from error
    if not isinstance(values, dict):
        raise SettingsProblem(f"--config {path} does not hold settings (name: value)")
    known = TrainSettings.model_fields
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise SettingsProblem(
                one_sentence(
                    f"--config {path}: there is no setting {name!r}, the nearest is {near!r}"
                )
            )
    return values


def _parse_problem(message: str) -> str:
    """One sentence of what the parser says, with the nearest option where one is unknown."""
    said = message.removeprefix("error parsing CLI: ")
    unknown = said.partition("unrecognized arguments: ")[2].split()
    if not unknown:
        return one_sentence(f"{said}: see --help for the options")
    options = ["--" + name.replace("_", "-") for name in TrainSettings.model_fields]
    near = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0.0)[0]
    return one_sentence(
        f"there is no option {unknown[0]}, the nearest is {near}: see --help for all of them"
    )
