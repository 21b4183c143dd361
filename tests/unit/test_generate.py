# SPDX-License-Identifier: Apache-2.0
"""`generate` without an engine: prompts, resuming, and what it refuses to mix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.support.models import add_tokenizer, random_model
from vllm_hidden_transfer.cli import app
from vllm_hidden_transfer.offline.cache import is_held_out, read_examples
from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.training.generate import (
    GenerateError,
    GenerateSettings,
    answered,
    generate,
)
from vllm_hidden_transfer.training.prompts import Request, read_prompts, requests_of

VOCABULARY = 400
QUICK = Path(__file__).parents[2] / "examples/prompts/quick.jsonl"
QUESTIONS = [f"What is {n} times {n}?" for n in range(7)]


class Engine:
    """Answers every request with its own length and seed, and remembers what it was asked."""

    def __init__(self, die_after: int | None = None) -> None:
        self.lengths: list[int] = []
        self.asked: list[Request] = []
        self.batches = 0
        self._die_after = die_after

    def start(
        self, settings: GenerateSettings, model_length: int
    ) -> Callable[[Sequence[Request]], list[list[int]]]:
        self.lengths.append(model_length)
        return self._answer

    def _answer(self, requests: Sequence[Request]) -> list[list[int]]:
        if self.batches == self._die_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.asked += requests
        return [[len(request.tokens), request.seed] * 8 for request in requests]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_model(
        tmp_path_factory.mktemp("generate") / "target", layers=1, vocabulary=VOCABULARY
    )
    return add_tokenizer(folder, VOCABULARY)


@pytest.fixture
def settings(tmp_path: Path, target: Path) -> GenerateSettings:
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return GenerateSettings(
        target=str(target),
        prompts=(prompts,),
        output=tmp_path / "own" / "answers.jsonl",
        batch=2,
        seed=100,
    )


def run(settings: GenerateSettings, engine: Engine | None = None, **changes: Any) -> Engine:
    engine = engine or Engine()
    console = Console(file=StringIO())
    generate(settings.model_copy(update=changes), console, engine.start)
    return engine


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_prompts_take_turns_between_temperatures(settings: GenerateSettings) -> None:
    engine = run(settings)
    examples = read_examples(settings.output)
    assert [example.id for example in examples] == [f"questions.jsonl#{n}" for n in range(1, 8)]
    assert [example.temperature for example in examples] == [0.0, 0.8, 0.0, 0.8, 0.0, 0.8, 0.0]
    assert [request.seed for request in engine.asked] == list(range(100, 107))
    assert [example.prompt for example in examples] == [r.tokens for r in engine.asked]
    assert engine.lengths == [max(len(r.tokens) for r in engine.asked) + 160]
    assert {example.kind for example in examples} == {"chat"}


def test_prompts_that_train_holds_out_take_turns_among_themselves(target: Path) -> None:
    """Taking turns by number alone left the README's quick start one greedy answer of 13 to judge."""
    prompts = read_prompts([QUICK])
    tokenizer = AutoTokenizer.from_pretrained(target)
    asked = requests_of(prompts, tokenizer, (0.0, 0.8), seed=0)
    for held_out in (False, True):
        group = [
            request.temperature for request in asked if is_held_out(request.tokens) is held_out
        ]
        assert group[:2] == [0.0, 0.8]
        assert abs(group.count(0.0) - group.count(0.8)) <= 1


def test_it_goes_on_where_it_was_killed(settings: GenerateSettings) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings, Engine(die_after=2))
    whole = settings.output.read_bytes()
    settings.output.write_bytes(whole[:-5])  # the last answer of four is cut
    engine = run(settings)
    assert [request.seed for request in engine.asked] == [103, 104, 105, 106]
    assert settings.output.read_bytes().startswith(whole)
    again = run(settings)
    assert again.lengths == []  # no engine for nothing
    assert len(read_examples(settings.output)) == 7


def test_a_limit_can_be_raised(settings: GenerateSettings) -> None:
    run(settings, limit=3)
    assert len(read_examples(settings.output)) == 3
    engine = run(settings)
    # The same prompts at the same temperatures and seeds as in one go.
    assert [(r.seed, r.temperature) for r in engine.asked] == [
        (103, 0.8),
        (104, 0.0),
        (105, 0.8),
        (106, 0.0),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperatures": (0.0, 1.0)}, "temperatures"),
        ({"seed": 5}, "seed"),
        ({"max_tokens": 20}, "max tokens"),
    ],
)
def test_other_settings_need_another_file(
    settings: GenerateSettings, changes: dict[str, Any], said: str
) -> None:
    run(settings, limit=3)
    before = settings.output.read_bytes()
    sentence = refused(GenerateError, lambda: run(settings, **changes))
    assert said in sentence
    assert "--output" in sentence
    assert settings.output.read_bytes() == before


def test_another_target_needs_another_file(settings: GenerateSettings, tmp_path: Path) -> None:
    run(settings, limit=3)
    other = random_model(tmp_path / "other", layers=2, vocabulary=VOCABULARY)
    add_tokenizer(other, VOCABULARY)
    assert "another target" in refused(GenerateError, lambda: run(settings, target=str(other)))


def test_a_file_without_a_note_is_adopted(settings: GenerateSettings) -> None:
    run(settings, limit=3)
    note = settings.output.with_name("answers.jsonl.about.json")
    before = note.read_bytes()
    note.unlink()
    assert len(run(settings).asked) == 4
    assert note.read_bytes() == before
    note.write_text("{")
    assert "damaged" in refused(GenerateError, lambda: run(settings))


def test_a_prompt_that_changed_is_noticed(settings: GenerateSettings) -> None:
    run(settings, limit=3)
    path = settings.prompts[0]
    path.write_text(json.dumps({"prompt": "Inserted"}) + "\n" + path.read_text())
    assert "questions.jsonl#1" in refused(GenerateError, lambda: run(settings))


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"text": "a"}\n', "[]\n", '{"i'])
def test_other_peoples_files_are_left_alone(
    settings: GenerateSettings, tmp_path: Path, content: str
) -> None:
    output = tmp_path / "notes"
    output.write_text(content)
    if content == '{"i':  # the first letters of an answer
        assert answered(output) == {}
        return
    assert "file of answers" in refused(GenerateError, lambda: run(settings, output=output))
    assert output.read_text() == content


def test_prompts_of_all_kinds(tmp_path: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    (tmp_path / "a.txt").write_text("First?\n\n Third? \n")
    user = {"role": "user", "content": "Who?"}
    rows = [
        {"id": "x", "kind": "code", "prompt": "Why?"},
        {"messages": [{"role": "system", "content": "Be brief."}, user]},
        {"messages": [user, {"role": "assistant", "content": "Ann."}]},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [(p.id, p.kind) for p in prompts] == [
        ("a.txt#1", "chat"),
        ("a.txt#3", "chat"),
        ("x", "code"),
        ("b.jsonl#2", "chat"),
        ("b.jsonl#3", "chat"),
    ]
    settings = GenerateSettings(target="any", prompts=(tmp_path,), output=tmp_path)
    texts = [
        tokenizer.decode(r.tokens)
        for r in requests_of(prompts, tokenizer, settings.temperatures, settings.seed)
    ]
    assert texts == [
        "user: First?\nassistant: ",
        "user: Third?\nassistant: ",
        "user: Why?\nassistant: ",
        "system: Be brief.\nuser: Who?\nassistant: ",
        "user: Who?\nassistant: ",
    ]
    tokenizer.chat_template = None
    plain = requests_of(prompts[:1], tokenizer, settings.temperatures, settings.seed)
    assert tokenizer.decode(plain[0].tokens) == "First?"
    assert "no chat template" in refused(
        DataError, lambda: requests_of(prompts, tokenizer, settings.temperatures, settings.seed)
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", "", "no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"}\n', "line 2"),
        ("p.jsonl", '{"prompt": "a", "kinds": "code"}\n', "kinds"),
        ("p.jsonl", '{"id": "a"}\n', "one of prompt and messages"),
        ("p.jsonl", '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}\n', "one of"),
        ("p.jsonl", '{"prompt": "  "}\n', "prompt: "),
        ("p.jsonl", '{"messages": []}\n', "messages: "),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}\n', "assistant"),
        ("p.jsonl", '{"id": "a", "prompt": "b"}\n{"id": "a", "prompt": "c"}\n', "twice"),
        ("p.md", "a", "neither .jsonl nor .txt"),
        ("p.txt", "\udcff", "UTF-8"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert said in refused(DataError, lambda: read_prompts([path]))


def test_missing_things_are_said(settings: GenerateSettings, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert "gone" in refused(DataError, lambda: run(settings, prompts=(gone.with_suffix(".txt"),)))
    gone.mkdir()
    assert "no tokenizer in" in refused(GenerateError, lambda: run(settings, target=str(gone)))
    add_tokenizer(gone, VOCABULARY)
    assert "safetensors" in refused(GenerateError, lambda: run(settings, target=str(gone)))
    assert "nobody/nothing" in refused(
        GenerateError, lambda: run(settings, target="nobody/nothing", output=tmp_path / "new")
    )
    assert "cannot be written" in refused(GenerateError, lambda: run(settings, output=gone))
    assert not settings.output.parent.exists()
    assert "shorten" in refused(GenerateError, lambda: run(settings, max_model_len=5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperatures": ()},
        {"temperatures": (-1.0,)},
        {"batch": 0},
        {"steps": 3},
        {"dtype": "int8"},
    ],
)
def test_wrong_settings_are_refused(settings: GenerateSettings, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateSettings.model_validate({**settings.model_dump(), **wrong})


def test_help_and_errors_of_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    help_text = runner.invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    for name, field in GenerateSettings.model_fields.items():
        option = {"temperatures": "--temperature"}.get(name, "--" + name.replace("_", "-"))
        assert option in help_text
        if isinstance(field.default, int | str):
            assert str(field.default) in help_text
    arguments = ["--target", "x/y", "--prompts", str(tmp_path / "gone.txt"), "--output", "o"]
    result = runner.invoke(app, ["generate", *arguments])
    assert result.exit_code == 1
    assert "gone.txt" in result.output
    assert "Traceback" not in result.output
    result = runner.invoke(app, ["generate", *arguments, "--temperature", "-1"])
    assert result.exit_code == 1
    assert "temperatures.0" in result.output
    assert not os.path.exists("o")
