# SPDX-License-Identifier: Apache-2.0
"""What moved in vLLM under our feet: compare every seam that we use with what was recorded.

    python scripts/check_vllm.py SOURCE...            compare
    python scripts/check_vllm.py SOURCE... --record   write down what is there now

A SOURCE is a wheel, a folder with ``vllm/`` in it (a checkout, an unpacked wheel, site-packages), or a
version such as 0.33.0: the installed vLLM if it is that version, else its wheel from where pip is
configured to look, of which the Python sources are kept in the user's cache folder.

vLLM is never imported: its sources are parsed. A seam is a name in vLLM that this project imports,
patches, overrides or reads; ``seams_in_use`` finds them in our own sources. Of each one
``scripts/vllm_seams.json`` holds, per vLLM version, the file that defines it, its signature and a
hash of its syntax tree without docstrings, so comments and formatting do not count. Names that our
subclasses add are seams too: vLLM must not come to use them.

Exit status 0: all that we need is there and as recorded for that version (for a version that was
never recorded: as recorded for the version that the plugin was run with). 1: something is not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.markup import escape

from vllm_hidden_transfer.patches import catalogue
from vllm_hidden_transfer.versions import (
    OVERRIDE_VARIABLE,
    TESTED_SERIES,
    UnsupportedVllmError,
    check_vllm_version,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RECORD = REPOSITORY / "scripts" / "vllm_seams.json"
OUR_SOURCES = (REPOSITORY / "vllm_hidden_transfer", REPOSITORY / "patches")
BASELINE = f"{TESTED_SERIES}.0"
"""The version that the plugin was run with."""

RELIED_ON = """
vllm.config.ModelConfig.dtype
vllm.config.SpeculativeConfig.method
vllm.v1.core.sched.scheduler.Scheduler.update_draft_token_ids
vllm.v1.core.sched.scheduler.Scheduler.update_from_output
vllm.v1.kv_cache_interface.KVCacheConfig.kv_cache_tensors
vllm.v1.kv_cache_interface.KVCacheTensor
vllm.v1.sample.logits_processor.LogitBiasLogitsProcessor.apply
vllm.v1.sample.logits_processor.LogitBiasLogitsProcessor.bias_tensor
vllm.v1.sample.logits_processor.LogitBiasLogitsProcessor.biases
vllm.v1.sample.logits_processor.LogitBiasLogitsProcessor.logits_slice
vllm.v1.sample.logits_processor.MinPLogitsProcessor.apply
vllm.v1.sample.logits_processor.MinPLogitsProcessor.min_p
vllm.v1.sample.logits_processor.MinPLogitsProcessor.min_p_count
vllm.v1.sample.logits_processor.MinTokensLogitsProcessor.apply
vllm.v1.sample.logits_processor.MinTokensLogitsProcessor.logits_slice
vllm.v1.sample.logits_processor.MinTokensLogitsProcessor.min_toks
vllm.v1.sample.logits_processor.MinTokensLogitsProcessor.restore_logits_slice
vllm.v1.sample.logits_processor.MinTokensLogitsProcessor.update_state
vllm.v1.request.Request.num_computed_tokens
vllm.v1.request.Request.num_output_placeholders
vllm.v1.request.Request.num_tokens
vllm.v1.request.Request.resumable
vllm.v1.request.Request.spec_token_ids
vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu
vllm.v1.spec_decode.metadata.SpecDecodeMetadata.num_draft_tokens
vllm.model_executor.layers.attention.attention.set_default_quant_scales
vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward
vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.kv_cache_dtype
vllm.v1.worker.block_table.BlockTable.block_size
vllm.v1.worker.block_table.BlockTable.block_table
vllm.v1.worker.block_table.BlockTable.num_blocks_per_row
vllm.v1.worker.block_table.MultiGroupBlockTable.__getitem__
vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model
vllm.v1.worker.cpu_worker.CPUWorker.load_model
vllm.v1.worker.gpu_input_batch.CachedRequestState.sampling_params
vllm.v1.worker.gpu_input_batch.InputBatch.generators
vllm.v1.worker.gpu_input_batch.InputBatch.make_lora_inputs
vllm.v1.worker.gpu_input_batch.InputBatch.update_async_output_token_ids
vllm.v1.worker.gpu_model_runner.GPUModelRunner.__init__
vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync
vllm.v1.worker.gpu_model_runner.GPUModelRunner._calc_spec_decode_metadata
vllm.v1.worker.gpu_model_runner.GPUModelRunner._input_fits_in_drafter
vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states
vllm.v1.worker.gpu_model_runner.GPUModelRunner.discard_request_mask
vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model
vllm.v1.worker.gpu_model_runner.GPUModelRunner.sample_tokens
vllm.v1.worker.utils.AttentionGroup.metadata_builders
"""
"""Seams that our sources do not name in a way that can be followed: what calls our overrides, what
is read through a subscript, and stock code that ours imitates."""

console = Console(highlight=False, soft_wrap=True)


class CheckError(Exception):
    """Why this cannot be checked, in one sentence."""


class FetchError(CheckError):
    """The sources of a version cannot be had here."""


# vLLM's sources, wherever they are.


class Sources:
    """The Python files of one vLLM, from a wheel or a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._names: set[str] = set()
        self._root = path
        self._trees: dict[str, ast.Module] = {}
        if not path.exists():
            raise CheckError(f"there is no {path}.")
        if path.is_dir():
            if path.name == "vllm" and not (path / "vllm").is_dir():
                self._root = path.parent
        else:
            try:
                self._archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError) as error:
                raise CheckError(
                    f"{path} is neither a folder nor a wheel that can be read ({error})."
                ) from error
            self._names = set(self._archive.namelist())
        if self.read("vllm/__init__.py") is None:
            raise CheckError(
                f"{path} holds no vllm/__init__.py: give a wheel, a checkout or a site-packages folder."
            )

    def _has(self, name: str) -> bool:
        if self._archive is not None:
            return name in self._names
        return (self._root / name).is_file()

    def read(self, name: str) -> str | None:
        """The text of a file, None where there is none."""
        if not self._has(name):
            return None
        try:
            if self._archive is not None:
                return self._archive.read(name).decode()
            return (self._root / name).read_text("utf-8")
        except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
            raise CheckError(f"{name} in {self.path} cannot be read ({error}).") from error

    def tree(self, name: str) -> ast.Module:
        """The syntax tree of a file that is there."""
        if name not in self._trees:
            try:
                self._trees[name] = ast.parse(self.read(name) or "")
            except SyntaxError as error:
                raise CheckError(f"{name} in {self.path} is no Python ({error}).") from error
        return self._trees[name]

    def module_file(self, module: str) -> str | None:
        """The file that holds a module of vLLM; None for what is not there or not vLLM's."""
        if module.split(".")[0] != "vllm":
            return None
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if self._has(name):
                return name
        return None

    def version(self) -> str | None:
        """The version by the package's own word, else by its distribution's."""
        written = re.search(
            r"^__version__ = .*?['\"]([^'\"]+)['\"]", self.read("vllm/_version.py") or "", re.M
        )
        if written:
            return written[1]
        pattern = re.compile(r"vllm(_cpu)?-[^/]+\.dist-info/METADATA")
        if self._archive is not None:
            names = sorted(filter(pattern.fullmatch, self._names))
        else:
            found = self._root.glob("vllm*.dist-info/METADATA")
            names = sorted(str(file.relative_to(self._root)) for file in found)
            names = [name for name in names if pattern.fullmatch(name)]
        for name in names:
            line = re.search(r"^Version: (\S+)$", self.read(name) or "", re.M)
            if line:
                return line[1]
        return None


# From a dotted name to its definition.


class Class(NamedTuple):
    """A class and the module that its names are to be looked up in."""

    module: str
    node: ast.ClassDef


@dataclass(frozen=True)
class Found:
    """Where a name is defined."""

    module: str
    file: str
    nodes: tuple[ast.AST, ...]
    """All definitions of the name there (an ``if`` may give it several); none for a module."""
    rest: tuple[str, ...] = ()
    """The end of the dotted name that cannot be followed without running vLLM."""


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under ``if``, ``try`` and ``with`` included."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _bound(statement: ast.AST) -> Iterator[str]:
    """The plain names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    for target in _targets(statement):
        if isinstance(target, ast.Name):
            yield target.id


def _bound_to_self(cls: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """The attributes that a class's methods give to ``self``, and where."""
    for node in ast.walk(cls):
        for target in map(_dotted, _targets(node)):
            if len(target) == 2 and target[0] == "self":
                yield target[1], node


def _targets(statement: ast.AST) -> Iterator[ast.expr]:
    if isinstance(statement, ast.AnnAssign):
        yield statement.target
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from target.elts if isinstance(target, ast.Tuple) else [target]


def _dotted(node: ast.AST | None) -> tuple[str, ...]:
    """``a.b.c`` as a tuple, empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return (*owner, node.attr) if owner else ()
    return ()


def _annotated_names(annotation: ast.expr | None) -> Iterator[tuple[str, ...]]:
    """The classes that ``X``, ``X | None``, ``Optional[X]`` and the like stand for."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return
    if isinstance(annotation, ast.BinOp):
        yield from _annotated_names(annotation.left)
        yield from _annotated_names(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        if _dotted(annotation.value)[-1:] == ("Optional",):
            yield from _annotated_names(annotation.slice)
    elif dotted := _dotted(annotation):
        yield dotted


class Resolver:
    """Follows dotted names through imports, classes and annotations, by reading only."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._known: dict[ast.AST, dict[str, list[ast.AST]]] = {}

    def find_dotted(self, name: str) -> Found | None:
        """The definition of a full name such as ``vllm.config.VllmConfig``, None where there is none."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            module = ".".join(parts[:end])
            if self._sources.module_file(module) is not None:
                return self.find(module, parts[end:])
        return None

    def _defined(self, owner: ast.Module | ast.ClassDef) -> Mapping[str, list[ast.AST]]:
        """All names that a module or a class defines."""
        if owner not in self._known:
            names: dict[str, list[ast.AST]] = {}
            for statement in _statements(owner.body):
                for name in _bound(statement):
                    names.setdefault(name, []).append(statement)
            if isinstance(owner, ast.ClassDef):
                for name, node in _bound_to_self(owner):
                    names.setdefault(name, []).append(node)
            self._known[owner] = names
        return self._known[owner]

    def find(
        self, module: str, parts: Sequence[str], _seen: frozenset[object] = frozenset()
    ) -> Found | None:
        """The definition of a dotted name below a module, None where there is none."""
        file = self._sources.module_file(module)
        here = (module, tuple(parts))
        if file is None or here in _seen:
            return None
        if not parts:
            return Found(module, file, ())
        seen = _seen | {here}
        head, rest = parts[0], tuple(parts[1:])
        tree = self._sources.tree(file)
        if nodes := self._defined(tree).get(head):
            return self._below(module, tuple(nodes), rest)
        for target in self._imports(module, file, _statements(tree.body), head):
            found = self.find(target[0], (*target[1], *rest), seen)
            if found is not None:
                return found
        return self.find(f"{module}.{head}", rest, seen)

    def _imports(
        self, module: str, file: str, statements: Iterable[ast.stmt], name: str
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """What a name that a module imports may stand for: a module, and a name in it."""
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        for statement in statements:
            if isinstance(statement, ast.ImportFrom):
                origin = statement.module or ""
                if statement.level:
                    parents = package.split(".")
                    parents = parents[: len(parents) - statement.level + 1]
                    origin = ".".join([*parents, *([origin] if origin else [])])
                for alias in statement.names:
                    if alias.name == "*":
                        yield origin, (name,)
                    elif (alias.asname or alias.name) == name:
                        yield origin, (alias.name,)
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    if (alias.asname or alias.name.split(".")[0]) == name:
                        yield (alias.name if alias.asname else name), ()

    def _found(self, module: str, nodes: tuple[ast.AST, ...], rest: tuple[str, ...] = ()) -> Found:
        file = self._sources.module_file(module)
        assert file is not None
        return Found(module, file, nodes, rest)

    def _below(
        self, module: str, nodes: tuple[ast.AST, ...], rest: tuple[str, ...]
    ) -> Found | None:
        """Go on below what ``nodes`` of a module define."""
        if not rest:
            return self._found(module, nodes)
        for node in nodes:
            cls = (
                Class(module, node) if isinstance(node, ast.ClassDef) else self._type(module, node)
            )
            if cls is not None:
                return self.member(cls, rest)
        return self._found(module, nodes, rest)

    def _type(self, module: str, node: ast.AST) -> Class | None:
        """vLLM's class of a variable, attribute or property, as far as its definition says."""
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.AnnAssign):
            names = list(_annotated_names(node.annotation))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [_dotted(node.value.func)]
        elif isinstance(node, ast.FunctionDef) and any(
            _dotted(decorator)[-1:] in {("property",), ("cached_property",)}
            for decorator in node.decorator_list
        ):
            names = list(_annotated_names(node.returns))
        for name in names:
            if name and (cls := self.as_class(self.find(module, name))) is not None:
                return cls
        return None

    def as_class(self, found: Found | None) -> Class | None:
        """The class that was found, if it is one."""
        if found is None or found.rest:
            return None
        classes = [node for node in found.nodes if isinstance(node, ast.ClassDef)]
        return Class(found.module, classes[-1]) if classes else None

    def member(self, cls: Class, parts: Sequence[str]) -> Found | None:
        """A name below a class: its own, an attribute that it gives to ``self``, or a base's."""
        head, rest = parts[0], tuple(parts[1:])
        nodes = tuple(self._defined(cls.node).get(head, ()))
        if nodes and rest and _is_enum(cls.node):
            below = self.member(cls, rest)
            return below and Found(below.module, below.file, nodes + below.nodes, below.rest)
        if nodes:
            return self._below(cls.module, nodes, rest)
        for base in cls.node.bases:
            name = _dotted(base.value if isinstance(base, ast.Subscript) else base)
            parent = self.as_class(self.find(cls.module, name)) if name else None
            if parent is not None and parent.node is not cls.node:
                found = self.member(parent, parts)
                if found is not None:
                    return found
        return None


def _is_enum(cls: ast.ClassDef) -> bool:
    return any(_dotted(base)[-1:] in {("Enum",), ("IntEnum",), ("StrEnum",)} for base in cls.bases)


# What is written down of a definition.


def canonical(node: object) -> str:
    """A syntax tree as text, without docstrings. The same for every Python that runs this, which
    ``ast.unparse`` and ``ast.dump`` are not."""
    if isinstance(node, list):
        return f"[{','.join(canonical(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (
        f"{name}={canonical(value)}"
        for name, value in ast.iter_fields(node)
        if name not in ("kind", "type_comment") and value is not None and value != []
    )
    if isinstance(node, ast.Constant):  # None is a value here
        return f"Constant({node.value!r})"
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def signature(node: ast.AST) -> str:
    """Decorators and parameters of a function, bases and ``__init__`` of a class, a variable's type."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        decorators = "".join(f"@{ast.unparse(one)} " for one in node.decorator_list)
        if isinstance(node, ast.ClassDef):
            inits = [one for one in _statements(node.body) if "__init__" in _bound(one)]
            above = ", ".join(ast.unparse(one) for one in [*node.bases, *node.keywords])
            return " ".join([f"{decorators}class ({above})", *map(signature, inits)])
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{decorators}{keyword} ({ast.unparse(node.args)}){returns}"
    return ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""


def hashed(node: ast.AST) -> str:
    """What is hashed: all of a definition, but of a class its fields and its abstract methods only
    (the methods that we use are seams of their own)."""
    if not isinstance(node, ast.ClassDef):
        return canonical(node)
    parts = [canonical(one) for one in _statements(node.body) if any(_targets(one))]
    for one in _statements(node.body):
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            told = signature(one)
            if "abstractmethod" in told:
                parts.append(f"{one.name} {told}")
    return "\n".join([signature(node), *parts])


@dataclass(frozen=True)
class Entry:
    """What is recorded of a seam."""

    file: str
    signature: str
    sha256: str
    unfollowed: str = ""
    """The end of its name that is known at run time only."""

    @classmethod
    def of(cls, found: Found) -> Entry:
        told = dict.fromkeys(filter(None, map(signature, found.nodes)))
        text = "\n".join(map(hashed, found.nodes))
        return cls(
            found.file,
            " | ".join(told),
            hashlib.sha256(text.encode()).hexdigest() if found.nodes else "",
            ".".join(found.rest),
        )


# The seams that we use.


@dataclass(frozen=True)
class Seam:
    """A name in vLLM that matters to us."""

    name: str
    """In full, for example ``vllm.config.VllmConfig``."""
    ours: bool = field(default=False, compare=False)
    """A subclass of ours defines it: an override where vLLM has it, else a name that vLLM must not take."""
    parameters: tuple[str, ...] = field(default=(), compare=False)
    """Parameters that it has to take."""


@dataclass
class _OurClass:
    bases: list[tuple[str, ...]]
    imports: Mapping[str, str]
    node: ast.ClassDef

    def defined(self) -> set[str]:
        names = {name for statement in _statements(self.node.body) for name in _bound(statement)}
        return names | {name for name, _ in _bound_to_self(self.node)}


def seams_in_use(roots: Sequence[Path] = OUR_SOURCES) -> list[Seam]:
    """Every seam of the sources below ``roots``, and of the catalogue of patches and ``RELIED_ON``."""
    seams: dict[str, Seam] = {}
    for seam in _seams_in(roots):
        known = seams.setdefault(seam.name, seam)
        if known.ours and not seam.ours:  # what we read has to be there
            seams[seam.name] = seam
    for name in RELIED_ON.split():
        seams[name] = Seam(name)
    patches = (*catalogue.AT_START, *catalogue.IN_WORKERS)
    patched = (one for patch in patches for one in patch.surfaces)
    for surface in (*patched, *catalogue.SUBCLASSED, *catalogue.SUBCLASSED_V2):
        name = f"{surface.module}.{surface.name}"
        seams[name] = Seam(name, parameters=surface.parameters)
    return [seams[name] for name in sorted(seams)]


def _seams_in(roots: Sequence[Path]) -> Iterator[Seam]:
    files = sorted({file.resolve() for root in roots for file in root.rglob("*.py")})
    classes: dict[str, _OurClass] = {}
    for file in files:
        tree = ast.parse(file.read_text())
        imports = dict(_vllm_imports(tree))
        yield from map(Seam, imports.values())
        yield from _chains(tree, imports)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _chains(node, _typed_parameters(node, imports))
            elif isinstance(node, ast.ClassDef):
                classes[node.name] = _OurClass([*map(_dotted, node.bases)], imports, node)
    inherited = {base[-1] for one in classes.values() for base in one.bases if base}
    for name in classes.keys() - inherited:
        yield from _seams_of_class(name, classes)


def _vllm_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that a file of ours imports from vLLM, wherever it does, and their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.asname or "vllm", alias.name if alias.asname else "vllm"


def _typed_parameters(
    function: ast.FunctionDef | ast.AsyncFunctionDef, imports: Mapping[str, str]
) -> dict[str, str]:
    """The parameters of a function that are objects of vLLM's classes."""
    arguments = function.args
    return {
        argument.arg: imports[name[0]]
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        for name in _annotated_names(argument.annotation)
        if name[0] in imports
    }


def _chains(tree: ast.AST, names: Mapping[str, str]) -> Iterator[Seam]:
    """``x.a.b`` for the names ``x`` that stand for something in vLLM."""
    for node in ast.walk(tree):
        dotted = _dotted(node) if isinstance(node, ast.Attribute) else ()
        if dotted and dotted[0] in names:
            yield Seam(".".join([names[dotted[0]], *_public(dotted[1:])]))


def _public(names: tuple[str, ...]) -> tuple[str, ...]:
    """Cut at the first name that every Python object has."""
    for place, name in enumerate(names):
        if hasattr(object, name) or name in ("__name__", "__module__", "__dict__"):
            return names[:place]
    return names


def _seams_of_class(name: str, classes: Mapping[str, _OurClass]) -> Iterator[Seam]:
    """What a class of ours overrides, adds and reads, against vLLM's classes above it: those that it
    names itself, else those that its bases name."""
    family: list[_OurClass] = []
    above: set[str] = set()
    generation = [classes[name]]
    while generation:
        family += generation
        bases = [(cls, base) for cls in generation for base in cls.bases if base]
        above = above or {cls.imports[base[0]] for cls, base in bases if base[0] in cls.imports}
        generation = [
            classes[base[-1]]
            for cls, base in bases
            if base[0] not in cls.imports and base[-1] in classes
        ]
    ours = set().union(*(cls.defined() for cls in family))
    for vllm_class in sorted(above):
        for own in sorted(ours):
            yield Seam(f"{vllm_class}.{own}", ours=True)
        for cls in family:
            for node in ast.walk(cls.node):
                dotted = _dotted(node) if isinstance(node, ast.Attribute) else ()
                read = _public(dotted[1:]) if dotted[:1] == ("self",) else ()
                if read and read[0] not in ours:
                    yield Seam(".".join([vllm_class, *read]))


# Comparing.


class Move(NamedTuple):
    """One thing that is not as it was."""

    kind: str
    seam: str
    detail: str = ""


KINDS = {
    "missing": "not there",
    "taken": "a name that our subclass adds and vLLM now has too (or an override not recorded yet)",
    "parameters": "does not take what we pass",
    "moved": "in another file",
    "signature": "other signature",
    "unfollowed": "followed differently",
    "body": "other body",
    "unrecorded": "not in the record: run again with --record",
}


def look_up(sources: Sources, seams: Iterable[Seam]) -> dict[str, Entry | None]:
    """What each seam is in these sources."""
    resolver = Resolver(sources)
    found = {seam.name: resolver.find_dotted(seam.name) for seam in seams}
    return {name: None if one is None else Entry.of(one) for name, one in found.items()}


def not_satisfied(seams: Iterable[Seam], now: Mapping[str, Entry | None]) -> list[Move]:
    """What we need and is not there, whatever any record says."""
    moves = []
    for seam in seams:
        entry = now[seam.name]
        if entry is None:
            if not seam.ours:
                moves.append(Move("missing", seam.name))
            continue
        absent = [
            name
            for name in seam.parameters
            if not re.search(rf"[(\s*]{name}[:=,)]", entry.signature)
        ]
        if absent:
            moves.append(Move("parameters", seam.name, f"no {', '.join(absent)}"))
    return moves


def compare(
    seams: Iterable[Seam],
    was: Mapping[str, Entry | None],
    now: Mapping[str, Entry | None],
) -> list[Move]:
    """What is not as it was."""
    moves = []
    for seam in seams:
        name = seam.name
        before, after = was.get(name), now.get(name)
        if before == after:
            if name not in was and not seam.ours:
                moves.append(Move("unrecorded", name))
        elif after is None:
            moves.append(Move("missing", name))
        elif before is None:
            kind = "taken" if seam.ours else "unrecorded"
            moves.append(Move(kind, name, f"in {after.file}"))
        else:
            if before.file != after.file:
                moves.append(Move("moved", name, f"{before.file} -> {after.file}"))
            if before.signature != after.signature:
                moves.append(
                    Move("signature", name, f"was {before.signature}\nis  {after.signature}")
                )
            elif before.sha256 != after.sha256:
                moves.append(Move("body", name))
            if before.unfollowed != after.unfollowed:
                moves.append(
                    Move("unfollowed", name, f"{before.unfollowed!r} -> {after.unfollowed!r}")
                )
    return moves


# The record.

Records = dict[str, dict[str, Entry | None]]


def load_records(path: Path) -> Records:
    """All recorded versions, none where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            version: {key: None if one is None else Entry(**one) for key, one in entries.items()}
            for version, entries in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckError(f"the record {path} cannot be read ({error}).") from error


def save_records(path: Path, records: Records) -> None:
    """One line a seam, so that a diff shows what moved."""
    blocks = []
    for version in sorted(records, key=Version):
        lines = []
        for key, entry in sorted(records[version].items()):
            told = None if entry is None else {k: v for k, v in vars(entry).items() if v}
            if told is not None:
                told = {"file": "", "signature": "", "sha256": "", **told}
            lines.append(f"  {json.dumps(key)}: {json.dumps(told)}")
        blocks.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    try:
        path.write_text("{\n " + ",\n ".join(blocks) + "\n}\n")
    except OSError as error:
        raise CheckError(f"the record {path} cannot be written ({error}).") from error


# Where sources come from.


def cache_folder() -> Path:
    """Where the sources of downloaded versions are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vllm-hidden-transfer" / "vllm-sources"


def public_version(version: str) -> str:
    """0.32.0 for 0.32.0+cpu.

    Raises:
        CheckError: where it is no version.
    """
    try:
        return Version(version).public
    except InvalidVersion as error:
        raise CheckError(f"{version!r} is no version.") from error


def installed_sources() -> Sources | None:
    """The vLLM of this Python, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Sources(Path(spec.origin).parents[1])


def sources_of_version(version: str) -> Sources:
    """A version's sources: installed, cached or downloaded, in this order.

    Raises:
        FetchError: where it cannot be had.
    """
    installed = installed_sources()
    if installed is not None and public_version(installed.version() or "0") == version:
        return installed
    cached = cache_folder() / f"vllm-{version}.zip"
    if not cached.exists():
        try:
            _download(version, cached)
        except OSError as error:
            raise FetchError(f"its sources cannot be kept in {cached.parent} ({error})") from error
    try:
        return Sources(cached)
    except CheckError as error:
        raise CheckError(f"{error} Remove it to have it downloaded again.") from error


def _download(version: str, target: Path) -> None:
    """pip's wheel of a version, as pip is configured; its Python files go to ``target``, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        console.print(f"downloading vllm=={version} (a wheel of some hundred MB) with pip ...")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, "--quiet", "--dest", scratch, f"vllm=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("vllm-*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            reason = errors[-1].removeprefix("ERROR: ") if errors else f"{len(wheels)} wheels"
            raise FetchError(f"pip has no wheel vllm=={version} here ({reason})")
        kept = Path(scratch) / target.name
        with zipfile.ZipFile(wheels[0]) as wheel, zipfile.ZipFile(kept, "w") as archive:
            for name in wheel.namelist():
                if re.fullmatch(r"vllm/.*\.py|vllm-[^/]+\.dist-info/METADATA", name):
                    archive.writestr(name, wheel.read(name), zipfile.ZIP_DEFLATED)
        kept.rename(target)


# The command.


def _print_moves(moves: Sequence[Move]) -> None:
    for kind, meaning in KINDS.items():
        of_kind = [move for move in moves if move.kind == kind]
        if of_kind:
            console.print(f"  [bold]{meaning}[/bold] ({len(of_kind)})")
        for move in of_kind:
            console.print(escape(f"    {move.seam}"))
            for line in move.detail.splitlines():
                console.print(escape(f"      {line}"))


def _print_against_baseline(
    version: str, seams: Sequence[Seam], records: Records, now: Mapping[str, Entry | None]
) -> None:
    if version == BASELINE or BASELINE not in records:
        return
    moves = compare(seams, records[BASELINE], now)
    console.print(f"vLLM {version} against {BASELINE}, with which the plugin was run:")
    _print_moves(moves)
    touched = {move.seam for move in moves}
    console.print(f"  as in {BASELINE}: {len(seams) - len(touched)} of {len(seams)} seams")


def _print_acceptance(version: str) -> None:
    try:
        check_vllm_version(version)
        console.print(f"vLLM {version}: the plugin starts with it.")
    except UnsupportedVllmError:
        console.print(
            f"vLLM {version}: the plugin refuses it, because it was not run with it; "
            f"{OVERRIDE_VARIABLE}=1 lets it try, under a banner that says so."
        )


def check(
    source: str,
    seams: Sequence[Seam],
    records: Records,
    *,
    record: bool = False,
    vllm_version: str | None = None,
) -> bool:
    """Compare one source with the record and say what moved; whether all is as it should be."""
    if Path(source).exists() or not re.fullmatch(r"\d+(\.\d+)+\S*", source):
        sources = Sources(Path(source))
        version = vllm_version or sources.version()
        if version is None:
            raise CheckError(f"{source} does not say which vLLM it is: say so with --vllm-version.")
        version = public_version(version)
    else:
        version = public_version(source)
        try:
            sources = sources_of_version(version)
        except FetchError as error:
            if record or version not in records:
                raise
            console.print(
                escape(f"vLLM {version} cannot be fetched here and was skipped: {error}.")
            )
            console.print("What follows compares the records alone.")
            _print_against_baseline(version, seams, records, records[version])
            _print_acceptance(version)
            return True
    now = look_up(sources, seams)
    absent = not_satisfied(seams, now)
    if record:
        added = {seam.name for seam in seams if seam.ours}
        records[version] = {
            name: entry for name, entry in now.items() if entry or name not in added
        }
        console.print(f"vLLM {version}: {len(records[version])} seams recorded")
        _print_moves(absent)
        return not absent
    if not records:
        raise CheckError("nothing is recorded yet: run this with --record on the tested vLLM.")
    known = version if version in records else BASELINE
    if known not in records:
        raise CheckError(f"neither vLLM {version} nor {BASELINE} is recorded: run with --record.")
    moves = compare(seams, records[known], now)
    named = {move.seam for move in moves if move.kind == "missing"}
    moves += [move for move in absent if move.seam not in named]
    if known == version:
        state = "as recorded" if not moves else "not as recorded"
        console.print(f"vLLM {version} ({len(seams)} seams): {state}")
    else:
        console.print(f"vLLM {version} was never recorded, so {known}'s record is what counts:")
    _print_moves(moves)
    if known == version:
        _print_against_baseline(version, seams, records, now)
    _print_acceptance(version)
    return not moves


def main(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A wheel, a folder with vllm/ in it, or a version (installed, cached or downloaded).",
        ),
    ],
    record: Annotated[
        bool, typer.Option("--record", help="Write down what is there instead of comparing.")
    ] = False,
    vllm_version: Annotated[
        str | None, typer.Option(help="The version of a source that does not say it itself.")
    ] = None,
    record_file: Annotated[Path, typer.Option(help="The record.")] = RECORD,
) -> None:
    """Compare every seam of vLLM that we use with what was recorded, and say what moved."""
    try:
        if vllm_version is not None and len(sources) > 1:
            raise CheckError("--vllm-version is for one source, and there are several.")
        records = load_records(record_file)
        seams = seams_in_use()
        good = True
        for source in sources:
            good &= check(source, seams, records, record=record, vllm_version=vllm_version)
        if record:
            save_records(record_file, records)
    except CheckError as error:
        typer.echo(f"check_vllm: {str(error).rstrip('.')}.", err=True)
        raise typer.Exit(2) from error
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
