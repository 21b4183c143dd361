# SPDX-License-Identifier: Apache-2.0
"""The version check: what was run passes, anything else is refused or loudly let through."""

import logging

import pytest

from vllm_hidden_transfer.versions import (
    OVERRIDE_VARIABLE,
    UnsupportedVllmError,
    check_vllm_version,
    installed_vllm_version,
)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1.post1"])
def test_tested_versions_pass(version: str) -> None:
    assert check_vllm_version(version) == version


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.32.0rc1", "0.320.0", "dev"])
def test_other_versions_are_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(UnsupportedVllmError) as refusal:
        check_vllm_version(version)
    message = str(refusal.value)
    assert version in message
    assert f"{OVERRIDE_VARIABLE}=1" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["0", "", "yes"])
def test_only_the_value_1_overrides(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE_VARIABLE, value)
    with pytest.raises(UnsupportedVllmError):
        check_vllm_version("0.33.0")


def test_the_override_says_so_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE_VARIABLE, "1")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("vllm.hidden_transfer")
    logger.addHandler(handler)
    try:
        assert check_vllm_version("0.33.0") == "0.33.0"
    finally:
        logger.removeHandler(handler)
    (record,) = records
    assert record.levelno == logging.WARNING
    banner = record.getMessage()
    assert "UNTESTED vLLM 0.33.0" in banner
    assert len(banner.strip().splitlines()) >= 4


def test_this_environment_is_a_tested_one() -> None:
    assert check_vllm_version() == installed_vllm_version()
