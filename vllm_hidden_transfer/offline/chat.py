# SPDX-License-Identifier: Apache-2.0
"""Chat messages and the tokenizer's template for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field

from vllm_hidden_transfer.offline.rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(BaseModel):
    """What every chat message needs; templates may know more keys."""

    model_config = ConfigDict(strict=True)

    role: Annotated[str, Field(min_length=1)]
    content: str


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    *,
    generation_prompt: bool,
) -> list[int]:
    """Token ids of messages in the tokenizer's chat template; `where` names them in errors.

    Raises:
        DataError: there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} has chat messages and the target's tokenizer has no chat template: "
            "give text, or a target that was made for chat."
        )
    try:
        ids = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the chat template refuses {where} ({error}): mend or remove it."
        ) from error
    return [int(token) for token in ids]
