# SPDX-License-Identifier: Apache-2.0
"""Types of options that several commands share; imports nothing, so that the command line starts at once."""

from typing import Literal

TargetDtype = Literal["float32", "bfloat16", "float16"]
"""What a frozen target may be loaded in, to train for it or to judge."""
DemoDtype = Literal["float32", "bfloat16"]
"""What the demo's two engines compute in."""
Device = Literal["cpu", "cuda"]
"""Where that runs; cuda was never run by us."""
