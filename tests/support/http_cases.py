# SPDX-License-Identifier: Apache-2.0
"""Requests over HTTP as plain JSON, and what of the replies is compared."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.support.answers import TOLERANCE

PASSING = {"id", "created", "system_fingerprint", "model"}
"""Keys that differ from reply to reply."""


def post(url: str, path: str, body: dict[str, Any] | None = None, seconds: float = 240) -> Any:
    """POST some JSON and read some (or the text where it is none)."""
    with _open(url, path, body or {}, seconds) as reply:
        text = reply.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


def stream(url: str, path: str, body: dict[str, Any], seconds: float = 240) -> Iterator[Any]:
    """The chunks of a streamed reply."""
    with _open(url, path, {**body, "stream": True}, seconds) as reply:
        for line in reply:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)


def _open(url: str, path: str, body: dict[str, Any], seconds: float) -> Any:
    request = urllib.request.Request(
        url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    return urllib.request.urlopen(request, timeout=seconds)


def assert_alike(reference: Any, other: Any, where: str = "") -> None:
    """Same replies but for names and times; log-probabilities within TOLERANCE."""
    if isinstance(reference, dict):
        assert isinstance(other, dict), where
        assert reference.keys() == other.keys(), where
        for key in reference.keys() - PASSING:
            assert_alike(reference[key], other[key], f"{where}.{key}")
    elif isinstance(reference, list):
        assert isinstance(other, list), where
        assert len(reference) == len(other), (where, reference, other)
        for index, pair in enumerate(zip(reference, other, strict=True)):
            assert_alike(*pair, f"{where}[{index}]")
    elif isinstance(reference, float):
        assert abs(reference - other) <= TOLERANCE, (where, reference, other)
    else:
        assert reference == other, where
