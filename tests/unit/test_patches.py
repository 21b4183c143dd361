# SPDX-License-Identifier: Apache-2.0
"""Seams are checked before they are used: what is missing is refused, and nothing is half applied."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vllm_hidden_transfer.patches import base, catalogue, refuser
from vllm_hidden_transfer.patches.base import MissingSurfaceError, Patch, Surface


def test_every_patch_is_documented() -> None:
    for patch in (*catalogue.AT_START, *catalogue.IN_WORKERS, refuser.ENGINES, refuser.OPTIONS):
        assert patch.why
        assert patch.how
        assert patch.versions
        assert patch.retired_by
        assert patch.surfaces


@pytest.mark.parametrize(
    "surface",
    [
        Surface("vllm.no_such_module", "anything"),
        Surface("vllm.engine.arg_utils", "EngineArgs.no_such_method"),
        Surface("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("no_such_parameter",)),
    ],
)
def test_a_missing_surface_is_named(surface: Surface) -> None:
    with pytest.raises(MissingSurfaceError, match="cannot run with this vLLM") as refusal:
        surface.check()
    assert "no_such" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_file_has_a_row() -> None:
    folder = Path(catalogue.__file__).parent
    text = (folder / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert path.stem in {"__init__", "base", "catalogue"} or f"`{path.name}`" in text


def test_nothing_is_applied_when_one_seam_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []

    def patch(name: str, surface: Surface) -> Patch:
        return Patch(name, "why", "how", "0", "never", (surface,), lambda: applied.append(name))

    present = Surface("vllm.engine.arg_utils", "EngineArgs")
    absent = Surface("vllm.engine.arg_utils", "NoSuchArgs")
    monkeypatch.setattr(catalogue, "AT_START", (patch("one", present), patch("two", absent)))
    with pytest.raises(MissingSurfaceError, match="NoSuchArgs"):
        catalogue.install()
    assert applied == []
    assert not {"one", "two"} & base._applied


@pytest.mark.parametrize(
    ("missing", "v2", "gpu"),
    [
        *((surface, False, False) for surface in catalogue.SUBCLASSED),
        *((surface, True, False) for surface in catalogue.SUBCLASSED_V2),
        (catalogue.CPU_RUNNER_V2, True, False),
        *((surface, True, True) for surface in catalogue.EVERYWHERE),
        *((surface, True, True) for surface in catalogue.SUBCLASSED_GPU),
    ],
    ids=lambda value: value.name if isinstance(value, Surface) else "",
)
def test_every_subclassed_seam_is_checked(
    missing: Surface, v2: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take one seam away from vLLM at a time: the engine's check must name it."""
    import importlib

    catalogue.check_engine(v2=v2, gpu=gpu)
    owner: object = importlib.import_module(missing.module)
    *path, last = missing.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    # A subclass may inherit the name: hide it from the whole hierarchy.
    for base_class in getattr(owner, "__mro__", (owner,)):
        if last in vars(base_class):
            monkeypatch.delattr(base_class, last)
    with pytest.raises(MissingSurfaceError, match=last):
        catalogue.check_engine(v2=v2, gpu=gpu)


def test_patches_are_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    present = Surface("vllm.engine.arg_utils", "EngineArgs")
    patch = Patch("only once", "w", "h", "0", "n", (present,), lambda: applied.append(1))
    monkeypatch.setattr(base, "_applied", set())
    patch.apply()
    dataclasses.replace(patch).apply()
    assert applied == [1]
