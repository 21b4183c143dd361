# SPDX-License-Identifier: Apache-2.0
"""The frozen target on transformers, its prefixes, and data: what training and evaluation share. No vLLM."""
