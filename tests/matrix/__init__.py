# SPDX-License-Identifier: Apache-2.0
"""The feature matrix: every feature of vLLM that users combine with speculation, run with trees and without."""
