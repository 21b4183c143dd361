# SPDX-License-Identifier: Apache-2.0
"""Random steps for the kernels, and what plain arithmetic says of them. Each is drawn from a number.

The same number is the same case under Triton's interpreter, on tensors of the CPU, and on a GPU. Every cell of a cache
that a kernel has no business with is NaN, which shows in whatever is computed from it, even with a weight of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_hidden_transfer.engine.attention.kernels.ancestors import num_words, write_ancestors
from vllm_hidden_transfer.engine.attention.kernels.compaction import compact_paths
from vllm_hidden_transfer.engine.attention.kernels.exact_rows import exact_rows, paths
from vllm_hidden_transfer.engine.attention.kernels.tree_attention import Parts, tree_attention

FP8 = torch.float8_e4m3fn
BOUNDS = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
"""Relative errors of the worst row and head: of rounding weights and results, and in fp32 of sums in another order."""
HEADS = ((4, 4), (8, 2), (8, 1), (6, 2), (7, 1))
SPARE_SLOTS = 3
UNTOUCHED = -77
"""What words and depths hold before they are written."""


def random_parents(rng: np.random.Generator, nodes: int) -> list[int]:
    """Parents of a tree, -1 for a child of the root; three in ten nodes hang off the one before them."""
    return [int(rng.integers(-1, i)) if rng.random() < 0.7 else i - 1 for i in range(nodes)]


def ancestors_of(parents: Sequence[int]) -> list[list[int]]:
    """The rows from the root to each row, itself last; node i is row i + 1."""
    found = [[0]]
    for node, parent in enumerate(parents):
        found.append([*found[parent + 1], node + 1])
    return found


@dataclass(frozen=True)
class Request:
    """What one request brings to a step."""

    context: int
    """Positions before its root."""
    num_rows: int
    parents: tuple[int, ...]
    """Of the nodes that its slot keeps, which may be more than its rows."""
    has_drafts: bool = False
    captured: bool = False
    """vLLM says that it is one token long, as it does while it captures a graph."""

    @classmethod
    def draw(cls, rng: np.random.Generator, nodes: int, page_size: int) -> Request:
        edges = (0, 1, page_size - 1, page_size, page_size + 1, int(rng.integers(2, 150)))
        context = int(rng.choice(edges))
        parents = tuple(random_parents(rng, nodes))
        kind = rng.choice(["tree", "tree", "part", "chunk", "token", "padding", "captured"])
        if kind in ("tree", "captured"):
            captured = bool(kind == "captured")
            return cls(0 if captured else context, nodes + 1, parents, True, captured)
        if kind == "part":
            num_rows = int(rng.integers(2, nodes + 2))
            return cls(context, num_rows, parents, has_drafts=True)
        if kind == "chunk":
            return cls(context, int(rng.integers(1, 2 * nodes + 11)), parents)
        return cls(context, 1, parents) if kind == "token" else cls(0, 0, parents)

    @property
    def seq_len(self) -> int:
        return 1 if self.captured else self.context + self.num_rows

    @property
    def num_drafts(self) -> int:
        return self.num_rows - 1 if self.has_drafts else 0

    @property
    def ancestors(self) -> list[list[int]]:
        """The rows that each row sees."""
        nodes = max(self.num_rows - 1, 0)
        chain = range(-1, nodes - 1)
        return ancestors_of(self.parents[:nodes] if self.has_drafts else chain)[: self.num_rows]

    def seen(self, window: int) -> torch.Tensor:
        """bool [rows, context + rows], whether a row sees a place of the cache."""
        ancestors = self.ancestors
        own = torch.zeros(self.num_rows, self.num_rows, dtype=torch.bool)
        for row, rows in enumerate(ancestors):
            own[row, rows] = True
        seen = torch.cat([torch.ones(self.num_rows, self.context, dtype=torch.bool), own], 1)
        depths = torch.tensor([len(rows) - 1 for rows in ancestors], dtype=torch.int64)
        positions = torch.cat([torch.arange(self.context), self.context + depths])
        near = positions[self.context :, None] - positions < window
        return seen & near if window else seen


@dataclass(frozen=True)
class Case:
    """A step of some requests, all but its numbers."""

    seed: int
    nodes: int
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    dtype: torch.dtype
    requests: tuple[Request, ...]
    window: int = 0
    softcap: float = 0.0
    is_fp8: bool = False
    heads_first: bool = False
    """A page's slots lie together by heads (HND), not by places (NHD)."""
    has_sinks: bool = False
    is_dense: bool = False
    """The step's rows are read from the pass, and the cache does not have them."""
    splits: int = 1
    tile: int | None = None

    @classmethod
    def draw(cls, seed: int) -> Case:
        rng = np.random.default_rng(seed)
        nodes = int(rng.choice([1, 3, 8, 15, 16, 31, 33, 63, 64, 100]))
        heads, kv_heads = HEADS[rng.integers(len(HEADS))]
        page_size = int(rng.choice([16, 32, 48, 128]))
        is_fp8 = bool(rng.random() < 0.2)
        return cls(
            seed,
            nodes,
            heads,
            kv_heads,
            head_size=int(rng.choice([32, 64, 80, 96])),
            page_size=page_size,
            dtype=list(BOUNDS)[rng.integers(len(BOUNDS))],
            requests=tuple(Request.draw(rng, nodes, page_size) for _ in range(rng.integers(1, 4))),
            window=int(rng.choice([0, 0, 1, 3, 20])),
            softcap=float(rng.choice([0, 0, 5.0])),
            is_fp8=is_fp8,
            heads_first=bool(rng.random() < 0.5),
            has_sinks=bool(rng.random() < 0.3),
            is_dense=bool(rng.random() < 0.3) and not is_fp8,
            splits=int(rng.choice([1, 1, 2, 4, 8])),
            tile=[None, 16, 32, 64][rng.integers(4)],
        )

    @property
    def starts(self) -> list[int]:
        return [0, *np.cumsum([request.num_rows for request in self.requests]).tolist()]

    @property
    def cache_dtype(self) -> torch.dtype:
        return FP8 if self.is_fp8 else self.dtype


@dataclass(frozen=True)
class Step:
    """A case's numbers, on the CPU."""

    case: Case
    q: torch.Tensor
    """[rows, heads, head size], some rows more than the requests have."""
    keys: list[torch.Tensor]
    """[context + rows, KV heads, head size] of each request, as the cache keeps them."""
    values: list[torch.Tensor]
    sinks: torch.Tensor | None
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    cache: torch.Tensor
    """[pages, KV heads, page size, 2 * head size]."""
    table: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, case: Case) -> Step:
        rng, random = np.random.default_rng(case.seed), torch.Generator().manual_seed(case.seed)

        def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        keys, values = (
            [
                normal(
                    *(request.context + request.num_rows, case.kv_heads, case.head_size),
                    dtype=case.cache_dtype,
                )
                for request in case.requests
            ]
            for _ in range(2)
        )
        num_rows = case.starts[-1] + int(rng.integers(0, 3))
        factors = (0.7, 1.3) if case.is_fp8 else (1.0, 1.0)
        cache, table = paged(case, rng, keys, values)
        return cls(
            case,
            normal(num_rows, case.heads, case.head_size, dtype=case.dtype),
            keys,
            values,
            normal(case.heads, dtype=case.dtype) if case.has_sinks else None,
            torch.tensor([factors[0]]),
            torch.tensor([factors[1]]),
            cache,
            table,
            own_rows(case, num_rows, keys, values) if case.is_dense else None,
        )

    def run(self, device: str) -> torch.Tensor:
        """What the kernel makes of it, [rows, heads, head size]; NaN where it wrote nothing."""
        case = self.case
        words, depths = write_words(case.requests, case.nodes, case.seed, device)
        k_cache, v_cache = self.cache.to(device).transpose(1, 2).split(case.head_size, -1)
        q = self.q.to(device)
        out = torch.full_like(q, torch.nan)
        parts = None
        if case.splits > 1:
            parts = Parts.empty(len(q), case.heads, case.splits, case.head_size, q.device)
            for part in (parts.values, parts.tops, parts.totals):
                part.fill_(torch.nan)
        tree_attention(
            q,
            k_cache,
            v_cache,
            out,
            self.table.to(device),
            torch.tensor([r.seq_len for r in case.requests], dtype=torch.int32, device=device),
            torch.tensor(case.starts, dtype=torch.int32, device=device),
            words,
            depths,
            max_rows=max(1, *(request.num_rows for request in case.requests)),
            scale=case.head_size**-0.5,
            splits=case.splits,
            parts=parts,
            window=case.window,
            softcap=case.softcap,
            k_scale=self.k_scale.to(device),
            v_scale=self.v_scale.to(device),
            sinks=None if self.sinks is None else self.sinks.to(device),
            own=None if self.own is None else (self.own[0].to(device), self.own[1].to(device)),
            tile=case.tile,
        )
        return out.cpu()

    def reference(self) -> torch.Tensor:
        """fp64, [rows of all requests, heads, head size]."""
        case, starts = self.case, self.case.starts
        group = case.heads // case.kv_heads
        outputs = []
        for request, start, keys, values in zip(
            case.requests, starts[:-1], self.keys, self.values, strict=True
        ):
            q = self.q[start : start + request.num_rows].double()
            wide_keys = (keys.float().double() * self.k_scale).repeat_interleave(group, 1)
            wide_values = (values.float().double() * self.v_scale).repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q, wide_keys) * case.head_size**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~request.seen(case.window), -torch.inf)
            if self.sinks is not None:
                sinks = self.sinks.double()[:, None, None].expand(-1, request.num_rows, 1)
                scores = torch.cat([scores, sinks], 2)
            weights = scores.softmax(2)[:, :, : len(keys)]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, wide_values))
        return torch.cat(outputs)


def paged(
    case: Case,
    rng: np.random.Generator,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [pages, KV heads, page size, 2 * head size] with only what may be read in it, and its block table."""
    size = case.page_size
    counts = [-(-len(one) // size) for one in keys]
    order = rng.permutation(sum(counts) + 2)
    # Where a request has no page, the table names one of NaN.
    table = torch.full((len(counts), max(counts) + 1), int(order[-1]), dtype=torch.int32)
    shape = (len(order), case.kv_heads, size, 2 * case.head_size)
    if case.heads_first:
        cache = torch.full(shape, torch.nan)
    else:
        cache = torch.full((shape[0], size, case.kv_heads, shape[3]), torch.nan).transpose(1, 2)
    taken = 0
    for index, (request, count) in enumerate(zip(case.requests, counts, strict=True)):
        pages = order[taken : taken + count]
        taken += count
        table[index, :count] = torch.from_numpy(pages)
        lowest = max(request.context - case.window + 1, 0) if case.window else 0
        highest = request.context + (0 if case.is_dense else request.num_rows)
        places = torch.arange(lowest, max(highest, lowest))
        both = torch.cat([keys[index].float(), values[index].float()], -1)
        cache[table[index].long()[places // size], :, places % size] = both[places]
    return cache.to(case.cache_dtype), table


def own_rows(
    case: Case, num_rows: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's keys and values side by side, as a pass has them, NaN behind the last request's."""
    shape = (num_rows, case.kv_heads, 2 * case.head_size)
    both = torch.full(shape, torch.nan, dtype=case.dtype)
    for request, start, k, v in zip(case.requests, case.starts[:-1], keys, values, strict=True):
        fresh = torch.cat([k, v], -1)[request.context :]
        both[start : start + request.num_rows] = fresh
    own_keys, own_values = both.split(case.head_size, -1)
    return own_keys, own_values


def write_words(
    requests: Sequence[Request], nodes: int, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and depths of the requests' rows, from slots in any order among others; two places more than requests."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(len(requests) + SPARE_SLOTS)[: len(requests)]
    parents = np.array(
        [random_parents(rng, nodes) for _ in range(len(requests) + SPARE_SLOTS)], dtype=np.int64
    ).reshape(-1, nodes)
    for slot, request in zip(slots, requests, strict=True):
        parents[slot] = request.parents
    places = (len(requests) + 2, nodes + 1)
    words = torch.full((*places, num_words(nodes + 1)), UNTOUCHED, dtype=torch.int32, device=device)
    depths = torch.full(places, UNTOUCHED, dtype=torch.int32, device=device)
    slots_dtype = torch.int32 if seed % 2 else torch.int64
    write_ancestors(
        words,
        depths,
        torch.from_numpy(parents).to(device),
        torch.from_numpy(slots).to(device, slots_dtype),
        torch.tensor([r.num_drafts for r in requests], dtype=torch.int32, device=device),
    )
    return words, depths


def attention_error(case: Case, device: str) -> float:
    """The relative error of the worst row and head.

    Raises:
        AssertionError: where it is too large, something is NaN, or a row of no request was written.
    """
    step = Step.of(case)
    out, reference = step.run(device), step.reference()
    assert bool(out[len(reference) :].isnan().all()), f"rows of no request were written: {case}"
    out = out[: len(reference)].double()
    errors = (out - reference).norm(dim=-1) / reference.norm(dim=-1)
    error = float(errors.nan_to_num(nan=torch.inf).max()) if errors.numel() else 0.0
    assert error < BOUNDS[case.dtype], f"relative error {error:.1e}: {case}"
    return error


def attention_errors(seeds: Iterable[int], device: str) -> dict[str, float]:
    """The worst relative error of random cases for each dtype; raises as ``attention_error`` does."""
    worst: dict[str, float] = {}
    for seed in seeds:
        case = Case.draw(seed)
        name = str(case.dtype).removeprefix("torch.")
        worst[name] = max(worst.get(name, 0.0), attention_error(case, device))
    return worst


@dataclass(frozen=True)
class Moves:
    """Accepted paths of a step in caches of some layers, on the CPU."""

    caches: list[torch.Tensor]
    """[pages, KV heads, page size, width] of each layer."""
    step_slots: torch.Tensor
    roots: torch.Tensor
    path_rows: torch.Tensor
    num_accepted: torch.Tensor

    @classmethod
    def draw(cls, seed: int) -> Moves:
        rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        nodes, num_requests = int(rng.choice([1, 4, 15, 31])), int(rng.integers(1, 5))
        kv_heads, page_size = int(rng.integers(1, 4)), int(rng.choice([16, 48]))
        width = int(rng.choice([32, 96, 160]))
        # Rows of prompts stand between those of trees.
        roots = np.cumsum(rng.integers(nodes + 1, nodes + 9, num_requests)) - nodes - 1
        num_rows = int(roots[-1]) + nodes + 1
        pages = -(-num_rows // page_size) + 1
        shape = (pages, kv_heads, page_size, width)
        dtype = [torch.float32, torch.bfloat16, torch.float16][rng.integers(3)]
        caches = [torch.randn(shape, generator=random).to(dtype) for _ in range(rng.integers(1, 4))]
        if rng.random() < 0.5:
            caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
        path_rows = np.zeros((num_requests, nodes + 1), dtype=np.int64)
        num_accepted = np.zeros(num_requests, dtype=np.int64)
        for request in range(num_requests):
            path = ancestors_of(random_parents(rng, nodes))[rng.integers(nodes + 1)]
            path_rows[request, : len(path)] = path
            num_accepted[request] = len(path) - 1
            if rng.random() < 0.3:  # what stands behind the path must not count
                num_accepted[request] //= 2
        return cls(
            caches,
            torch.from_numpy(rng.permutation(pages * page_size)[:num_rows]),
            *(torch.from_numpy(part) for part in (roots, path_rows, num_accepted)),
        )

    def check(self, device: str) -> int:
        """How many rows have moved; raises AssertionError where a cell is not what it should be."""
        caches = [cache.to(device, copy=True) for cache in self.caches]
        compact_paths(
            torch.tensor([cache.data_ptr() for cache in caches], device=device),
            caches[0],
            *(
                part.to(device)
                for part in (self.step_slots, self.roots, self.path_rows, self.num_accepted)
            ),
        )
        moved = 0
        size = self.caches[0].shape[2]
        for before, after in zip(self.caches, caches, strict=True):
            expected = before.clone()
            for root, path, accepted in zip(
                self.roots.tolist(),
                self.path_rows.tolist(),
                self.num_accepted.tolist(),
                strict=True,
            ):
                for depth in range(1, accepted + 1):
                    source = int(self.step_slots[root + path[depth]])
                    target = int(self.step_slots[root + depth])
                    expected[target // size, :, target % size] = before[
                        source // size, :, source % size
                    ]
                    moved += source != target
            assert torch.equal(after.cpu(), expected)
        return moved


def compacted(seeds: Iterable[int], device: str) -> int:
    """Rows that random paths have moved; raises as ``Moves.check`` does."""
    return sum(Moves.draw(seed).check(device) for seed in seeds)


def check_ancestors(nodes: Iterable[int], device: str) -> None:
    """Words and depths of random trees are those of sets of ancestors, and nothing else is written.

    Raises:
        AssertionError: where they are not.
    """
    for seed, size in enumerate(nodes):
        rng = np.random.default_rng(seed)
        requests = [
            Request(0, size + 1, tuple(random_parents(rng, size)), has_drafts=index > 0)
            for index in range(3)
        ]
        words, depths = (part.cpu() for part in write_words(requests, size, seed, device))
        assert bool((words[len(requests) :] == UNTOUCHED).all()), "words of no request"
        assert bool((depths[len(requests) :] == UNTOUCHED).all()), "depths of no request"
        bits = words[..., None] >> torch.arange(32, dtype=torch.int32) & 1
        for request, own, depth in zip(requests, bits.flatten(2), depths, strict=False):
            expected = request.ancestors
            found = [row.nonzero().flatten().tolist() for row in own]
            assert found == expected, (size, request)
            assert depth.tolist() == [len(rows) - 1 for rows in expected], (size, request)


def check_empty_slot(device: str) -> None:
    """A slot that nothing was written to says that nodes are their own parents, or worse: the kernel ends."""
    for parent in (0, 5, 1000, -9):
        parents = torch.full((1, 8), parent, dtype=torch.int64, device=device)
        words = torch.zeros(1, 9, 1, dtype=torch.int32, device=device)
        none = torch.zeros(1, dtype=torch.int64, device=device)
        write_ancestors(words, words[..., 0].clone(), parents, none, none.int() + 8)
        assert bool((words & 1).all()), "a row that is not the root's descendant"


@dataclass(frozen=True)
class ExactRows:
    """Which rows of trees have the bits that vLLM's own kernel gives them on the chain of their ancestors."""

    exact: list[bool]
    """With the kernel of exact rows."""
    masked: list[bool]
    """With the kernel of tree attention, for comparison."""


def exact_rows_of(seed: int, dtype: torch.dtype, device: str) -> ExactRows:
    """Compare the rows of two random requests, of which the first has a tree."""
    rng = np.random.default_rng(seed)
    requests = tuple(
        Request(
            int(rng.integers(0, 90)),
            9,
            tuple(random_parents(rng, 8)),
            has_drafts=bool(index == 0 or rng.random() < 0.5),
        )
        for index in range(2)
    )
    case = Case(seed, 8, 8, 2, 64, 16, dtype, requests)
    step = Step.of(case)
    q = step.q[: case.starts[-1]].to(device)
    k_cache, v_cache = step.cache.to(device).transpose(1, 2).split(case.head_size, -1)
    table = step.table.to(device)
    seq_lens = torch.tensor([r.seq_len for r in requests], dtype=torch.int32, device=device)
    starts = torch.tensor(case.starts, dtype=torch.int32, device=device)
    words, depths = write_words(requests, case.nodes, seed, device)
    parents = torch.tensor([request.parents for request in requests], device=device)
    has_drafts = torch.tensor([request.has_drafts for request in requests], device=device)
    path = paths(parents, depths[: len(requests)], has_drafts)
    exact, masked = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    scale = case.head_size**-0.5
    exact_rows(q, k_cache, v_cache, exact, table, seq_lens, starts, path, depths, scale)
    tree_attention(
        q,
        k_cache,
        v_cache,
        masked,
        table,
        seq_lens,
        starts,
        words,
        depths,
        max_rows=case.nodes + 1,
        scale=scale,
        tile=32,
    )
    stock = torch.cat(
        [
            one_by_one(step, index, row, ancestors, device)
            for index, request in enumerate(requests)
            for row, ancestors in enumerate(request.ancestors)
        ]
    )
    return ExactRows(*((stock == other).flatten(1).all(1).tolist() for other in (exact, masked)))


def one_by_one(step: Step, index: int, row: int, ancestors: list[int], device: str) -> torch.Tensor:
    """What vLLM's Triton kernel makes of a row, [1, heads, head size], in the cache that decoding one by one leaves."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    case, request = step.case, step.case.requests[index]
    table = step.table[index].long()
    cache = step.cache.transpose(1, 2).clone()
    source = request.context + torch.tensor(ancestors)
    target = request.context + torch.arange(len(ancestors))
    size = case.page_size
    cache[table[target // size], target % size] = step.cache.transpose(1, 2)[
        table[source // size], source % size
    ]
    k_cache, v_cache = cache.to(device).split(case.head_size, -1)
    at = case.starts[index] + row
    q = step.q[at : at + 1].to(device)
    out = torch.full_like(q, torch.nan)
    length = request.context + len(ancestors)
    unified_attention(
        q=q,
        k=k_cache,
        v=v_cache,
        out=out,
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
        max_seqlen_q=1,
        seqused_k=torch.tensor([length], dtype=torch.int32, device=device),
        max_seqlen_k=length,
        softmax_scale=case.head_size**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=step.table[index : index + 1].to(device),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    return out
