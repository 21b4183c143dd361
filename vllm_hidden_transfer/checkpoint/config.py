# SPDX-License-Identifier: Apache-2.0
"""What a transfer checkpoint says about itself: its ``config.json``. Imports neither torch nor vLLM."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

FORMAT_VERSION: Final = 1
MODEL_TYPE = "hidden_transfer"

Conditioning = Literal["none", "token", "chained"]
"""What the maps see beside the hidden state: nothing (as published); the token just sampled; or, step by step, the
token at the step's own root + i, so that drafting takes a short pass for each depth."""


def one_sentence(text: str, limit: int = 400) -> str:
    """An error message fit for one line: control characters escaped, its middle left out where it is long.

    What users and files say (names, keys, numbers) is quoted in messages and may be anything.
    """
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[5 - half :]}"


class _Section(BaseModel):
    """A part of the file. Unknown keys are errors: a misspelt key must not silently do nothing."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Verifier(_Section):
    """The target, as the ``speculators`` format names it."""

    name_or_path: str = Field(description="hub id or folder name of the target, for people")
    architectures: Annotated[tuple[str, ...], Field(min_length=1)]


class SpeculatorsConfig(_Section):
    """The part of the file that the ``speculators`` format shares between methods."""

    algorithm: Literal["hidden_transfer"] = "hidden_transfer"
    verifier: Verifier


class Calibration(_Section):
    """Turns draft logits into probabilities: softmax(logits / temperature of the depth)."""

    temperatures: tuple[PositiveFloat, ...] = Field(description="one for each transfer step")


class Tree(_Section):
    """Defaults for the draft trees."""

    node_budget: PositiveInt = Field(default=16, description="nodes when the user names no number")


class Target(_Section):
    """The target that the maps were trained for: what must fit, and which one it was."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    vocab_size: PositiveInt
    fingerprint: str = Field(description="see vllm_hidden_transfer.checkpoint.fingerprint")


class TransferConfig(_Section):
    """``config.json`` of a transfer checkpoint, in the style of the ``speculators`` format."""

    speculators_model_type: Literal["hidden_transfer"] = "hidden_transfer"
    speculators_config: SpeculatorsConfig
    format_version: Literal[1] = FORMAT_VERSION
    num_transfer_steps: Annotated[int, Field(ge=1, le=64)]
    transfer_layer_ids: Annotated[tuple[int, ...], Field(min_length=1, max_length=1)] = Field(
        description="pseudo hidden states enter this layer as its residual stream (0 = first)"
    )
    conditioning: Conditioning = Field(
        description="token: the maps also see the embedding of the token just sampled; "
        "chained: step i sees that of the token at root + i"
    )
    bigram_rank: Annotated[int, Field(ge=0, le=4096)] = Field(
        default=0,
        description="rank of the bigram re-weighting of one-pass drafts; 0: there is none",
    )
    held_out_by: Literal["content"] | None = Field(
        default=None,
        description="what decided which examples were kept out of training; unknown where nothing is said",
    )
    calibration: Calibration
    tree: Tree = Tree()
    target: Target

    @property
    def transfer_layer(self) -> int:
        """The layer t whose input the maps read and write."""
        return self.transfer_layer_ids[0]

    @model_validator(mode="after")
    def _fits_together(self) -> TransferConfig:
        if not 0 <= self.transfer_layer < self.target.num_hidden_layers:
            raise ValueError(
                f"transfer_layer_ids is [{self.transfer_layer}], but the target has layers 0 to "
                f"{self.target.num_hidden_layers - 1}"
            )
        if self.bigram_rank and (self.conditioning == "chained" or self.num_transfer_steps < 2):
            raise ValueError(
                f"bigram_rank is {self.bigram_rank}, but only one-pass maps of two steps or more "
                "have drafts to re-weight"
            )
        given = len(self.calibration.temperatures)
        if given != self.num_transfer_steps:
            raise ValueError(
                f"calibration.temperatures has {given} entries for "
                f"{self.num_transfer_steps} transfer steps"
            )
        return self
