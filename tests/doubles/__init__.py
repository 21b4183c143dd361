# SPDX-License-Identifier: Apache-2.0
"""Draft sources that stand in for trained maps in tests and measurements; not in the wheel."""
