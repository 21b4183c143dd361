# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry point (group ``vllm.general_plugins``): check, then install, else stay out of the way.

vLLM calls ``register`` in the API process before its arguments are parsed, in the engine core and in every worker, so
it must be re-entrant and cheap. It never fails: vLLM ends every engine whose plugins raise, also one that does not
speculate.
"""

import logging
import multiprocessing

# A child of vLLM's own logger: only that one has a handler and vLLM's format.
logger = logging.getLogger("vllm.hidden_transfer")


def register() -> None:
    """Check the vLLM version and the surfaces that we patch, then patch them.

    Beside a vLLM that was not run with this plugin, or that lacks a surface, nothing is patched but for the refusal of
    our own method (``patches/refuser.py``), and one warning says why.
    """
    from vllm_hidden_transfer.engine import configuration
    from vllm_hidden_transfer.patches import catalogue, engine_args, refuser
    from vllm_hidden_transfer.patches.base import MissingSurfaceError
    from vllm_hidden_transfer.versions import UnsupportedVllmError, check_vllm_version

    try:
        check_vllm_version()
        engine_args.plan_with(configuration)
        catalogue.install()
    except (UnsupportedVllmError, MissingSurfaceError) as error:
        refuser.install(str(error))
        if multiprocessing.parent_process() is None:  # vLLM's own children would say it again
            logger.warning(
                "hidden_transfer is not available, all else is as without the plugin: %s", error
            )
