# SPDX-License-Identifier: Apache-2.0
"""Hundreds of wrong serving options, and of targets and checkpoints that do not fit: each is refused in one sentence.

``plan`` runs as vLLM calls it, but for the checks of the device and of the model's kind and structure, which need
vLLM itself (tests/engine/test_configuration.py).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.unit.test_fuzz_checkpoints import (
    JSON,
    LAYER,
    LONGEST,
    SIZE,
    assert_one_sentence,
    attempts,
    edited,
    files_of,
    with_header,
    without_rights,
)
from vllm_hidden_transfer.asking import ConfigurationError, requested
from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.engine import configuration
from vllm_hidden_transfer.engine.configuration import MAX_BUDGET, OPTIONS, Plan, plan
from vllm_hidden_transfer.names import METHOD

pytestmark = pytest.mark.slow

LONGEST_CONFIGURATION = 600
"""A refusal to serve may quote a refusal of the checkpoint and say what to do."""

BAD_INPUTS = {
    "test_wrong_values": 150,
    "test_misspelt_options": 80,
    "test_misspelt_methods": 40,
    "test_options_that_are_no_object": 25,
    "test_options_twice": 10,
    "test_own_additional_config": 20,
    "test_checkpoints_that_do_not_fit": 50,
    "test_hostile_targets": 90,
}
"""How many bad inputs each test tries at least."""

# Beyond JSON: what a Python caller may hand over.
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
ODD = st.sampled_from([10**5000, -(10**5000), DEEP, b"bytes", 3.0, True, (), set(), Path("x")])
VALUES = JSON | ODD


class Bench:
    """A target with a checkpoint that fits, and the plan for serving it with some options."""

    def __init__(self, folder: Path) -> None:
        self.target = folder / "target"
        self.checkpoint = self.target / METHOD
        self.target.mkdir()
        torch.manual_seed(1)
        self.weights = save({"a": torch.randn(20, 9), "b": torch.randn(70), "c": torch.ones(())})
        (self.target / "model.safetensors").write_bytes(self.weights)
        self.files = files_of(self.checkpoint)
        config = json.loads(self.files["config.json"])
        config["target"]["fingerprint"] = fingerprint_target(self.target)
        self.files["config.json"] = json.dumps(config).encode()
        (self.checkpoint / "config.json").write_bytes(self.files["config.json"])
        self.tried = 0
        assert self.plan({"method": METHOD}).budget == 16  # not everything is refused

    def plan(self, options: Any, **arguments: Any) -> Plan:
        given = {
            "speculative_config": options,
            "spec_method": None,
            "spec_model": None,
            "spec_tokens": None,
            "additional_config": {},
            "revision": None,
            "download_dir": None,
            "ignore_patterns": None,
            "load_format": "auto",
        }
        text = SimpleNamespace(hidden_size=SIZE, num_hidden_layers=4, vocab_size=16)
        model: Any = SimpleNamespace(model=str(self.target), hf_text_config=text)
        parallel: Any = SimpleNamespace()
        args: Any = SimpleNamespace(**{**given, **arguments})
        made = plan(args, model, parallel)
        assert made is not None
        return made

    def refused(self, options: Any, **arguments: Any) -> str:
        """The sentence with which the options are refused."""
        with pytest.raises(ConfigurationError) as caught:
            self.plan(options, **arguments)
        self.tried += 1
        assert_one_sentence(str(caught.value), LONGEST_CONFIGURATION)
        return str(caught.value)


@pytest.fixture
def bench(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    for check in ("_check_combination", "_check_structure"):
        monkeypatch.setattr(configuration, check, lambda *_: None)
    bench = Bench(tmp_path)
    yield bench
    assert bench.tried >= BAD_INPUTS.get(request.node.name, 0)


def test_enough_bad_inputs() -> None:
    assert set(BAD_INPUTS) < set(globals())
    assert sum(BAD_INPUTS.values()) >= 400


def test_valid_options_are_accepted(bench: Bench) -> None:
    checkpoint = str(bench.checkpoint)
    for options in (
        {"method": METHOD, "model": checkpoint},
        {"method": METHOD, "model": METHOD},
        {"method": METHOD, "model": None, "num_speculative_tokens": None},
        {"model": METHOD},
        {"model": checkpoint, "allow-target-mismatch": True},
    ):
        made = bench.plan(options)
        assert made.settings.checkpoint == checkpoint
        assert made.settings.mismatch is None
    for budget in (1, 16, MAX_BUDGET):
        options = {"method": METHOD, "num-speculative-tokens": budget}
        assert bench.plan(options).budget == budget
    assert bench.plan(None, spec_method=METHOD, spec_tokens=5).budget == 5
    settings = bench.plan({"method": METHOD}).settings.model_dump()
    again = bench.plan({"method": METHOD}, additional_config={METHOD: settings})
    assert again.settings.model_dump() == settings  # vLLM may plan the same arguments twice


def test_wrong_values(bench: Bench) -> None:
    """Every option with a value of another type, out of range, or naming nothing."""

    def wrong(key: str, value: Any) -> bool:
        if key == "num_speculative_tokens":
            return value is not None and not (type(value) is int and 1 <= value <= MAX_BUDGET)
        if key in ("allow_target_mismatch", "always_draft"):
            return not isinstance(value, bool)
        if key == "sources":
            return value is not None
        return value is not None and value != METHOD

    names = st.text().map(lambda name: f"nowhere {name}") | st.text(min_size=1).map("/x".__add__)
    values = VALUES | st.integers(-5, 2000) | names | names.map(lambda name: name * 99)

    @attempts(260)
    @given(st.sampled_from(OPTIONS[1:]), values, st.booleans())
    def attempt(key: str, value: Any, hyphens: bool) -> None:
        assume(wrong(key, value))
        written = key.replace("_", "-") if hyphens else key
        text = bench.refused({"method": METHOD, written: value})
        assert key in text or key == "model"

    attempt()


def test_misspelt_options(bench: Bench) -> None:
    """A key that is no option, near to one or not, with any value; the answer names the nearest."""

    @attempts(60)
    @given(st.sampled_from(OPTIONS), st.integers(0, 30), st.sampled_from(["", "x", "_"]), VALUES)
    def near(option: str, place: int, instead: str, value: Any) -> None:
        key = option[: place % len(option)] + instead + option[place % len(option) + 1 :]
        assume(key not in OPTIONS)
        text = bench.refused({"method": METHOD, key: value})
        assert repr(option) in text or len(key) < 5 or place % len(option) == 0

    @attempts(60)
    @given(st.text() | st.integers() | st.none() | st.sampled_from(["k" * 100_000, "a\nb"]), VALUES)
    def far(key: Any, value: Any) -> None:
        assume(str(key).replace("-", "_") not in OPTIONS)
        bench.refused({"method": METHOD, key: value})

    near()
    far()


def test_misspelt_methods(bench: Bench) -> None:
    """hidden_transfer with one letter wrong, missing or too many is not stock's affair."""

    @attempts(60)
    @given(st.integers(0, len(METHOD) - 1), st.sampled_from("abcxyz_-.\n "), st.integers(0, 2))
    def attempt(place: int, letter: str, removed: int) -> None:
        method = METHOD[:place] + letter + METHOD[place + removed :]
        assume(method != METHOD)
        assert repr(METHOD) in bench.refused({"method": method})

    attempt()


def test_options_that_are_no_object(bench: Bench) -> None:
    """--speculative-config with a list, a number, a text."""

    @attempts(60)
    @given(VALUES)
    def attempt(options: Any) -> None:
        assume(options is not None and not isinstance(options, dict))
        bench.refused(options)
        bench.refused(options, spec_method=METHOD)

    attempt()


def test_options_of_other_methods_are_left_alone(bench: Bench) -> None:
    """Whatever else the options say: nothing, or a refusal in one sentence, never another error."""

    @attempts(150)
    @given(st.dictionaries(st.sampled_from(OPTIONS) | st.text() | st.integers(), VALUES))
    def attempt(options: dict[Any, Any]) -> None:
        args: Any = SimpleNamespace(
            speculative_config=options, spec_method=None, spec_model=None, spec_tokens=None
        )
        assume(options.get("method") != METHOD and options.get("model") != METHOD)
        try:
            assert requested(args) is None
        except ConfigurationError as error:
            assert_one_sentence(str(error), LONGEST_CONFIGURATION)

    attempt()
    plain = bench.target.parent / "plain"
    plain.mkdir()
    deep = plain / "config.json"
    for text in (b"[" * 100_000, b"[]", b"\xff", b"{", b"null"):
        deep.write_bytes(text)  # a model, not a checkpoint
        args: Any = SimpleNamespace(
            speculative_config={"model": str(plain)},
            spec_method=None,
            spec_model=None,
            spec_tokens=None,
        )
        assert requested(args) is None


def test_options_twice(bench: Bench) -> None:
    """An option said twice, by a flag or with a hyphen."""
    flags = {"spec_method": "method", "spec_model": "model", "spec_tokens": OPTIONS[2]}
    for flag, key in flags.items():
        for value in (METHOD, "x" * 1000, 3):
            assert key in bench.refused({"method": METHOD, key: value}, **{flag: value})
    for key in OPTIONS[2:]:
        twice = {"method": METHOD, key: 3, key.replace("_", "-"): 3}
        assert key in bench.refused(twice)


def test_own_additional_config(bench: Bench) -> None:
    """What belongs to the plugin in --additional-config, filled by somebody else."""

    @attempts(60)
    @given(VALUES, st.booleans())
    def attempt(value: Any, inside: bool) -> None:
        if inside:
            assume(value is not None and not isinstance(value, str))
            value = {"draft_source": value}
        assume(not isinstance(value, dict) or "draft_source" in value)
        bench.refused({"method": METHOD}, additional_config={METHOD: value})

    @attempts(40)
    @given(VALUES)
    def whole(value: Any) -> None:
        assume(not isinstance(value, dict | None))
        bench.refused({"method": METHOD}, additional_config=value)

    attempt()
    whole()
    assert bench.plan({"method": METHOD}, additional_config=None).settings.draft_source is None


def test_checkpoints_that_do_not_fit(bench: Bench) -> None:
    """A checkpoint whose numbers are possible, but not those of the target, or beyond what can be served."""
    numbers = st.integers(1, 10**6) | st.sampled_from([2**63, 2**64, 10**400, 10**4000])
    places: list[tuple[Any, ...]] = [
        ("target", "num_hidden_layers"),
        ("target", "vocab_size"),
        ("target", "hidden_size"),
        ("tree", "node_budget"),
    ]

    @attempts(80)
    @given(st.sampled_from(places), numbers)
    def number(path: tuple[Any, ...], value: int) -> None:
        least = {"num_hidden_layers": LAYER + 1, "node_budget": MAX_BUDGET + 1}.get(path[-1], 1)
        config = json.loads(bench.files["config.json"])
        assume(value >= least and config[path[0]][path[1]] != value)
        put = edited(config, path, lambda at, key: at.__setitem__(key, value))
        (bench.checkpoint / "config.json").write_bytes(put)
        bench.refused({"method": METHOD})

    @attempts(40)
    @given(st.text() | st.just("f" * 5000))
    def fingerprint(value: str) -> None:
        config = json.loads(bench.files["config.json"])
        path = ("target", "fingerprint")
        put = edited(config, path, lambda at, key: at.__setitem__(key, value))
        (bench.checkpoint / "config.json").write_bytes(put)
        assert "allow_target_mismatch" in bench.refused({"method": METHOD})
        allowed = bench.plan({"method": METHOD, "allow_target_mismatch": True})
        assert allowed.settings.mismatch is not None

    number()
    fingerprint()


def test_hostile_targets(bench: Bench) -> None:
    """Targets whose weights cannot be fingerprinted: one sentence, and no maps are used for them unasked."""
    path = bench.target / "model.safetensors"
    index = bench.target / "model.safetensors.index.json"

    def hostile() -> None:
        with pytest.raises(FingerprintError) as caught:
            fingerprint_target(bench.target)
        assert_one_sentence(str(caught.value), LONGEST)
        assert str(bench.target) in str(caught.value)
        assert "allow_target_mismatch" in bench.refused({"method": METHOD})

    @attempts(60)
    @given(st.integers(0, len(bench.weights) - 1), st.booleans())
    def spoilt_weights(size: int, cut: bool) -> None:
        spoilt = struct.pack("<Q", 2**64 - 1 - size) + bench.weights[8:]
        path.write_bytes(bench.weights[:size] if cut else spoilt)
        hostile()

    spoilt_weights()
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # not every dtype of the format is one of torch's
    for dtype, width in bits.items():
        for shape in ([4, 8], [32], [2, 2, 8]):
            size = math.prod(shape) * width // 8
            entry = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
            path.write_bytes(with_header(json.dumps(entry).encode(), bytes(size)))
            hostile()
    path.unlink()
    hostile()  # no weights at all
    path.write_bytes(bench.weights)

    @attempts(60)
    @given(JSON, st.booleans())
    def spoilt_index(value: Any, as_map: bool) -> None:
        document = {"weight_map": {"a": value}} if as_map else value
        index.write_text(json.dumps(document))
        hostile()

    spoilt_index()
    for text in (b"\xff", b"[" * 100_000, b"9" * 5000, b'{"weight_map": {"a": 1, "b": "x"}}'):
        index.write_bytes(text)
        hostile()
    index.unlink()
    assert fingerprint_target(bench.target)


def test_unreadable_targets(bench: Bench) -> None:
    """A folder that may not be entered."""
    bench.target.chmod(0)
    with without_rights(), pytest.raises(FingerprintError) as caught:
        fingerprint_target(bench.target)
    bench.target.chmod(0o700)
    assert_one_sentence(str(caught.value))
