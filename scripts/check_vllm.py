# SPDX-License-Identifier: Apache-2.0
"""What moved in vLLM under our feet: compare every seam that we use with what was recorded.

    python scripts/check_vllm.py SOURCE...            compare
    python scripts/check_vllm.py SOURCE... --record   write down what is there now

A SOURCE is a folder with ``vllm/`` in it (a checkout, an unpacked wheel, site-packages) or a version
such as 0.33.0: the installed vLLM if it is that one, else its wheel from where pip is configured to look,
of which the Python sources are kept in the user's cache folder. griffe reads them; none is imported.

A seam is a name in vLLM that we import, override, patch or read. Imports, overrides and ``self.name`` are
found in our own sources, patches in the catalogue; ``relied_on`` in ``vllm_seams.json`` lists the others.
Per version the same file says of each seam ``file: signature #hash``; the hash is of its code without
comments and docstrings, as Python 3.11 writes it. Names that our subclasses add are seams too: vLLM must
not come to use them.

Exit status 0: all is as recorded for that version (for one that was never recorded: as for the version
that the plugin was run with). 1: something is not. 2: it cannot be checked.
"""

import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import griffe
import typer

from vllm_hidden_transfer import versions
from vllm_hidden_transfer.patches import catalogue

OURS = Path(__file__).resolve().parents[1] / "vllm_hidden_transfer"
RECORD = Path(__file__).with_name("vllm_seams.json")
BASELINE = f"{versions.TESTED_SERIES}.0"
"""The version that the plugin was run with."""
PATCHES = (*catalogue.AT_START, *catalogue.IN_WORKERS)
SURFACES = {
    f"{one.module}.{one.name}": one.parameters
    for surfaces in (*(patch.surfaces for patch in PATCHES), catalogue.SUBCLASSED)
    for one in (*surfaces, *catalogue.SUBCLASSED_V2, *catalogue.SUBCLASSED_GPU)
}
"""What patches and overrides build on, with the parameters that each has to take."""
ROOMS = re.compile(
    r"(config|distributed\.parallel_state|engine|inputs|v1\.(core|sample|spec_decode|worker))(\.|$)"
)
"""What is read of vLLM besides the modules that a seam names: all of it takes a minute."""
KINDS = {
    "missing": "not there",
    "taken": "a name that our subclass adds and vLLM now has too (or an override not recorded yet)",
    "parameters": "does not take what we pass",
    "moved": "in another file",
    "signature": "other signature",
    "body": "other body",
    "unrecorded": "not in the record: run again with --record",
}


class CheckError(Exception):
    """Why this cannot be checked, in one sentence."""


class Entry(NamedTuple):
    """What is recorded of a seam."""

    file: str
    signature: str = ""
    hash: str = ""
    parameters: tuple[str, ...] = ()
    """Not recorded."""

    def __str__(self) -> str:
        return f"{self.file}: {self.signature} #{self.hash}"

    @classmethod
    def read(cls, line: str) -> "Entry":
        file, _, rest = line.partition(": ")
        signature, _, code = rest.rpartition(" #")
        return cls(file, signature, code)


class Move(NamedTuple):
    """One thing that is not as it was."""

    kind: str
    seam: str
    detail: str = ""


class Finder(griffe.ModuleFinder):
    """Passes over the modules of vLLM that no seam leads to."""

    named: Container[str] = ()

    def submodules(self, module: griffe.Module) -> list[tuple[tuple[str, ...], Path]]:
        found = [(".".join(one[0]), one) for one in super().submodules(module)]
        if module.name != "vllm":
            return [one for _, one in found]
        return [
            one
            for name, one in found
            if one[1].name == "__init__.py" or name in self.named or ROOMS.match(name)
        ]


class Sources:
    """One vLLM, and a package of ours over it, as griffe reads them."""

    def __init__(self, folder: Path, relied_on: Iterable[str], ours: Path = OURS) -> None:
        if not (folder / "vllm" / "__init__.py").is_file():
            raise CheckError(
                f"{folder} holds no vllm/__init__.py: give a checkout or site-packages"
            )
        self.folder = folder.resolve()
        loader = griffe.GriffeLoader(allow_inspection=False)
        loader.finder = finder = Finder(search_paths=[ours.parent, self.folder])
        self._all = loader.modules_collection
        try:
            self._ours = list(below(loader.load(ours.name, try_relative_path=False)))
            self._named = {*imports(self._ours), *relied_on, *SURFACES}
            parts = [name.split(".")[1:] for name in self._named]
            finder.named = {".".join(each[:end]) for each in parts for end in range(len(each) + 1)}
            loader.load("vllm", try_relative_path=False)
        except (griffe.LoadingError, ModuleNotFoundError) as error:
            raise CheckError(f"{folder} cannot be read ({error})") from error

    def seams(self) -> dict[str, bool]:
        """All seams by name, and whether a class of ours defines it (vLLM may lack it then)."""
        classes = [one for one in self._ours if one.is_class]
        inherited = {base.path for one in classes for base in one.mro()}
        set_by_us: set[str] = set()
        needed = {*self._named}
        for one in classes:
            above = [base.path for base in one.mro() if base.path.startswith("vllm.")]
            if not above or one.path in inherited:
                continue
            family = [base for base in (one, *one.mro()) if not base.path.startswith("vllm.")]
            own = {name for each in family for name in {*each.members, *of_self(each, ast.Store)}}
            read = {name for each in family for name in of_self(each, ast.Load)} - own
            needed |= {f"{above[0]}.{name}" for name in read - {*dir(object)}}
            set_by_us |= {f"{above[0]}.{name}" for name in own}
        return {name: name not in needed for name in needed | set_by_us}

    def find(self, name: str) -> Entry | None:
        """What a seam is, None where there is no such name."""
        try:
            found = self._all[name]
            found = found.final_target if found.is_alias else found
        except griffe.AliasResolutionError as error:  # of another package, or made at build time
            return Entry("", error.alias.target_path)
        except KeyError:
            return self._find_at_run_time(*name.rsplit(".", 1))
        if found.is_module:
            return Entry(self._file(found))
        code = hashlib.sha256(code_of(found).encode()).hexdigest()[:16]
        if not (found.is_function or found.is_class):
            return Entry(self._file(found), str(found.annotation or ""), code)
        parameters = tuple(one.name for one in found.parameters)
        told = [*(f"@{one.value}" for one in found.decorators), found.signature(return_type=True)]
        if found.is_class:
            told.insert(-1, f"class ({', '.join(map(str, found.bases))})")
        return Entry(self._file(found), " ".join(told), code, parameters)

    def _find_at_run_time(self, owner: str, name: str) -> Entry | None:
        """What griffe does not see: attributes that only a method other than ``__init__`` sets, and
        attributes of what is no class, which are as good as their owner."""
        try:
            above = self._all[owner]
        except (KeyError, griffe.AliasResolutionError):
            return None
        if above.is_function or above.is_attribute:
            return self.find(owner)
        for base in (above, *above.mro()) if above.is_class else ():
            if name in of_self(base, ast.Store):
                return Entry(self._file(base))
        return None

    def _file(self, found: Any) -> str:
        return str(Path(found.filepath).relative_to(self.folder))


def below(module: Any) -> Iterator[Any]:
    """The modules and classes of a package, itself first."""
    yield module
    for member in module.members.values():
        if not member.is_alias and (member.is_module or member.is_class):
            yield from below(member)


def imports(objects: Iterable[Any]) -> Iterator[str]:
    """The names that files of ours import from vLLM, in functions too."""
    for file in {Path(one.filepath) for one in objects}:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def of_self(cls: Any, use: type[ast.expr_context]) -> set[str]:
    """The attributes of ``self`` that a class sets (``ast.Store``) or reads (``ast.Load``)."""
    return {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(cls.source)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, use)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def code_of(found: Any) -> str:
    """A definition without docstrings; of a class its fields and its abstract methods' parameters only,
    because the methods that we use are seams of their own."""
    tree = ast.parse(textwrap.dedent(found.source))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                one
                for one in node.body
                if not isinstance(one, ast.Expr) or not isinstance(one.value, ast.Constant)
            ]
    if not found.is_class:
        return ast.unparse(tree)
    (cls,) = tree.body
    assert isinstance(cls, ast.ClassDef)
    fields = [one for one in cls.body if isinstance(one, ast.Assign | ast.AnnAssign)]
    duties = [
        f"{name} {function.signature(return_type=True)}"
        for name, function in found.functions.items()
        if any("abstractmethod" in str(one.value) for one in function.decorators)
    ]
    return "\n".join([*map(ast.unparse, fields), *duties])


def look_up(sources: Sources, was: Mapping[str, str]) -> tuple[dict[str, str], list[Move]]:
    """Every seam that is there, and what is not as we need it or as it was recorded."""
    now: dict[str, str] = {}
    moves = []
    for name, ours in sorted(sources.seams().items()):
        entry = sources.find(name)
        if entry is None:
            if name in was or not ours:
                moves.append(Move("missing", name))
            continue
        now[name] = str(entry)
        if lost := sorted({*SURFACES.get(name, ())} - {*entry.parameters}):
            moves.append(Move("parameters", name, f"no {', '.join(lost)}"))
        if name not in was:
            moves.append(Move("taken" if ours else "unrecorded", name, f"in {entry.file}"))
            continue
        before = Entry.read(was[name])
        if before.file != entry.file:
            moves.append(Move("moved", name, f"{before.file} -> {entry.file}"))
        if before.signature != entry.signature:
            pairs = enumerate(zip(before.signature, entry.signature, strict=False))
            start = max(0, next((at for at, (was_, is_) in pairs if was_ != is_), 0) - 40)
            both = f"was {before.signature[start:]}\nis  {entry.signature[start:]}"
            moves.append(Move("signature", name, both))
        elif before.hash != entry.hash:
            moves.append(Move("body", name))
    return now, moves


def version_in(folder: Path) -> str | None:
    """A vLLM's version by its own word, without a local part."""
    file = folder / "vllm" / "_version.py"
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"^__version__ = .*?['\"]([^'\"+]+)", text, re.M)
    return found and found[1]


def sources_of_version(version: str) -> Path:
    """The folder of a version's sources: installed, cached or downloaded, in this order."""
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin and version_in(Path(spec.origin).parents[1]) == version:
        return Path(spec.origin).parents[1]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "vllm-hidden-transfer" / "vllm-sources" / version
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    typer.echo(f"downloading vllm=={version} (a wheel of some hundred MB) with pip ...")
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".making-") as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, "--quiet", "--dest", scratch, f"vllm=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            errors = re.findall(r"^ERROR: (.+?)\.?$", result.stderr, re.M) or [
                "it does not say why"
            ]
            raise CheckError(f"pip has no wheel vllm=={version} here ({errors[-1]})")
        (file,) = Path(scratch).glob("vllm-*.whl")
        with zipfile.ZipFile(file) as wheel:
            names = [name for name in wheel.namelist() if re.fullmatch(r"vllm/.*\.py", name)]
            wheel.extractall(Path(scratch) / "sources", names)
        (Path(scratch) / "sources").rename(kept)
    return kept


def print_moves(moves: Sequence[Move]) -> None:
    for kind, meaning in KINDS.items():
        of_kind = [move for move in moves if move.kind == kind]
        if of_kind:
            typer.echo(f"  {meaning} ({len(of_kind)})")
        for move in of_kind:
            typer.echo("\n      ".join([f"    {move.seam}", *move.detail.splitlines()]))


def check(source: str, record: dict[str, Any], *, write: bool = False, ours: Path = OURS) -> bool:
    """Compare one source with the record and say what moved; whether all is as it should be."""
    named = re.fullmatch(r"\d+(\.\d+)+\S*", source) is not None and not Path(source).exists()
    folder = sources_of_version(source) if named else Path(source)
    sources = Sources(folder, record["relied_on"], ours)
    version = version_in(folder)
    if version is None:
        raise CheckError(f"{folder} does not say in vllm/_version.py which vLLM it is")
    recorded = record["versions"]
    if write:
        recorded[version], moves = look_up(sources, {})
        absent = [move for move in moves if move.kind in ("missing", "parameters")]
        typer.echo(f"vLLM {version}: {len(recorded[version])} seams recorded")
        print_moves(absent)
        return not absent
    if BASELINE not in recorded:
        raise CheckError(f"vLLM {BASELINE} is not recorded: run this with --record on it")
    now, moves = look_up(sources, recorded.get(version, recorded[BASELINE]))
    if version in recorded:
        state = "not as recorded" if moves else "as recorded"
        typer.echo(f"vLLM {version} ({len(now)} seams): {state}")
        print_moves(moves)
    good = not moves
    if version != BASELINE:
        _, moves = look_up(sources, recorded[BASELINE])
        typer.echo(f"vLLM {version} against {BASELINE}, with which the plugin was run:")
        print_moves(moves)
        same = len(now) - len({move.seam for move in moves})
        typer.echo(f"  as in {BASELINE}: {same} of {len(now)} seams")
    try:
        versions.check_vllm_version(version)
        typer.echo(f"vLLM {version}: the plugin starts with it.")
    except versions.UnsupportedVllmError:
        typer.echo(
            f"vLLM {version}: the plugin refuses it, because it was not run with it; "
            f"{versions.OVERRIDE_VARIABLE}=1 lets it try, under a banner that says so."
        )
    return good


def main(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="A version, or a folder with vllm/.")
    ],
    write: Annotated[
        bool, typer.Option("--record", help="Write down what is there instead of comparing.")
    ] = False,
) -> None:
    """Compare every seam of vLLM that we use with what was recorded, and say what moved."""
    try:
        record = json.loads(RECORD.read_text())
        good = [check(source, record, write=write) for source in sources]
        if write:
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    except (CheckError, OSError, json.JSONDecodeError) as error:
        typer.echo(f"check_vllm: {error}.", err=True)
        raise typer.Exit(2) from error
    if not all(good):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
