# SPDX-License-Identifier: Apache-2.0
"""Names by which vLLM, its users and our own rooms know the method."""

METHOD = "hidden_transfer"
PROPOSER = "vllm_hidden_transfer.engine.v1.runner.UnusedProposer"
"""What the speculative configuration of our method names as its model, under either runner."""
STAND_IN = "ngram_gpu"
"""Our method in vLLM's own words under the V2 runner, which takes it with async scheduling; V1 has ``custom_class``."""
TEST_DRAFTS_VARIABLE = "VLLM_HIDDEN_TRANSFER_TEST_DRAFTS"
"""Set to 1 by tests and measurements, which may name a draft source; settings alone may not import code."""
SOURCES = ("maps", "lookup", "recycling")
"""Where drafts may come from: trained maps, copies of earlier text, the target's earlier guesses. All by default."""
