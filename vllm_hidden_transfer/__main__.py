# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_hidden_transfer``: the command `vllm-hidden-transfer`, also for torchrun's ``-m``."""

from vllm_hidden_transfer.cli import main

if __name__ == "__main__":
    main()
