# SPDX-License-Identifier: Apache-2.0
"""Where candidates come from: draft sources and the maths from hidden states to draft distributions."""
