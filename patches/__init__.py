# SPDX-License-Identifier: Apache-2.0
"""Every change to vLLM's own behaviour, one file per seam. ``catalogue.py`` lists them, README.md tells them."""
