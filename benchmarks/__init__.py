# SPDX-License-Identifier: Apache-2.0
"""Measurements, and the programs that take them."""
