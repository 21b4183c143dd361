# SPDX-License-Identifier: Apache-2.0
"""What a transfer checkpoint says: configuration, maps, fingerprint of its target. No vLLM."""
