# SPDX-License-Identifier: Apache-2.0
"""Tests under vLLM's V2 model runner. Its kernels are interpreted, so targets are tiny."""

VOCABULARY = 256
