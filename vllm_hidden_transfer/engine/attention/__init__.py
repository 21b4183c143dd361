# SPDX-License-Identifier: Apache-2.0
"""How trees are attended and kept in the paged cache, one module a device."""
