# SPDX-License-Identifier: Apache-2.0
"""Token trees: build, score, mask, positions, walk. No vLLM and no model."""

from vllm_hidden_transfer.tree.best_first import best_first, in_runs
from vllm_hidden_transfer.tree.build import (
    limit_runs,
    most_probable,
    most_probable_paths,
    path_major,
)
from vllm_hidden_transfer.tree.candidates import (
    NO_TOKEN,
    Candidates,
    CopiedPaths,
    GivenCandidates,
)
from vllm_hidden_transfer.tree.layout import (
    PathLayout,
    Scratch,
    draft_blocks,
    fit_to_scratch,
    lay_out_paths,
    ramp,
)
from vllm_hidden_transfer.tree.tensors import TensorWalk, TreeTensors
from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree
from vllm_hidden_transfer.tree.walk import VerificationWalk

__all__ = [
    "NO_TOKEN",
    "ROOT",
    "Candidates",
    "CopiedPaths",
    "GivenCandidates",
    "PathLayout",
    "Scratch",
    "TensorWalk",
    "TokenTree",
    "TreeTensors",
    "VerificationWalk",
    "best_first",
    "draft_blocks",
    "fit_to_scratch",
    "in_runs",
    "lay_out_paths",
    "limit_runs",
    "most_probable",
    "most_probable_paths",
    "path_major",
    "ramp",
]
