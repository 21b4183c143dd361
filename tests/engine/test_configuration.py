# SPDX-License-Identifier: Apache-2.0
"""The ways in, and the refusals: all before any weights are loaded, each in one sentence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.checkpoints import random_checkpoint
from tests.support.engines import planted_options
from vllm_hidden_transfer.checkpoint.vocabulary import save_vocabulary
from vllm_hidden_transfer.engine import configuration
from vllm_hidden_transfer.names import STAND_IN

pytestmark = pytest.mark.engine

WORKER = "vllm_hidden_transfer.engine.cpu.HiddenTransferCPUWorker"


@pytest.fixture(scope="module")
def target(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the random target with a checkpoint in its folder."""
    folder = tmp_path_factory.mktemp("ways") / "target"
    shutil.copytree(random_target, folder)
    random_checkpoint(folder / "hidden_transfer", folder)
    return folder


def configure(target: Path | str, **options: Any) -> Any:
    """vLLM's configuration for these engine arguments."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(target), skip_tokenizer_init=True, dtype="float32", **options)
    return args.create_engine_config()


def parse(*arguments: str) -> Any:
    """Engine arguments from a command line, as ``vllm serve`` and ``vllm bench`` make them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*arguments, "--dtype", "float32"]))


def is_ours(config: Any, checkpoint: Path) -> bool:
    assert config.parallel_config.worker_cls == WORKER
    settings = config.additional_config["hidden_transfer"]
    assert Path(settings["checkpoint"]) == checkpoint
    assert config.speculative_config.method == "custom_class"
    assert config.cache_config.block_size == 32
    return True


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-model", "hidden_transfer"],
        ["--speculative-model", "{checkpoint}"],
        ["--spec-method", "hidden_transfer", "--spec-model", "{checkpoint}"],
        ["--spec-method", "hidden_transfer"],
        ["--speculative-config", '{{"method":"hidden_transfer","model":"{checkpoint}"}}'],
        ["--speculative-config", '{{"model":"{checkpoint}"}}'],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_command_lines(arguments: list[str], target: Path) -> None:
    checkpoint = target / "hidden_transfer"
    filled = [argument.format(checkpoint=checkpoint) for argument in arguments]
    config = parse("--model", str(target), *filled).create_engine_config()
    assert is_ours(config, checkpoint)
    assert config.speculative_config.num_speculative_tokens == 8  # the checkpoint's default


def test_python_api_and_budget(target: Path) -> None:
    options = {"method": "hidden_transfer", "num_speculative_tokens": 5}
    config = configure(target, speculative_config=options)
    assert is_ours(config, target / "hidden_transfer")
    assert config.speculative_config.num_speculative_tokens == 5


def test_no_additional_config(target: Path) -> None:
    """vLLM takes None for its additional_config."""
    config = configure(
        target, speculative_config={"method": "hidden_transfer"}, additional_config=None
    )
    assert is_ours(config, target / "hidden_transfer")


def test_the_same_arguments_twice(target: Path) -> None:
    """vLLM may build a configuration from the same arguments more than once."""
    args = parse("--model", str(target), "--speculative-model", "hidden_transfer")
    for _ in range(2):
        assert is_ours(args.create_engine_config(), target / "hidden_transfer")


def test_other_methods_stay_stock(target: Path) -> None:
    options = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    config = configure(target, speculative_config=options)
    assert config.parallel_config.worker_cls != WORKER
    assert "hidden_transfer" not in config.additional_config
    assert config.cache_config.block_size != 32


def test_a_block_size_of_the_user_stays(target: Path) -> None:
    config = configure(target, speculative_config={"method": "hidden_transfer"}, block_size=64)
    assert config.cache_config.block_size == 64


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_speculativ_tokens": 4}, {}, "did you mean 'num_speculative_tokens'"),
    (
        {"draft_temperature": 1},
        {},
        "no option 'draft_temperature' in --speculative-config: it knows",
    ),
    ({"quantization": "fp8"}, {}, "no option 'quantization' in --speculative-config: it knows"),
    ({"method": "hidden-transfer"}, {}, "did you mean 'hidden_transfer'"),
    ({"method": "hiden_transfer"}, {}, "did you mean 'hidden_transfer'"),
    ({"num_speculative_tokens": 0}, {}, "from 1 to 256, not 0"),
    ({"num_speculative_tokens": 1000}, {}, "from 1 to 256, not 1000"),
    ({"num_speculative_tokens": "many"}, {}, "not 'many'"),
    ({"allow_target_mismatch": "yes"}, {}, "must be true or false"),
    ({"always_draft": 1}, {}, "always_draft in --speculative-config must be true or false, not 1"),
    ({"sources": "lookup"}, {}, "must be a list of some of maps, lookup, recycling, not 'lookup'"),
    ({"sources": []}, {}, "must be a list of some of maps, lookup, recycling"),
    ({"sources": ["copies"]}, {}, "must be a list of some of maps, lookup, recycling"),
    ({"sources": ["lookup"], "model": "maps"}, {}, "leaves maps out, but model names 'maps'"),
    ({"model": "/nowhere/at/all"}, {}, "no transfer checkpoint at /nowhere/at/all"),
    ({"model": 3}, {}, "must be the folder"),
    ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    ({}, {"spec_method": "hidden_transfer"}, "give one of them"),
    ({}, {"worker_cls": "some.Worker"}, "--worker-cls"),
    ({}, {"async_scheduling": True}, "--async-scheduling under the V1 model runner"),
    ({}, {"kv_offloading_size": 1.0}, "--kv-offloading-size"),
]


@pytest.mark.parametrize(("options", "arguments", "sentence"), REFUSALS)
def test_refusals(
    options: dict[str, Any], arguments: dict[str, Any], sentence: str, target: Path
) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        configure(target, speculative_config={"method": "hidden_transfer", **options}, **arguments)
    assert "\n" not in str(refusal.value)


def test_no_checkpoint_beside_the_target(random_target: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for .*hidden_transfer.*recycling") as refusal:
        configure(random_target, speculative_config={"method": "hidden_transfer"})
    assert "\n" not in str(refusal.value)


def test_without_maps_no_checkpoint_is_asked_for(random_target: Path) -> None:
    method = {"method": "hidden_transfer", "sources": ["lookup", "recycling"]}
    for model in ({}, {"model": "hidden_transfer"}, {"model": None}):
        config = configure(random_target, speculative_config={**method, **model})
        settings = config.additional_config["hidden_transfer"]
        assert settings["checkpoint"] is None
        assert tuple(settings["sources"]) == ("lookup", "recycling")
        assert config.speculative_config.num_speculative_tokens == 16
    five = configure(random_target, speculative_config={**method, "num_speculative_tokens": 5})
    assert five.speculative_config.num_speculative_tokens == 5


def test_tensor_parallelism_without_maps_is_refused(random_target: Path) -> None:
    """Ranks that each look up for themselves were not seen to draft alike."""
    method = {"method": "hidden_transfer", "sources": ["lookup"]}
    with pytest.raises(ValueError, match="--tensor-parallel-size above 1: add maps") as refusal:
        configure(random_target, speculative_config=method, tensor_parallel_size=2)
    assert "\n" not in str(refusal.value)


def test_other_sources_under_v2_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "stand_in_method", lambda: STAND_IN)
    for sources in (["lookup"], ["maps", "lookup"]):
        options = {"method": "hidden_transfer", "sources": sources}
        with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0 on a CPU") as refusal:
            configuration._sources(options)
        assert "\n" not in str(refusal.value)
    assert configuration._sources({"sources": ["maps"]}) == ("maps",)


SLIPS = {
    "hidden-transfer": "did you mean 'hidden_transfer'",
    "hiden_transfer": "did you mean 'hidden_transfer'",
    "{checkpoint}/model.safetensors": "is a file of a transfer checkpoint: give its folder",
    "{target}": "is a target with a transfer checkpoint in its folder",
    "{target}/config.json": "is no transfer checkpoint: give hidden_transfer",
    "{empty}": "is no transfer checkpoint: give hidden_transfer",
    "/nowhere/at/all": "there is no transfer checkpoint at /nowhere/at/all",
    "./maps": "there is no transfer checkpoint at ./maps",
}
"""Values of --speculative-model that mean our method, but not quite."""


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_the_model_is_one_sentence_at_once(
    slip: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = slip.format(target=target, checkpoint=target / "hidden_transfer", empty=tmp_path)
    with pytest.raises(SystemExit):
        parse("--model", str(target), "--speculative-model", value)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: argument --speculative-model: " in last
    assert SLIPS[slip] in last


@pytest.mark.parametrize("slip", list(SLIPS)[:4])
def test_the_same_slips_from_python(slip: str, target: Path) -> None:
    value = slip.format(target=target, checkpoint=target / "hidden_transfer")
    with pytest.raises(ValueError, match=SLIPS[slip]):
        configure(target, speculative_config={"model": value, "num_speculative_tokens": 3})


def test_draft_models_of_other_methods_stay_stocks(target: Path) -> None:
    from vllm_hidden_transfer.asking import requested

    for name in ("org/draft-model", "gpt2", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"):
        args = parse("--model", str(target), "--speculative-model", name)
        assert args.spec_model == name
        assert requested(args) is None


def test_two_models_may_not_differ(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(target / "hidden_transfer")
    model = ["--model", str(target)]
    both = (["--speculative-model", "hidden_transfer"], ["--spec-model", checkpoint])
    for first, second in (both, both[::-1]):
        with pytest.raises(SystemExit):
            parse(*model, *first, *second)
        said = capsys.readouterr().err
        assert "say different things: give one" in said
        assert all(text in said for text in (*first, *second))
    same = ["--speculative-model", checkpoint, "--spec-model", checkpoint]
    assert parse(*model, *same).spec_model == checkpoint
    # A command line goes over a --config file, in which the same option may be given too.
    twice = ["--spec-model", "org/one", "--spec-model", "org/two"]
    assert parse(*model, *twice).spec_model == "org/two"


def test_an_option_of_vllms_own_is_left_alone() -> None:
    """The day that vLLM has --speculative-model again."""
    from vllm.engine import arg_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    parser.add_argument("--speculative-model", dest="theirs")
    arg_utils.AsyncEngineArgs.add_cli_args(parser)
    namespace = parser.parse_args(["--speculative-model", "anything", "--spec-model", "org/name"])
    assert (namespace.theirs, namespace.spec_model) == ("anything", "org/name")


def test_a_draft_source_needs_its_environment_variable(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = planted_options(4)
    configure(target, **options)
    monkeypatch.delenv("VLLM_HIDDEN_TRANSFER_TEST_DRAFTS")
    with pytest.raises(ValueError, match="VLLM_HIDDEN_TRANSFER_TEST_DRAFTS=1") as refusal:
        configure(target, **options)
    assert "\n" not in str(refusal.value)
    monkeypatch.setenv("VLLM_HIDDEN_TRANSFER_TEST_DRAFTS", "0")
    with pytest.raises(ValueError, match="VLLM_HIDDEN_TRANSFER_TEST_DRAFTS=1"):
        configure(target, **options)


def test_another_shape_is_refused_with_what_differs(target: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(target / "hidden_transfer", tmp_path / "maps")
    text = json.loads((checkpoint / "config.json").read_text())
    text["target"]["vocab_size"] = 1234
    (checkpoint / "config.json").write_text(json.dumps(text))
    options = {"method": "hidden_transfer", "model": str(checkpoint)}
    with pytest.raises(ValueError, match="vocabulary 1234 against the target's 2048"):
        configure(target, speculative_config=options)


def test_a_list_that_does_not_fit_is_refused(target: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(target / "hidden_transfer", tmp_path / "maps")
    save_vocabulary(checkpoint, np.array([5, 2048], dtype=np.int32))
    options = {"method": "hidden_transfer", "model": str(checkpoint)}
    with pytest.raises(ValueError, match="token ids from 0 to 2047") as refusal:
        configure(target, speculative_config=options)
    assert "\n" not in str(refusal.value)


def test_other_weights_are_refused_unless_allowed(target: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(target / "hidden_transfer", tmp_path / "maps")
    text = json.loads((checkpoint / "config.json").read_text())
    text["target"]["fingerprint"] = "of something else"
    (checkpoint / "config.json").write_text(json.dumps(text))
    options = {"method": "hidden_transfer", "model": str(checkpoint)}
    with pytest.raises(ValueError, match="allow_target_mismatch"):
        configure(target, speculative_config=options)
    config = configure(target, speculative_config={**options, "allow_target_mismatch": True})
    assert "other weights" in config.additional_config["hidden_transfer"]["mismatch"]


def test_the_v2_runner_is_refused_without_triton(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1 without Triton"):
        configure(target, speculative_config={"method": "hidden_transfer"})


def test_the_log_of_a_start_names_our_method_only(target: Path) -> None:
    """What stands for our method in vLLM is explained once, and vLLM's warnings about it are left out."""
    from vllm import logger as vllm_logger

    def said(**options: Any) -> list[str]:
        vllm_logger._print_warning_once.cache_clear()
        vllm_logger._print_info_once.cache_clear()
        records: list[logging.LogRecord] = []
        handler: Any = logging.Handler()
        handler.emit = records.append
        loggers = [logging.getLogger(name) for name in ("vllm", "vllm.hidden_transfer")]
        levels = [logger.level for logger in loggers]
        loggers[0].addHandler(handler)
        for logger in loggers:
            logger.setLevel(logging.INFO)
        try:
            configure(target, max_num_batched_tokens=2048, max_model_len=512, **options)
        finally:
            loggers[0].removeHandler(handler)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
        return [record.getMessage() for record in records]

    unfit = ("experimental", "suboptimal", "Async scheduling not supported")
    ours = said(speculative_config={"method": "hidden_transfer"})
    assert not [line for line in ours for word in unfit if word in line]
    (line,) = [line for line in ours if "stands for it" in line]
    assert "custom_class" in line
    assert "UnusedProposer" in line
    stock = {
        "method": "custom_class",
        "model": "vllm_hidden_transfer.engine.v1.runner.Else",
        "num_speculative_tokens": 3,
    }
    theirs = said(speculative_config=stock)
    for word in unfit:
        assert [line for line in theirs if word in line]
