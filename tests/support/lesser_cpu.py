# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (``-p tests.support.lesser_cpu``) that hides instruction sets of this CPU from vLLM.

vLLM asks torch which kernels to load and which attention to take. LESSER_CPU names what torch shall deny, with commas:
``amx`` (attention without AMX tiles), ``avx512`` (the AVX2 build of vLLM's kernels; AMX with it).
"""

from __future__ import annotations

import os

import torch

HIDDEN = {
    "amx": ("_is_amx_tile_supported",),
    "avx512": ("_is_amx_tile_supported", "_is_avx512_supported", "_is_avx512_bf16_supported"),
}

for kind in filter(None, os.environ.get("LESSER_CPU", "").split(",")):
    for name in HIDDEN[kind]:
        assert hasattr(torch.cpu, name), name
        setattr(torch.cpu, name, lambda: False)

asked = os.environ.get("ATEN_CPU_CAPABILITY")
if asked is not None:
    assert torch.backends.cpu.get_cpu_capability() == asked.upper(), "the kind was not taken"
