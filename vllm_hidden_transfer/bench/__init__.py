# SPDX-License-Identifier: Apache-2.0
"""What measures and judges the plugin from outside."""
