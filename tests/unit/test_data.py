# SPDX-License-Identifier: Apache-2.0
"""Users' files as a corpus: every format, packing, what of a chat is taught, mixing, one-sentence errors."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.models import add_tokenizer
from vllm_hidden_transfer.offline.cache import Example, is_held_out
from vllm_hidden_transfer.offline.data import Corpus, read_corpus
from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.training.mixture import mix

VOCABULARY = 400
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which key opens the cellar?"},
    {"role": "assistant", "content": "The small one with the green ribbon."},
    {"role": "user", "content": "And the attic?"},
    {"role": "assistant", "content": "There is no lock on the attic, just push."},
]
OWN: dict[str, Any] = {
    "id": "q1",
    "kind": "code",
    "temperature": 0.8,
    "prompt": [5, 6, 7],
    "answer": [8] * 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    tokenizer: PreTrainedTokenizerFast,
    *paths: Path,
    max_tokens: int = 128,
    min_tokens: int = 2,
    **more: Any,
) -> Corpus:
    return read_corpus(paths, tokenizer, max_tokens=max_tokens, min_tokens=min_tokens, **more)


def refused(tokenizer: PreTrainedTokenizerFast, *paths: Path, **more: Any) -> str:
    """The sentence with which files are refused."""
    with pytest.raises(DataError) as caught:
        read(tokenizer, *paths, **more)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert len(sentence) <= 400
    return sentence


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_text_is_joined_and_cut_over_the_borders_of_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {"b.txt": "The owl sleeps. " * 30, "a.md": "def f(x): return x", "c.py": "x = 1\n" * 40}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in texts]
    found = read(tokenizer, *paths, max_tokens=32).examples
    stream: list[int] = []
    for text in texts.values():
        stream += [tokenizer.eos_token_id] * bool(stream) + ids(tokenizer, text)
    assert [token for example in found for token in example.tokens] == stream
    assert {len(example.tokens) for example in found[:-1]} == {32}
    assert {len(example.prompt) for example in found} == {1}
    assert {(example.kind, example.temperature) for example in found} == {("text", None)}
    # A piece has the name of the file in which it begins.
    first = -(-len(ids(tokenizer, texts["b.txt"])) // 32)
    assert [example.id for example in found[:first]] == [f"b.txt#{n}" for n in range(first)]
    assert found[-1].id.startswith("c.py#")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(alphabet="ab \nü", max_size=60), min_size=1, max_size=8),
    max_tokens=st.integers(4, 40),
)
def test_packing_loses_nothing_but_a_short_end(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    max_tokens: int,
) -> None:
    path = tmp_path_factory.mktemp("packed") / "data.jsonl"
    write_lines(path, *({"text": text} for text in texts))
    kept = [ids(tokenizer, text) for text in texts if text.strip()]
    held_out = [tokens for tokens in kept if is_held_out(tokens)]  # each is one section
    stream: list[int] = []
    for tokens in kept:
        if tokens not in held_out:
            stream += [tokenizer.eos_token_id] * bool(stream) + tokens
    if len(stream) < 4 or any(len(tokens) % max_tokens in (1, 2, 3) for tokens in held_out):
        return
    corpus = read(tokenizer, path, max_tokens=max_tokens, min_tokens=3)
    apart = [example for example in corpus.examples if example.held_out]
    assert sorted({tuple(tokens) for tokens in held_out if len(tokens) <= max_tokens}) == sorted(
        {tuple(example.tokens) for example in apart if example.tokens in held_out}
    )
    assert sum(len(e.tokens) for e in apart) == sum(map(len, held_out))
    taught = [example for example in corpus.examples if not example.held_out]
    packed = [token for example in taught for token in example.tokens]
    assert stream[: len(packed)] == packed
    rest = len(stream) - len(packed)
    assert rest < 4
    assert corpus.left_out.get("shorter than 3 tokens", 0) == (1 if rest else 0)
    assert corpus.left_out.get("empty documents", 0) == len(texts) - len(kept)
    assert len({example.id for example in corpus.examples}) == len(corpus.examples)
    assert all(len(example.tokens) == max_tokens for example in taught[:-1])


def test_pieces_begin_as_prompts_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    (tmp_path / "a.txt").write_text("The owl sleeps. " * 30)
    found = read(tokenizer, tmp_path / "a.txt", max_tokens=32).examples
    assert {tuple(example.prompt) for example in found} == {(first,)}
    assert {len(example.tokens) for example in found[:-1]} == {32}
    packed = [token for example in found for token in example.answer]
    assert packed == ids(tokenizer, "The owl sleeps. " * 30)[: len(packed)]


def test_a_token_for_the_end_of_text_wins_over_the_end_of_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    path = write_lines(tmp_path / "a.jsonl", {"text": "one " * 9}, {"text": "two " * 9})
    (example,) = read(tokenizer, path).examples
    assert example.tokens.count(tokenizer.convert_tokens_to_ids("<|endoftext|>")) == 1
    assert tokenizer.eos_token_id not in example.tokens


def test_a_chat_teaches_the_assistants_turns_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"messages": CHAT, "source": "ignored"})
    first, second = read(tokenizer, path, max_tokens=400).examples
    assert tokenizer.decode(first.answer) == "The small one with the green ribbon.</s>"
    assert tokenizer.decode(second.answer) == "There is no lock on the attic, just push.</s>"
    assert tokenizer.decode(first.prompt).endswith("cellar?</s>\n<s>assistant\n")
    assert tokenizer.decode(second.prompt).endswith("And the attic?</s>\n<s>assistant\n")
    assert "green ribbon" in tokenizer.decode(second.prompt)
    assert [first.id, second.id] == ["chat.jsonl#1@turn-1", "chat.jsonl#1@turn-2"]
    assert first.temperature is None


def test_the_turns_of_a_conversation_are_held_out_together(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [[{"role": "user", "content": f"Say {number}."}, *CHAT[2:]] for number in range(60)]
    path = write_lines(tmp_path / "chat.jsonl", *({"messages": chat} for chat in chats))
    found = read(tokenizer, path, max_tokens=400).examples
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert {(first.held_out, second.held_out) for first, second in pairs} == {
        (False, False),
        (True, True),
    }
    # An answer of the target's own to the same first message goes with them.
    for first, _ in pairs:
        assert Example("other", "chat", 0.8, first.prompt, [7] * 9).held_out is first.held_out


@pytest.mark.parametrize("form", ["text", "txt", "messages", "own"])
def test_names_and_copies_move_nothing_between_training_and_judging(
    form: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Renamed, copied beside itself, in another order: the same answers are held out, and none is taught as well."""
    words = [f"Case {number}: {'every owl ' * (number % 9)}sleeps." for number in range(400)]
    rows: dict[str, list[Any]] = {
        "text": [{"text": word * 3} for word in words],
        "txt": words,
        "messages": [
            {"messages": [{"role": "user", "content": word}, *CHAT[2:3]]} for word in words
        ],
        "own": [
            {**OWN, "id": f"q{number}", "prompt": [5, number % 256, 7 + number // 256]}
            for number in range(400)
        ],
    }

    def write(path: Path, chosen: list[Any]) -> Path:
        path.parent.mkdir(exist_ok=True)
        if form == "txt":
            path = path.with_suffix(".txt")
            path.write_text("\n".join(chosen))
            return path
        return write_lines(path.with_suffix(".jsonl"), *chosen)

    def split(*paths: Path) -> tuple[set[str], set[str]]:
        """Of training and of held out, every run of eight tokens."""
        runs: tuple[set[str], set[str]] = set(), set()
        for example in read(tokenizer, *paths, max_tokens=200).examples:
            whole = example.tokens
            runs[example.held_out].update(str(whole[at : at + 8]) for at in range(len(whole) - 7))
        return runs

    chosen = rows[form]
    plain = write(tmp_path / "a", chosen)
    taught, held_out = split(plain)
    assert held_out
    assert len(taught) > 4 * len(held_out)
    first, last = (
        write(tmp_path / "z" / "b", chosen[:200]),
        write(tmp_path / "z" / "a", chosen[200:]),
    )
    for paths in ([write(tmp_path / "other", chosen)], [plain, write(tmp_path / "copy", chosen)]):
        again = split(*paths)
        assert again[1] == held_out
        if form in ("messages", "own"):
            assert again[0] == taught
    if form != "txt":
        for paths in ([tmp_path / "z"], [last, first], [first, last]):
            assert split(*paths)[1] == held_out


def test_eval_holds_out_the_text_that_train_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """They cut text into pieces of other lengths."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Line {number} of all." for number in range(3000)))

    def held_out(max_tokens: int) -> list[int]:
        found = read(tokenizer, path, max_tokens=max_tokens, min_tokens=2).examples
        return [token for example in found if example.held_out for token in example.tokens]

    assert held_out(2048) == held_out(768) == held_out(64)
    assert held_out(64)


def test_a_template_without_an_end_of_turn_keeps_the_whole_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    path = write_lines(tmp_path / "chat.jsonl", {"messages": CHAT[:3]})
    (example,) = read(tokenizer, path).examples
    assert tokenizer.decode(example.answer) == "The small one with the green ribbon.\n"


def test_too_long_and_unanswered_conversations_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines(
        tmp_path / "chat.jsonl",
        {"messages": CHAT[:3]},
        {"messages": [*CHAT[:2], {"role": "assistant", "content": "word " * 300}]},
        {"messages": CHAT[:2]},
        {"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]},
    )
    corpus = read(tokenizer, path)
    assert [example.id for example in corpus.examples] == ["chat.jsonl#1@turn-1"]
    assert corpus.left_out == {
        "longer than 128 tokens": 1,
        "conversations without an answer": 1,
        "shorter than 2 tokens": 1,
    }


def test_what_generate_wrote_comes_as_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    greedy = {**OWN, "temperature": 0, "answer": [9] * 20}
    path = write_lines(tmp_path / "own.jsonl", OWN, greedy, OWN)
    with path.open("a") as file:
        file.write('{"id": "q2", "kind": "co')  # being written
    corpus = read(tokenizer, path)
    assert corpus.examples == [Example(**OWN), Example(**greedy)]
    assert corpus.left_out == {"given twice": 1, "last lines cut short": 1}


@pytest.mark.parametrize("column", ["text", "messages"])
def test_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, column: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # A key that only one message has comes as null in all others.
    rows: dict[str, list[Any]] = {
        "text": ["The owl sleeps. " * 9, None],
        "messages": [CHAT[:3], [{**message, "name": "Ann"} for message in CHAT]],
    }
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"source": ["a", "b"], column: rows[column]}), path)
    lines = write_lines(tmp_path / "data.jsonl", *({column: value} for value in rows[column]))
    found = read(tokenizer, path)
    assert found.left_out == read(tokenizer, lines).left_out
    assert [e.tokens for e in found.examples] == [e.tokens for e in read(tokenizer, lines).examples]


def test_saved_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["The owl sleeps. " * 9], "source": ["a"]})
    other = datasets.Dataset.from_dict({"text": ["no"], "source": ["a"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": other, "train": table}).save_to_disk(tmp_path / "split")
    datasets.DatasetDict({"test": other}).save_to_disk(tmp_path / "untrained")
    expected = ids(tokenizer, "The owl sleeps. " * 9)
    for name in ("one", "split"):
        (example,) = read(tokenizer, tmp_path / name, max_tokens=200).examples
        assert example.tokens == expected
        assert example.id == f"{name}#0"
    assert "no train" in refused(tokenizer, tmp_path / "untrained")


def test_a_folder_is_read_in_order_without_what_is_no_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    write_lines(root / "own.jsonl", OWN)
    (root / "own.jsonl.about.json").write_text("{}")
    (root / ".hidden").write_text("no")
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    write_lines(root / "deep" / "chat.jsonl", {"messages": CHAT[:3]})
    os.symlink(root, root / "loop")
    corpus = read(tokenizer, root)
    assert [example.id for example in corpus.examples] == ["corpus/deep/chat.jsonl#1@turn-1", "q1"]
    assert corpus.left_out == {"files that are not UTF-8 text": 1}
    assert "UTF-8" in refused(tokenizer, root / "picture.png")


def test_files_of_the_same_name_have_ids_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "chat.jsonl", {"messages": CHAT[:3]})
    paths = [tmp_path / name / "chat.jsonl" for name in ("a", "b")]
    found = read(tokenizer, *paths).examples
    assert [e.id for e in found] == ["chat.jsonl#1@turn-1", "chat.jsonl~2#1@turn-1"]
    assert "twice" in refused(tokenizer, paths[0], paths[0])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a"}\n{"text": }\n', "line 2 of .* not valid JSON"),
        ("[\n1\n]\n", "line 1"),
        ("[1, 2]\n", "no JSON object"),
        ('{"txt": "a"}\n', r"\['txt'\]"),
        ('{"text": 3}\n', "text: "),
        ('{"messages": "hello"}\n', "messages: "),
        ('{"messages": [{"role": "user"}]}\n', r"messages\.0\.content"),
        (json.dumps(OWN | {"tempature": 1}) + "\n", "tempature"),
        (json.dumps(OWN | {"prompt": "hello"}) + "\n", "prompt: "),
        (json.dumps(OWN | {"prompt": []}) + "\n", "prompt: "),
        (json.dumps(OWN | {"answer": [True] * 20}) + "\n", r"answer\.0"),
        (json.dumps(OWN | {"temperature": -1}) + "\n", "temperature: "),
        (json.dumps(OWN | {"answer": [VOCABULARY] * 20}) + "\n", f"{VOCABULARY}, outside"),
        (json.dumps(OWN | {"prompt": [-1]}) + "\n", "-1, outside"),
        ('{"messages": [{"role"', "nothing to train on"),
        (json.dumps({"messages": [{"role": "judge", "content": "a"}, *CHAT]}) + "\n", "no judges"),
        ('{"text": "\\u0000"}\n', "nothing to train on"),
        ("\n\n", "nothing to train on"),
        ("[" * 100_000 + "\n", "not valid JSON"),
    ],
)
def test_bad_lines_are_refused_in_one_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lines: str, said: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    sentence = refused(tokenizer, path, min_tokens=16)
    assert re.search(said, sentence), sentence
    assert "bad.jsonl" in sentence


def test_bad_files_are_refused_in_one_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "does not exist" in refused(tokenizer, tmp_path / "no.txt")
    (tmp_path / "empty").mkdir()
    assert "nothing to train on" in refused(tokenizer, tmp_path / "empty")
    assert "nothing to train on" in refused(tokenizer)
    (tmp_path / "bad.parquet").write_text("no")
    assert "as Parquet" in refused(tokenizer, tmp_path / "bad.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("no")
    assert "saved dataset" in refused(tokenizer, tmp_path / "saved")
    text = tmp_path / "a.txt"
    text.write_text("The owl sleeps. " * 9)
    assert "vocabulary of 5" in refused(tokenizer, text, vocab_size=5)
    assert "min_tokens" in refused(tokenizer, text, max_tokens=16, min_tokens=16)
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("bad.parquet", "saved"):
        assert "pip install 'vllm-hidden-transfer[data]'" in refused(tokenizer, tmp_path / name)


def test_parquet_without_a_known_column(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"story": ["a"]}), tmp_path / "data.parquet")
    assert "['story']" in refused(tokenizer, tmp_path / "data.parquet")


def test_tokenizers_that_cannot_are_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = write_lines(tmp_path / "chat.jsonl", {"messages": CHAT})
    # The generation prompt's last blank melts into the answer's first word.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert "generation prompt" in refused(tokenizer, chat)
    tokenizer.chat_template = None
    assert "no chat template" in refused(tokenizer, chat)
    tokenizer.eos_token = None
    text = write_lines(tmp_path / "text.jsonl", {"text": "one " * 9}, {"text": "two " * 9})
    assert "end-of-text" in refused(tokenizer, text)


def lengths() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 30), min_size=1, max_size=30)


def made(name: str, answers: Sequence[int]) -> list[Example]:
    return [Example(f"{name}{n}", "chat", 0.0, [1], [2] * size) for n, size in enumerate(answers)]


@settings(deadline=None)
@given(own=lengths(), other=lengths(), share=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_mix_meets_the_share_and_drops_from_one_side_only(
    own: list[int], other: list[int], share: float, seed: int
) -> None:
    ours, theirs = made("own", own), made("other", other)
    mixed = mix(ours, theirs, share, seed)
    assert mixed == mix(ours, theirs, share, seed)
    names = {example.id for example in mixed}
    assert len(names) == len(mixed)
    assert mixed == [example for example in ours + theirs if example.id in names]
    taken = [sum(len(e.answer) for e in mixed if e in side) for side in (ours, theirs)]
    assert taken[0] == sum(own) or taken[1] == sum(other)
    # As near as whole examples allow: half of the longest one of the side that was cut.
    if taken[0] < sum(own):
        assert abs(taken[0] - taken[1] * share / (1 - share)) <= max(own) / 2 + 1e-6
    elif taken[1] < sum(other):
        assert abs(taken[1] - taken[0] * (1 - share) / share) <= max(other) / 2 + 1e-6


def test_mix_at_the_ends() -> None:
    own, other = made("own", [3, 4]), made("other", [5])
    assert mix(own, other, 1.0, 0) == own
    assert mix(own, other, 0.0, 0) == other
    assert mix(own, [], 1.0, 0) == own
    assert mix([], other, 0.0, 0) == other
    for arguments, said in (
        (([], other, 0.5, 0), "generate"),
        ((own, [], 0.5, 0), "add other data"),
        ((own, other, 1.5, 0), "0 to 1"),
        ((own, other, float("nan"), 0), "0 to 1"),
    ):
        with pytest.raises(DataError, match=said):
            mix(*arguments)
