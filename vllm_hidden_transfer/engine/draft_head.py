# SPDX-License-Identifier: Apache-2.0
"""What a draft pass reads of the target's LM head: all of it, or the rows of the checkpoint's draft vocabulary.

Drafts are only proposals, so those of a smaller head cost nothing but acceptance. Verification always reads all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary

_PROBE_ROWS = 4


class WholeHeadError(Exception):
    """A target's LM head cannot be read in part; the message says why, in a few words."""


class _Head(torch.nn.Module):
    """What vLLM's logits processor and kernels look at of an LM head."""

    tp_size = 1

    def __init__(self, weight: torch.Tensor, method: UnquantizedEmbeddingMethod) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_method = method
        method.process_weights_after_loading(self)


class HeadRows:
    """Some rows of a target's LM head, for the list, and its whole weight, for requests' own tokens.

    Args:
        model: vLLM's ``...ForCausalLM``, loaded.
        listed: int64 [n], the tokens whose rows are copied.

    Raises:
        WholeHeadError: the logits of this target are not those of its LM head's rows.
    """

    def __init__(self, model: Any, listed: torch.Tensor) -> None:
        head: Any = getattr(model, "lm_head", None)
        processor: Any = getattr(model, "logits_processor", None)
        if type(processor) is not LogitsProcessor:  # that of LoRA adds to them
            raise WholeHeadError(f"this target's logits come from {type(processor).__name__}")
        if head is None:
            raise WholeHeadError("this target has no LM head of its own")
        if not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            name = type(head.quant_method).__name__
            raise WholeHeadError(f"this target's LM head is read by {name}")
        if head.tp_size > 1:
            raise WholeHeadError("this target's LM head is spread over ranks")
        self._weight: torch.Tensor = head.weight
        # A head of fewer rows for stock's own processor, which so picks its kernel for few rows of states: on a CPU
        # torch's takes 2.5 times as long.
        self._listed = _Head(self._weight[listed], head.quant_method)
        self._of_listed, self._of_own = copy.copy(processor), copy.copy(processor)
        self._of_listed.org_vocab_size = len(listed)
        self._of_own.logits_as_input = True
        self._probe(model, listed)

    def logits(self, hidden: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Draft logits [b, k, n + m].

        Args:
            hidden: [b, k, d], after the last norm.
            own: int64 [b, m], each request's own tokens; negative where there is none, and its logit -inf.
        """
        flat: torch.Tensor = self._of_listed(self._listed, hidden.flatten(0, 1))
        logits = flat.unflatten(0, hidden.shape[:2])
        if not own.shape[1]:
            return logits
        rows = self._weight[own.clamp(min=0)].to(logits.dtype)
        own_logits = self._of_own(None, hidden.to(logits.dtype) @ rows.transpose(1, 2))
        return torch.cat([logits, own_logits.masked_fill(own[:, None] < 0, -torch.inf)], dim=-1)

    @torch.inference_mode()
    def _probe(self, model: Any, listed: torch.Tensor) -> None:
        """Compare with what the model itself makes of some states: a family may do more than its parts say."""
        noise = torch.randn(
            _PROBE_ROWS, self._weight.shape[1], generator=torch.Generator().manual_seed(0)
        )
        hidden = noise.to(self._weight.device, self._weight.dtype)
        whole = model.compute_logits(hidden)[:, listed].float()
        found = self.logits(hidden[None], listed.new_zeros(1, 0))[0].float()
        # Another kernel may round half precision otherwise; another formula is off by much more.
        allowed = 1e-4 if self._weight.dtype == torch.float32 else 5e-2
        if not float((found - whole).abs().max() / whole.abs().max()) <= allowed:
            raise WholeHeadError("this target's logits are not plain products with its LM head")


class DraftHead:
    """Logits of a draft pass, over the checkpoint's draft vocabulary where it has one and the target allows it."""

    def __init__(self, checkpoint: str, config: TransferConfig, device: torch.device) -> None:
        self._vocabulary = DraftVocabulary.of(checkpoint, config)
        self._device = device
        self._rows: HeadRows | None = None
        self._about = ""

    def on_target_loaded(self, model: Any) -> None:
        """Copy the rows of the list out of vLLM's ``...ForCausalLM``."""
        if self._vocabulary is None:
            return
        listed = self._vocabulary.listed
        try:
            self._rows = HeadRows(model, torch.from_numpy(listed).long().to(self._device))
        except WholeHeadError as reason:
            self._about = f", all tokens instead of the checkpoint's list ({reason})"
        else:
            self._about = f", a vocabulary of {len(listed)} tokens and each request's own"

    def describe(self) -> str:
        """Of what drafts are made, to stand behind the maps; nothing where the checkpoint has no list."""
        return self._about

    def columns(self, token_ids: Sequence[NDArray[np.int32]]) -> torch.Tensor | None:
        """The token of each logit, int64 [b, columns], negative for none; None where that is its place.

        Args:
            token_ids: the tokens so far of each of b requests.
        """
        if self._vocabulary is None or self._rows is None:
            return None
        return torch.from_numpy(self._vocabulary.columns(token_ids)).to(self._device)

    def logits(
        self, model: Any, hidden: torch.Tensor, columns: torch.Tensor | None
    ) -> torch.Tensor:
        """Draft logits [b, k, columns].

        Args:
            model: vLLM's ``...ForCausalLM``.
            hidden: [b, k, d], after the last norm.
            columns: what ``columns`` said.
        """
        if columns is None or self._vocabulary is None or self._rows is None:
            logits: torch.Tensor = model.compute_logits(hidden.flatten(0, 1))
            return logits.unflatten(0, hidden.shape[:2])
        return self._rows.logits(hidden, columns[:, len(self._vocabulary.listed) :])
