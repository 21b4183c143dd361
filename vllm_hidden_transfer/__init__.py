# SPDX-License-Identifier: Apache-2.0
"""Hidden transfer for vLLM: self-drafting from intermediate hidden states, lossless token-tree verification."""

__version__ = "0.1.0"
