# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer train` from files to a checkpoint on a random target, and what it says to bad input."""

from __future__ import annotations

import errno
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from tests.support.models import add_tokenizer, random_model
from vllm_hidden_transfer.checkpoint.maps import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint
from vllm_hidden_transfer.cli import app
from vllm_hidden_transfer.evaluation.study_result import STUDY_FILE, Study
from vllm_hidden_transfer.training.trainer import STATE_FILE

pytestmark = pytest.mark.slow

VOCABULARY = 512


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_model(
        tmp_path_factory.mktemp("target") / "tiny", layers=4, vocabulary=VOCABULARY
    )
    return add_tokenizer(folder, VOCABULARY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(inspect.getsource(random))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def quick(target: Path, data: Path, output: Path) -> list[object]:
    options = {
        "target": target,
        "data": data,
        "output": output,
        "steps": 4,
        "bigram-rank": 4,
        "bigram-steps": 3,
        "sequences": 4,
        "roots": 4,
        "max-tokens": 96,
        "judged": 3,
        "log-every": 1,
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_from_files_to_a_checkpoint(target: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "maps"
    result = run(*quick(target, data, output), "--transfer-layer", 2)
    assert result.exit_code == 0, result.output
    config, maps = load_checkpoint(output)
    assert (config.transfer_layer, maps.conditioning, maps.num_steps) == (2, "token", 4)
    assert config.bigram_rank == maps.bigram_rank == 4
    study = Study.model_validate_json((output / STUDY_FILE).read_text())
    assert [group.name for group in study.groups] == ["other text"]
    card = (output / "README.md").read_text()
    assert "--transfer-layer 2" in card
    assert f"{study.groups[0].chain.length:.2f}" in card
    assert "--transfer-layer 2" in (output / "train_command.txt").read_text()
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    for picture in (
        "loss.png",
        "acceptance_by_depth.png",
        "acceptance_by_budget.png",
        "reliability.png",
    ):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    # The same command again has nothing to train, and leaves the same weights.
    before = (output / WEIGHTS_FILE).read_bytes()
    assert run(*quick(target, data, output), "--transfer-layer", 2).exit_code == 0
    assert (output / WEIGHTS_FILE).read_bytes() == before
    shown = CliRunner().invoke(app, ["inspect", str(output)], env={"COLUMNS": "200"})
    assert "other text" in shown.output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sharded_target_in_half_precision(
    dtype: str, target: Path, data: Path, tmp_path: Path
) -> None:
    """The same weights in several files and half the memory: a loss like the fp32 run's."""
    sharded = tmp_path / "sharded"
    shutil.copytree(target, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    model.save_pretrained(sharded, max_shard_size="1MB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    losses = []
    for folder, precision in ((target, "float32"), (sharded, dtype)):
        output = tmp_path / precision
        result = run(*quick(folder, data, output), "--transfer-layer", 2, "--dtype", precision)
        assert result.exit_code == 0, result.output
        log = (output / "training_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    configs = [load_checkpoint(tmp_path / name)[0] for name in ("float32", dtype)]
    assert configs[0].target.fingerprint == configs[1].target.fingerprint


def test_auto_shows_the_layers_it_tried(target: Path, data: Path, tmp_path: Path) -> None:
    result = run(*quick(target, data, tmp_path / "maps"), "--conditioning", "none")
    assert result.exit_code == 0, result.output
    assert "(chosen)" in result.output
    chosen = load_checkpoint(tmp_path / "maps")[0].transfer_layer
    assert f"{chosen} (chosen)" in result.output
    rows = [line.split() for line in result.output.splitlines() if len(line.split()) >= 4]
    worths = {row[1]: float(row[-2]) for row in rows if row[1].isdecimal()}
    assert len(worths) > 1
    assert worths[str(chosen)] == max(worths.values())


def test_a_file_of_settings_and_options_that_win(target: Path, data: Path, tmp_path: Path) -> None:
    settings = {
        "target": str(target),
        "data": [str(data)],
        "output": str(tmp_path / "maps"),
        "transfer_layer": 2,
        "steps": 2,
        "sequences": 4,
        "roots": 4,
        "judged": 3,
        "max_tokens": 96,
        "conditioning": "chained",
        "disk_cache": False,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = run("--config", path, "--transfer-layer", 1)
    assert result.exit_code == 0, result.output
    config, maps = load_checkpoint(tmp_path / "maps")
    assert (config.transfer_layer, maps.conditioning) == (1, "chained")
    path.write_text(yaml.safe_dump(settings | {"step": 3}))
    result = run("--config", path)
    assert result.exit_code == 1
    assert "'step'" in result.output
    assert "nearest is 'steps'" in result.output


BAD: dict[str, tuple[list[object], str]] = {
    "misspelt option": (["--step", 3], "nearest is --steps"),
    "no such layer": (["--transfer-layer", 9], "has 4 layers"),
    "bad number": (["--steps", -1], "--steps"),
    "bad form": (["--conditioning", "chain"], "--conditioning"),
    "no such data": (["--data", "/nowhere.txt"], "/nowhere.txt"),
    "no such target": (["--target", "/nowhere"], "/nowhere"),
    "no such settings": (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, target: Path, data: Path, tmp_path: Path) -> None:
    extra, expected = BAD[name]
    given = quick(target, data, tmp_path / "maps")
    if extra[0] in given:  # replaced, not repeated
        at = given.index(extra[0])
        given[at : at + 2] = []
    result = run(*given, *extra)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert expected in result.stderr.strip().splitlines()[-1]


def test_a_full_disk_costs_nothing_that_was_saved(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps' state, that of the bigrams, the checkpoint: each meets a full disk once, and then there is room."""
    whole, output = tmp_path / "whole", tmp_path / "maps"
    assert run(*quick(target, data, whole), "--transfer-layer", 2).exit_code == 0
    flush, room = os.fsync, 0

    def flush_if_there_is_room(handle: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    named = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush_if_there_is_room)
        for files in (1, 1, 4):
            room = files
            result = run(*quick(target, data, output), "--transfer-layer", 2)
            assert result.exit_code == 1
            assert "Traceback" not in result.output
            last = result.stderr.strip().splitlines()[-1]
            assert "No space left on device; what was saved before is kept" in last
            named.append(str(Path(last.split(": ")[0]).relative_to(tmp_path)))
            assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    states = [f"maps-work/token-2-4{kind}/{STATE_FILE}" for kind in ("", "-bigram")]
    assert named == [*states, f"maps/{CONFIG_FILE}"]
    result = run(*quick(target, data, output), "--transfer-layer", 2)
    assert result.exit_code == 0
    assert (output / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()


def test_a_damaged_state_is_one_sentence(target: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "maps"
    command = [*quick(target, data, output), "--transfer-layer", 2]
    assert run(*command).exit_code == 0
    (state,) = tmp_path.glob(f"maps-work/*-4/{STATE_FILE}")
    assert load_file(state)
    state.write_bytes(state.read_bytes()[:100])
    result = run(*command)
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert "Traceback" not in result.output


def test_safetensors_without_metadata(target: Path, data: Path, tmp_path: Path) -> None:
    """Other tools write files without any. Of a target and of maps that is no loss; a state must say what it is of."""
    bare = shutil.copytree(target, tmp_path / "bare")
    save_file(load_file(target / WEIGHTS_FILE), bare / WEIGHTS_FILE)
    output = tmp_path / "maps"
    command = [*quick(bare, data, output), "--transfer-layer", 2]
    assert run(*command).exit_code == 0
    (state,) = tmp_path.glob(f"maps-work/*-4/{STATE_FILE}")
    for written in (output / WEIGHTS_FILE, state):
        with safe_open(str(written), framework="pt") as file:
            assert file.metadata()["format"] == "pt"
    save_file(load_file(output / WEIGHTS_FILE), output / WEIGHTS_FILE)
    assert load_checkpoint(output)[1].num_steps == 4
    tensors = load_file(state)
    whole = safe_open(str(state), framework="pt").metadata()
    for metadata, kept, said in (
        (None, tensors, "does not say of which run it is"),
        ({"format": "pt"}, tensors, "does not say of which run it is"),
        (whole, {"weight": tensors["weight"]}, "lacks "),
        (whole, tensors | {"weight": torch.zeros(3)}, "lacks weight of the shape"),
    ):
        save_file(kept, state, metadata)
        result = run(*command)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        last = result.stderr.strip().splitlines()[-1]
        assert str(state) in last
        assert said in last


@pytest.mark.parametrize("change", ["target", "dtype"])
def test_work_for_another_target_is_refused(
    change: str, target: Path, data: Path, tmp_path: Path
) -> None:
    """Same data, tokenizer and shape, other weights: maps of the one must not be written as the other's."""
    output = tmp_path / "maps"
    plain = ["--transfer-layer", 2]
    assert run(*quick(target, data, output), *plain).exit_code == 0
    before = (output / WEIGHTS_FILE).read_bytes()
    (cache,) = tmp_path.glob("maps-work/cache-2/hidden")
    prefixes = cache.read_bytes()
    command = quick(target, data, output)
    if change == "target":
        tuned = shutil.copytree(target, tmp_path / "tuned")
        model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
        model.save_pretrained(tuned)
        command = quick(tuned, data, output)
    else:
        plain += ["--dtype", "bfloat16"]
    words = {
        "--disk-cache": "another target, transfer layer or dtype",
        "--no-disk-cache": "other settings, data or another target",
    }
    for option, said in words.items():
        result = run(*command, *plain, option)
        assert result.exit_code == 1
        assert said in result.stderr
    assert (output / WEIGHTS_FILE).read_bytes() == before
    assert cache.read_bytes() == prefixes


def test_a_second_run_in_one_work_folder_is_refused(
    target: Path, data: Path, tmp_path: Path
) -> None:
    """By another process, until that one is dead; also when it was killed. The same folder then goes on."""
    command = [*quick(target, data, tmp_path / "maps"), "--transfer-layer", 2]
    work = tmp_path / "maps-work"
    holder = (
        "import sys, time\nfrom pathlib import Path\n"
        "from vllm_hidden_transfer.training.parallel import Processes\n"
        "from vllm_hidden_transfer.training.work_lock import sole_run\n"
        f"with sole_run(Path({str(work)!r}), Processes()):\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            result = run(*command)
            assert result.exit_code == 1
            assert "Traceback" not in result.output
            assert f"another `train` (process {other.pid}) is at work in {work}" in result.stderr
            assert not (tmp_path / "maps").exists()
            assert [path.name for path in work.iterdir()] == ["lock"]
        finally:
            other.kill()
    for _ in range(2):  # a run that ended holds nothing either
        assert run(*command).exit_code == 0


def test_help_teaches() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in ("--transfer-layer", "--own-share", "generate", "default: 4"):
        assert word in result.output
