# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry point (group ``vllm.general_plugins``): check, then install.

vLLM calls ``register`` in the API process before its arguments are parsed, in the engine core and in every worker, so
it must be re-entrant and cheap. It may not fail at import: vLLM swallows that, and speculation would be silently off.
"""


def register() -> None:
    """Check the vLLM version and the surfaces that we patch, then patch them.

    Raises:
        UnsupportedVllmError: for a vLLM that was not run with this plugin.
        MissingSurfaceError: where vLLM lacks something that we build on. Nothing is half applied.
    """
    from vllm_hidden_transfer.patches import catalogue
    from vllm_hidden_transfer.versions import check_vllm_version

    check_vllm_version()
    catalogue.install()
