# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's V2 model runner. It ran on the CPU build under Triton's interpreter only, never on a GPU.

Nothing between two steps waits for the device: trees, walks and moves are tensors, kept by request slot.
"""
