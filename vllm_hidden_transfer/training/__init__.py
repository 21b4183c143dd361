# SPDX-License-Identifier: Apache-2.0
"""Training of transfer maps: frozen prefixes run once, every optimiser step pays only for its rows."""
