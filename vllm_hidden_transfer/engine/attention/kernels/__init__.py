# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of trees in a paged cache, with the functions that launch them. They import no vLLM.

None of them ever ran on a GPU. They ran under Triton's interpreter against plain fp64 arithmetic, and were compiled
ahead of time for sm_80, sm_89, sm_90, sm_100, sm_120 and gfx942.
"""
