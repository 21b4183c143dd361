# SPDX-License-Identifier: Apache-2.0
"""Transfer maps beside their rivals, Medusa heads and an EAGLE-style layer: ``python -m benchmarks.rivals``."""
