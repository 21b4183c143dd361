# SPDX-License-Identifier: Apache-2.0
"""Hundreds of spoilt checkpoint folders: each is refused in one sentence, nothing else escapes and no code runs."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import resource
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from vllm_hidden_transfer.checkpoint.config import Conditioning, TransferConfig
from vllm_hidden_transfer.checkpoint.maps import (
    CheckpointError,
    TransferMaps,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.slow

STEPS, SIZE, LAYER = 2, 8, 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LONGEST = 400

BAD_INPUTS = {
    "test_truncated_files": 150,
    "test_header_lengths": 90,
    "test_header_garbage": 90,
    "test_header_edits": 150,
    "test_tensors": 70,
    "test_not_finite": 60,
    "test_pickles_never_run": 60,
    "test_config_is_no_object": 80,
    "test_config_fields_missing": 20,
    "test_config_fields_of_wrong_value": 450,
    "test_config_extra_fields": 60,
    "test_config_bytes": 90,
    "test_flipped_bytes": 60,
    "test_places": 20,
    "test_names_of_nothing": 60,
}
"""How many different bad inputs each test tries at least."""


def attempts(count: int) -> settings:
    """The same examples in every run, as slow as they need; more than ``count``, because some are alike, and how many
    depends on the constants that hypothesis finds in our sources."""
    examples = count + count // 4
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


def assert_one_sentence(text: str, longest: int = LONGEST) -> None:
    """What a user can read on one line of a terminal."""
    assert text.strip() == text != ""
    assert text.isprintable(), text  # so no newline either
    assert text.endswith((".", "?")), text
    assert "Traceback" not in text
    assert len(text) <= longest


def files_of(folder: Path, conditioning: Conditioning = "token") -> dict[str, bytes]:
    """The files of a small valid checkpoint."""
    config = TransferConfig.model_validate(
        {
            "speculators_config": {
                "verifier": {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
            },
            "num_transfer_steps": STEPS,
            "transfer_layer_ids": [LAYER],
            "conditioning": conditioning,
            "calibration": {"temperatures": [1.0, 1.5]},
            "target": {
                "hidden_size": SIZE,
                "num_hidden_layers": 4,
                "vocab_size": 16,
                "fingerprint": "bf16-samples-1:00",
            },
        }
    )
    torch.manual_seed(0)
    maps = TransferMaps(STEPS, SIZE, conditioning)
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter)
    save_checkpoint(folder, config, maps)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


class Bench:
    """A folder that holds one spoilt checkpoint after the other, and how many different ones it held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = files_of(folder)
        self.tried: set[object] = set()
        load_checkpoint(folder)  # as it is, it is fine: not everything is refused

    @property
    def config(self) -> Any:
        """A fresh copy of the valid configuration."""
        return json.loads(self.files[CONFIG])

    def write(self, **changes: bytes | None) -> None:
        """The valid files, with ``config`` and ``weights`` replaced or (None) removed."""
        for key, name in (("config", CONFIG), ("weights", WEIGHTS)):
            data = changes.get(key, self.files[name])
            if data is None:
                (self.folder / name).unlink(missing_ok=True)
            else:
                (self.folder / name).write_bytes(data)

    def refused(self, **changes: bytes | None) -> str:
        """The sentence with which the spoilt checkpoint is refused."""
        self.write(**changes)
        text = self.refused_at(self.folder, tuple(sorted(changes.items())))
        assert str(self.folder) in text
        return text

    def refused_at(self, path: Path, key: object) -> str:
        """The sentence with which whatever is at ``path`` is refused."""
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        self.tried.add(key)
        assert_one_sentence(str(caught.value))
        return str(caught.value)


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(tmp_path / "maps")
    yield bench
    assert len(bench.tried) >= BAD_INPUTS[request.node.name]


@contextlib.contextmanager
def little_memory(mebibytes: int = 128) -> Iterator[None]:
    """Fails where the peak of this process's memory grows by more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes << 10


def header_of(weights: bytes) -> tuple[Any, bytes]:
    """The parsed header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["x" * 600, "a\n" * 300, "\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def test_enough_bad_inputs() -> None:
    """The tests that count are the tests that there are, and they try enough."""
    counting = {
        name
        for name, value in globals().items()
        if name.startswith("test_") and "bench" in inspect.signature(value).parameters
    }
    assert counting == set(BAD_INPUTS)
    assert sum(BAD_INPUTS.values()) >= 500


@pytest.mark.parametrize("conditioning", ["token", "none"])
def test_valid_checkpoints_are_accepted(tmp_path: Path, conditioning: Conditioning) -> None:
    """As saved, and in the other float formats, with other metadata, with a torch file beside it."""
    files = files_of(tmp_path, conditioning)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert load_checkpoint(tmp_path)[1].conditioning == conditioning
    tensors = load(files[WEIGHTS])
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        (tmp_path / WEIGHTS).write_bytes(save(cast, metadata={"who": "else"}))
        assert load_checkpoint(tmp_path)[1].weight.dtype == dtype
    config = json.loads(files[CONFIG])
    del config["tree"], config["speculators_config"]["algorithm"]  # these have defaults
    config["calibration"]["temperatures"] = [1, 2]  # a whole number is a number
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert load_checkpoint(tmp_path)[0].tree.node_budget == 16


def test_truncated_files(bench: Bench) -> None:
    """Either file, cut anywhere."""
    weights, config = bench.files[WEIGHTS], bench.files[CONFIG].rstrip()

    @attempts(150)
    @given(st.integers(0, len(weights) - 1))
    def cut_weights(size: int) -> None:
        bench.refused(weights=weights[:size])

    @attempts(80)
    @given(st.integers(0, len(config) - 1))
    def cut_config(size: int) -> None:
        bench.refused(config=config[:size])

    cut_weights()
    cut_config()


def test_header_lengths(bench: Bench) -> None:
    """A length field that says anything else, in small files and in (sparse) ones of 11 GB; memory stays small."""
    weights = bench.files[WEIGHTS]
    valid = struct.unpack("<Q", weights[:8])[0]
    claims = [0, 1, 2, 8, len(weights), len(weights) - 8, 99_999_999, 10 << 30, 2**63 - 1, 2**63]

    @attempts(120)
    @given(
        st.sampled_from(claims) | st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(weights)),
        st.sampled_from([None, None, None, 11 << 30]),
    )
    def attempt(length: int, file_size: int | None) -> None:
        assume(length != valid)
        spoilt = struct.pack("<Q", length) + weights[8:]
        if file_size is None or 1 << 16 < length < 10 << 30:  # no parsing of megabytes of zeros
            bench.refused(weights=spoilt)
            return
        bench.write(weights=spoilt)
        os.truncate(bench.folder / WEIGHTS, file_size)
        bench.refused_at(bench.folder, (length, file_size))

    with little_memory():
        attempt()
        data = (10 << 30) - 8
        huge = {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}
        for names in ({"weight": huge}, {"weight": huge, "token_weight": huge}):
            header = json.dumps(names).encode()
            bench.write(weights=with_header(header, b""))
            os.truncate(bench.folder / WEIGHTS, 8 + len(header) + data)
            bench.refused_at(bench.folder, header)


def test_header_garbage(bench: Bench) -> None:
    """A header that is not the JSON it should be, with the right data behind it or none."""
    _, data = header_of(bench.files[WEIGHTS])
    garbage = (
        st.binary(max_size=200)
        | st.text(max_size=200).map(str.encode)
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.integers(1, 100_000).map(lambda depth: b"[" * depth)
        | st.integers(1, 100_000).map(lambda depth: b'{"a":' * depth)
    )

    @attempts(150)
    @given(garbage, st.booleans())
    def attempt(header: bytes, keep_data: bool) -> None:
        bench.refused(weights=with_header(header, data if keep_data else b""))

    attempt()


def test_header_edits(bench: Bench) -> None:
    """One thing wrong in an otherwise valid header."""
    valid, data = header_of(bench.files[WEIGHTS])
    size = len(data) // 2
    dtypes = ["F32", "F64", "F16", "F8_E4M3", "F8_E5M2", "F4", "I16", "U16", "BOOL", "C64", "bf16"]
    offsets = st.lists(st.integers(-1, 2 * size + 1) | st.just(10 << 30), max_size=3)
    entry_changes = (
        st.tuples(st.just("dtype"), st.sampled_from(dtypes) | JSON)
        | st.tuples(st.just("shape"), st.permutations([1, SIZE, 2 * SIZE]))
        | st.tuples(st.just("shape"), st.lists(st.integers(-1, 2**64) | st.integers(0, 9)) | JSON)
        | st.tuples(st.just("shape"), st.just([1] * 5000))
        | st.tuples(st.just("data_offsets"), offsets | JSON)
    )
    names = st.sampled_from(["weight", "token_weight"])

    @attempts(200)
    @given(names, entry_changes)
    def edit_entry(name: str, change: tuple[str, Any]) -> None:
        key, value = change
        header = json.loads(json.dumps(valid))
        assume(header[name][key] != value)
        header[name][key] = value
        bench.refused(weights=with_header(json.dumps(header).encode(), data))

    @attempts(60)
    @given(names, st.sampled_from(["drop", "replace", "rename", "add"]), JSON, st.text())
    def edit_entries(name: str, what: str, value: Any, new_name: str) -> None:
        header = json.loads(json.dumps(valid))
        assume(new_name not in header and header[name] != value)
        if what == "replace":
            header[name] = value
        elif what == "add":
            header[new_name] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        else:
            entry = header.pop(name)
            if what == "rename":
                header[new_name] = entry
        bench.refused(weights=with_header(json.dumps(header).encode(), data))

    edit_entry()
    edit_entries()
    many = {f"t\n{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}
    bench.refused(weights=with_header(json.dumps(many).encode(), b""))


DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def test_tensors(bench: Bench) -> None:
    """Valid safetensors files with other tensors: missing, extra, renamed, another shape or dtype."""
    names = st.sampled_from(["weight", "token_weight"])

    @attempts(220)
    @given(
        names,
        st.sampled_from(["drop", "add", "rename", "shape", "dtype", "both dtypes"]),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 9), min_size=1, max_size=4),
        st.text(min_size=1, max_size=6),
    )
    def attempt(name: str, what: str, dtype: torch.dtype, shape: list[int], new_name: str) -> None:
        tensors = load(bench.files[WEIGHTS])
        assume(new_name not in ("weight", "token_weight") and shape != [STEPS, SIZE, SIZE])
        if what in ("drop", "rename"):
            tensor = tensors.pop(name)
            if what == "rename":
                tensors[new_name] = tensor
        elif what == "add":
            tensors[new_name] = torch.zeros(shape)
        elif what == "shape":
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
        elif what == "dtype":  # of one of them: floats of two kinds are refused too
            tensors[name] = tensors[name].to(dtype)
        else:
            assume(dtype not in (torch.float64, torch.float32, torch.float16))
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        bench.refused(weights=save(tensors))

    attempt()


def test_not_finite(bench: Bench) -> None:
    """A single NaN or infinity anywhere, in any float format."""

    @attempts(80)
    @given(
        st.sampled_from(["weight", "token_weight"]),
        st.integers(0, STEPS * SIZE * SIZE - 1),
        st.sampled_from([float("nan"), float("inf"), -float("inf")]),
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    )
    def attempt(name: str, place: int, value: float, dtype: torch.dtype) -> None:
        tensors = {key: t.to(dtype) for key, t in load(bench.files[WEIGHTS]).items()}
        tensors[name].view(-1)[place] = value
        assert "NaN or infinity" in bench.refused(weights=save(tensors))

    attempt()


class Bomb:
    """Unpickling one makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_pickles_never_run(bench: Bench, tmp_path: Path) -> None:
    """Pickles, raw and as torch.save writes them, in place of either file or beside them, disguised or not."""
    marker = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir()  # the bomb is live
    marker.rmdir()
    folder = bench.folder

    @attempts(110)
    @given(
        st.integers(0, pickle.HIGHEST_PROTOCOL),
        st.sampled_from(["raw", "torch", "torch, no zip"]),
        st.sampled_from(["weights", "config", "bin instead", "bin and config", "beside"]),
        st.sampled_from(["", "header", "length"]),
        st.booleans(),
    )
    def attempt(protocol: int, kind: str, place: str, disguise: str, in_tensors: bool) -> None:
        content: Any = Bomb(marker)
        if in_tensors:
            content = {"weight": Bomb(marker), "token_weight": torch.zeros(STEPS, SIZE, SIZE)}
        path = folder / "pytorch_model.bin"
        if kind == "raw":
            path.write_bytes(pickle.dumps(content, protocol))
        else:
            zipped = kind == "torch"
            torch.save(
                content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
            )
        data = path.read_bytes()
        if disguise == "header":
            data = bench.files[WEIGHTS][: 8 + 16] + data
        elif disguise == "length":
            data = with_header(data, b"")
        if place == "weights":
            bench.refused(weights=data)
        elif place == "config":
            bench.refused(config=data)
        elif place == "bin instead":
            path.write_bytes(data)
            bench.refused(weights=None)
        elif place == "bin and config":
            path.write_bytes(data)
            bench.refused(weights=None, config=data)
        else:
            path.write_bytes(data)
            bench.write()
            load_checkpoint(folder)  # not an error, and not looked at
        assert not marker.exists()

    attempt()


def paths_of(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON document, the whole excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*above, key)
        if isinstance(inner, dict | list):
            yield from paths_of(inner, (*above, key))


def edited(document: Any, path: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> bytes:
    """The document with ``edit(container, key)`` done at a place."""
    container = document
    for key in path[:-1]:
        container = container[key]
    edit(container, path[-1])
    return json.dumps(document).encode()


def whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


ACCEPTABLE: dict[tuple[Any, ...], Callable[[Any], bool]] = {
    # Places where more than the present value may stand. Nowhere else anything but it may.
    ("speculators_config", "verifier", "name_or_path"): lambda v: isinstance(v, str),
    ("speculators_config", "verifier", "architectures", 0): lambda v: isinstance(v, str),
    ("speculators_config", "verifier", "architectures"): lambda v: (
        isinstance(v, list) and len(v) > 0 and all(isinstance(name, str) for name in v)
    ),
    ("transfer_layer_ids", 0): lambda v: whole(v, 0) and v < 4,
    ("transfer_layer_ids",): lambda v: (
        isinstance(v, list) and len(v) == 1 and whole(v[0], 0) and v[0] < 4
    ),
    ("calibration", "temperatures", 0): lambda v: type(v) in (int, float) and 0 < v < float("inf"),
    ("calibration", "temperatures", 1): lambda v: type(v) in (int, float) and 0 < v < float("inf"),
    ("calibration", "temperatures"): lambda v: isinstance(v, list) and len(v) == STEPS,
    ("held_out_by",): lambda v: v in (None, "content"),
    ("tree", "node_budget"): lambda v: whole(v, 1),
    ("tree",): lambda v: isinstance(v, dict) and set(v) <= {"node_budget"},
    ("target", "num_hidden_layers"): lambda v: whole(v, LAYER + 1),
    ("target", "vocab_size"): lambda v: whole(v, 1),
    ("target", "fingerprint"): lambda v: isinstance(v, str),
}
OPTIONAL = {
    ("speculators_config", "algorithm"),
    ("bigram_rank",),
    ("held_out_by",),
    ("tree",),
    ("tree", "node_budget"),
}


def test_config_is_no_object(bench: Bench) -> None:
    """Any JSON document that is not ours."""

    @attempts(110)
    @given(JSON)
    def attempt(value: Any) -> None:
        bench.refused(config=json.dumps(value).encode())

    attempt()


def test_config_fields_missing(bench: Bench) -> None:
    """Every field that has no default, removed."""
    for path in paths_of(bench.config):
        if path not in OPTIONAL:
            bench.refused(config=edited(bench.config, path, lambda at, key: at.pop(key)))


RAW = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"0", b"1.5", b"1.0", b"true", b'"1"'),
    *(b"null", b"9" * 5000, b"-" + b"9" * 4000, b"[" * 900 + b"]" * 900, b"[" * 50_000),
    *(b'"\\ud800"', b"[]", b"{}", b"[1]", b"8.0", b'"8"', b"2.0"),
)
"""JSON and what is nearly JSON, put in the place of every field."""


def test_config_fields_of_wrong_value(bench: Bench) -> None:
    """Every field replaced by something of another type, negative, huge, not a number, too deep or too long."""
    places = list(paths_of(bench.config))

    def put(path: tuple[Any, ...], text: bytes) -> bool:
        """Whether that was a wrong value for this field, and then refused."""
        parsed: Any = object()
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(text)
        before: list[Any] = []
        edited(bench.config, path, lambda at, key: before.append(at[key]))
        same = before[0] == parsed and type(before[0]) is type(parsed)
        if same or ACCEPTABLE.get(path, lambda _: False)(parsed):
            return False
        marked = edited(bench.config, path, lambda at, key: at.__setitem__(key, "PUT HERE"))
        bench.refused(config=marked.replace(b'"PUT HERE"', text))
        return True

    refused = sum(put(path, text) for path in places for text in RAW)
    assert refused > 0.9 * len(places) * len(RAW)

    @attempts(150)
    @given(st.sampled_from(places), JSON)
    def attempt(path: tuple[Any, ...], value: Any) -> None:
        assume(put(path, json.dumps(value).encode()))

    attempt()


def test_config_extra_fields(bench: Bench) -> None:
    """A field too many, in any part of the file."""
    parts = [path for path in paths_of(bench.config) if path[-1] in bench.config]
    objects = [p for p in parts if edited_value(bench.config, p)] + [
        ("speculators_config", "verifier")
    ]

    @attempts(90)
    @given(
        st.sampled_from([(), *objects]),
        st.text() | st.text(min_size=1).map(lambda t: t * 900),
        JSON,
    )
    def attempt(path: tuple[Any, ...], name: str, value: Any) -> None:
        config = bench.config
        part = config
        for key in path:
            part = part[key]
        assume(name not in part)
        part[name] = value
        bench.refused(config=json.dumps(config).encode())

    attempt()


def edited_value(document: Any, path: tuple[Any, ...]) -> bool:
    """Whether an object stands there."""
    for key in path:
        document = document[key]
    return isinstance(document, dict)


def test_config_bytes(bench: Bench) -> None:
    """Not UTF-8, not JSON, too deep, too long."""
    config = bench.files[CONFIG]

    @attempts(100)
    @given(
        st.integers(0, len(config)),
        st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\x80\x04K\x01."]),
    )
    def insert(place: int, bad: bytes) -> None:
        bench.refused(config=config[:place] + bad + config[place:])

    insert()
    text = config.decode()
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        bench.refused(config=text.encode(encoding))
    for size in (1, 900, 1100, 100_000):
        bench.refused(config=b"[" * size)
        bench.refused(config=b'{"a":' * size + b"1" + b"}" * size)
    bench.refused(config=config + b" " * (1 << 20))
    bench.write()
    with little_memory():
        os.truncate(bench.folder / CONFIG, 10 << 30)
        bench.refused_at(bench.folder, "10 GB of config.json")


def test_flipped_bytes(bench: Bench) -> None:
    """Any bytes of either file changed: refused in one sentence, or a checkpoint whose maps are finite."""

    @attempts(300)
    @given(
        st.sampled_from(["config", "weights"]),
        st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4),
    )
    def attempt(which: str, flips: list[tuple[int, int]]) -> None:
        data = bytearray(bench.files[CONFIG if which == "config" else WEIGHTS])
        for place, mask in flips:
            data[place % min(len(data), 600)] ^= mask
        bench.write(**{which: bytes(data)})
        try:
            _, maps = load_checkpoint(bench.folder)
        except CheckpointError as error:
            assert_one_sentence(str(error))
            bench.tried.add(bytes(data))
        else:
            assert all(torch.isfinite(tensor).all() for tensor in maps.parameters())

    attempt()


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user to whom file modes apply: root reads everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_places(bench: Bench) -> None:
    """What is no folder, or holds something else where a file should be, or may not be read."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)

        def place(name: str) -> Path:
            folder = root / name
            files_of(folder)
            return folder

        def refused(path: Path) -> str:
            return bench.refused_at(path, path.name)

        (root / "file").write_bytes(b"x")
        (root / "empty").mkdir()
        (root / "dangling").symlink_to(root / "nowhere")
        (root / "loop").symlink_to(root / "loop")
        os.mkfifo(root / "pipe")
        for kind in ("file", "empty", "dangling", "loop", "pipe"):
            assert str(root / kind) in refused(root / kind)

        for inner in (CONFIG, WEIGHTS):
            replacements: dict[str, Callable[[Path], Any]] = {
                "missing": lambda path: None,
                "folder": lambda path: path.mkdir(),
                "link": lambda path: path.symlink_to(root / "nowhere"),
                "pipe": os.mkfifo,  # opening it would wait for ever
                "zeros": lambda path: path.symlink_to("/dev/zero"),
                "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
            }
            for kind, put in replacements.items():
                folder = place(f"{kind} for {inner}")
                (folder / inner).unlink()
                put(folder / inner)
                assert str(folder) in refused(folder)

            folder = place(f"unreadable {inner}")
            (folder / inner).chmod(0)
            with without_rights():
                assert str(folder) in refused(folder)
        folder = place("closed")
        load_checkpoint(folder)
        folder.chmod(0)
        with without_rights():
            refused(folder)
            refused(folder / "within")
        folder.chmod(0o755)


def test_names_of_nothing(bench: Bench, tmp_path: Path) -> None:
    """Paths at which there is no checkpoint, whatever characters they have and however long they are."""

    @attempts(80)
    @given(st.text() | st.characters().map(lambda c: c * 300) | st.text(min_size=1).map("a\0".join))
    def attempt(name: str) -> None:
        bench.refused_at(tmp_path / "empty" / name, name)

    (tmp_path / "empty").mkdir()
    attempt()
    for length in (254, 256, 4096, 100_000):
        bench.refused_at(tmp_path / ("x" * length), length)
