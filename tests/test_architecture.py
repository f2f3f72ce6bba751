"""Who may import whom, which third-party package has which door, pairs of files, sizes and names: read from the source.

Every import counts, also inside a function, under TYPE_CHECKING, or by importlib with a name that begins in the source.
"""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "tunekit"

LEVELS = {
    "": 0,  # tunekit/__init__.py: the version
    "errors": 0,
    "basics": 0,
    "records": 1,
    "formats": 1,
    "metrics": 1,
    "recipe": 2,
    "contracts": 3,
    "machine": 3,
    "files": 3,
    "console": 3,
    "model": 4,
    "data": 4,
    "artifacts": 4,
    "adapters": 5,
    "objectives": 5,
    "memory": 5,
    "tuned": 6,
    "targets": 7,
    "evaluation": 7,
    "companions": 8,
    "talking": 8,
    "training": 9,
    "arithmetic": 9,
    "planning": 10,
    "exports": 10,
    "commands": 12,  # which call the verbs
    "cli": 13,
    "__main__": 14,
}
VERB_LEVEL = 11  # every other file of the package
SAME_LEVEL = {
    ("train", "plan"),
    ("audit", "train"),
    ("sweep", "train"),
}  # beside contracts, which every room from level 3 on may import
ARRAY_LEVEL = 3  # numpy and torch begin there

DOORS = {
    "yaml": ("recipe",),
    "pydantic": ("recipe",),
    "pydantic_core": ("recipe",),
    "typer": ("cli", "commands"),
    "rich": ("console",),
    "datasets": ("data/reading",),
    "pyarrow": ("data/reading", "talking/embedder"),
    "pandas": ("data/reading",),
    "accelerate": ("machine/devices", "artifacts/trackers"),
    "wandb": ("artifacts/trackers",),
    "mlflow": ("artifacts/trackers",),
    "comet_ml": ("artifacts/trackers",),
    "psutil": ("machine", "files"),
    "filelock": ("machine", "files"),
    "rensa": ("data/looking", "data_check"),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "llguidance": ("talking/grammar",),
    "regex": ("files/patterns",),
    "transformers": ("model", "exports/programs/inside"),
    "tokenizers": ("model",),
    "tqdm": ("model/transformers_guard",),
    "huggingface_hub": ("model",),
    "gguf": ("model", "exports"),
    "libgguf": ("exports",),
    "conversion": ("exports",),  # of llama.cpp
    "jinja2": ("model/text", "artifacts/report"),
    "bitsandbytes": ("model", "training/optimizers"),
    "liger_kernel": ("adapters/kernels",),
    "diffusers": ("model/families",),
    "PIL": ("data/encoding", "artifacts/report"),
    "torchvision": ("data/encoding", "artifacts/report"),
    "safetensors": ("files",),
    "soundfile": ("data/reading",),
    "jiwer": ("metrics",),
    "llama_cpp_py_sync": ("exports/programs/inside",),
    "mlx": ("exports/programs/inside",),
    "mlx_lm": ("exports/programs/inside",),
    "vllm": ("exports/programs/inside",),
    "ctranslate2": ("exports/programs/inside",),
    "onnxruntime": ("exports/programs/inside",),
    "optimum": ("exports/programs/inside",),
    "lm_eval": ("evaluation/tasks",),
}
ARRAYS = {"numpy", "torch"}
DRAWERS = re.compile(r"^(utils?|commons?|helpers?|misc|core|base_utils)$")
PAIRS = {  # kind -> the folder of its torch half, and the names that make a file there one of the kind
    "adapters": ("adapters/methods", {"METHOD"}),
    "objectives": ("objectives", {"make"}),
    "starts": ("adapters/starts", {"make_start"}),
}


@dataclass(frozen=True)
class Import:
    """One import: the file as "data/batches", the dotted module, the line."""

    importer: str
    module: str
    line: int

    def __str__(self) -> str:
        return f"tunekit/{self.importer}.py:{self.line} imports {self.module}"


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


@pytest.fixture(scope="module", autouse=True)
def trees_are_dropped() -> Iterator[None]:
    yield
    tree_of.cache_clear()


def name_of(file: Path) -> str:
    """tunekit/data/batches.py -> "data/batches"; a package's __init__ is its folder."""
    parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
    return "/".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def is_module(dotted: str) -> bool:
    path = REPOSITORY.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def read_imports(importer: str, text: str) -> Iterator[Import]:
    """Every import of a source text; a relative one is written as it stands ("..model")."""
    return imports_of(importer, ast.parse(text))


def imports_of(importer: str, tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield Import(importer, full if full.startswith("tunekit") and is_module(full) else module, node.lineno)
        elif isinstance(node, ast.Call) and _called_name(node) in ("import_module", "__import__") and node.args:
            module = _start_of(node.args[0])
            if module:
                yield Import(importer, module, node.lineno)


def _called_name(call: ast.Call) -> str | None:
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)


def _start_of(argument: ast.expr) -> str | None:
    """What a module name surely begins with: the whole of a text, the first part of an f-string."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value.strip(".") or None
    return None


def room_of(name: str) -> str:
    """The room of "data/batches" or "tunekit.data.batches": data."""
    return name.replace(".", "/").removeprefix("tunekit").strip("/").partition("/")[0]


def level_of(room: str) -> int:
    return LEVELS.get(room, VERB_LEVEL)


def fault_of(found: Import) -> str | None:
    """Why an import is not allowed; None where it is."""
    if found.module.startswith("."):
        return f"{found}: relative; write the full name"
    top = found.module.partition(".")[0]
    if top == "tunekit":
        return _own_fault(found)
    if top in sys.stdlib_module_names:
        return None
    if top in ARRAYS:
        return (
            None if level_of(room_of(found.importer)) >= ARRAY_LEVEL else f"{found}: numpy and torch begin at level 3"
        )
    if top not in DOORS:
        return f"{found}: a package without a door; list it in tests/test_architecture.py, or do without"
    if any(found.importer == door or found.importer.startswith(f"{door}/") for door in DOORS[top]):
        return None
    return f"{found}: its door is {' or '.join(DOORS[top])}"


def _own_fault(found: Import) -> str | None:
    importer, imported = room_of(found.importer), room_of(found.module)
    if importer == imported or level_of(imported) < level_of(importer):
        return None
    if imported == "contracts" and level_of(importer) >= ARRAY_LEVEL:
        return None
    if (importer, imported) in SAME_LEVEL:
        return None
    return f"{found}: level {level_of(importer)} may import only lower levels, and that is level {level_of(imported)}"


@functools.cache
def all_imports() -> list[Import]:
    return [found for file in source_files() for found in imports_of(name_of(file), tree_of(file))]


def test_rooms_import_only_lower_rooms_and_packages_have_one_door() -> None:
    faults = [fault for found in all_imports() if (fault := fault_of(found))]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("data/rows", "def late():\n    from tunekit.model.load import load_model"),
        ("recipe/data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("model/load", "from importlib import import_module\nimport_module('tunekit.training.run')"),
        ("model/load", "import importlib\nimportlib.import_module(f'tunekit.adapters.{1}')"),
        ("merge", "from tunekit import evaluate"),
        ("data/render", "import transformers.utils"),
        ("training/loop", "from bitsandbytes.optim import AdamW8bit"),
        ("planning/plan", "import requests"),
        ("plan", "from tunekit.cli import main"),
        ("model/load", "from . import tokenizer"),
        ("console", "from tunekit.artifacts.run import RunFolder"),
        ("tuned/model", "from tunekit.planning.plan import plan"),
        ("arithmetic/merge", "from tunekit.training.run import Run"),
        ("training/loop", "import peft"),
    ],
)
def test_a_forbidden_import_is_found(importer: str, text: str) -> None:
    assert [fault for found in read_imports(importer, text) if (fault := fault_of(found))]


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("data/rows", "from tunekit.contracts import Pixels, Batch\nfrom tunekit.data import batching\nimport numpy"),
        ("planning/plan", "from tunekit.data.rows import load_rows"),
        ("merge", "from tunekit.targets.target import open_target\nimport torch, os"),
        ("training/optimizers", "import bitsandbytes"),
        ("artifacts/run", "from tunekit.contracts import Batch"),
    ],
)
def test_an_allowed_import_is_not(importer: str, text: str) -> None:
    assert not [fault for found in read_imports(importer, text) if (fault := fault_of(found))]


def circles() -> list[tuple[str, ...]]:
    """Groups of files that reach each other by imports."""
    files = {name_of(file) for file in source_files()}
    reached: dict[str, set[str]] = {name: set() for name in files}
    for found in all_imports():
        imported = found.module.removeprefix("tunekit.").replace(".", "/")
        if imported in files and imported != found.importer:
            reached[found.importer].add(imported)
    for middle in files:
        for name in files:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return sorted({tuple(sorted(b for b in reached[a] if a in reached[b])) for a in files if a in reached[a]})


def test_no_two_files_import_each_other() -> None:
    assert not circles()


def test_no_other_fine_tuning_library_is_imported() -> None:
    assert not [str(found) for found in all_imports() if found.module.partition(".")[0] in ("peft", "trl")]


def test_only_recipe_modules_load_before_torch_is_needed() -> None:
    """The table says that levels 0 to 2 are free of torch; this asks the interpreter."""
    modules = "tunekit.cli, tunekit.validate, tunekit.data_check, tunekit.recipe.load"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def top_level_names(file: Path) -> set[str]:
    """Functions, classes and assigned names of a module."""
    names: set[str] = set()
    for node in tree_of(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


@pytest.mark.parametrize("kind", PAIRS)
def test_every_name_is_a_pair_of_files(kind: str) -> None:
    folder, marks = PAIRS[kind]
    halves = {file.stem for file in (PACKAGE / "recipe" / kind).glob("*.py") if file.stem != "__init__"}
    others = {file.stem for file in (PACKAGE / folder).glob("*.py") if top_level_names(file) & marks}
    assert halves == others


OF_METHODS = ("tunekit.adapters.methods.", "tunekit.recipe.adapters.")
MAY_NAME_METHODS = ("adapters/methods/", "recipe/adapters/", "recipe/foreign/")


def test_a_method_is_its_two_files() -> None:
    """Whatever else there is to say of a method, others ask of its METHOD: no other file imports one by name."""
    named = [
        str(found)
        for found in all_imports()
        if found.module.startswith(OF_METHODS)
        and is_module(found.module)
        and not found.importer.startswith(MAY_NAME_METHODS)
    ]
    assert not named, "\n" + "\n".join(named)


def functions_of(file: Path) -> Iterator[tuple[str, int]]:
    """Each function's name and how many lines it has, its docstring and decorators left out."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            docstring_lines = (body[0].end_lineno or 0) - body[0].lineno + 1 if documented else 0
            yield f"{name_of(file)}.{node.name}", (node.end_lineno or 0) - node.lineno + 1 - docstring_lines


def test_files_and_functions_stay_short() -> None:
    most = {
        "contracts/objective": 460,
        "training/run": 450,
    }  # signatures, and steps of a run, which are read one at a time
    sizes = {name_of(file): len(file.read_text("utf-8").splitlines()) for file in source_files()}
    long_files = [name for name, size in sizes.items() if size > most.get(name, 400)]
    lengths = dict(pair for file in source_files() for pair in functions_of(file))
    long_functions = {name: length for name, length in lengths.items() if length > 60}
    assert not long_files
    assert not long_functions
    assert statistics.median(lengths.values()) <= 14


def test_no_folder_holds_more_than_a_tenth_of_the_lines() -> None:
    lines: dict[str, int] = {}
    for file in source_files():
        folder = str(file.parent.relative_to(PACKAGE))
        lines[folder] = lines.get(folder, 0) + len(file.read_text("utf-8").splitlines())
    whole = sum(lines.values())
    assert not {folder: count for folder, count in lines.items() if count > whole / 10}


def test_the_loop_is_one_short_function() -> None:
    """Without a generator or a callback between a step and its caller."""
    tree = ast.parse((PACKAGE / "training" / "run.py").read_text("utf-8"))
    run = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Run")
    train = next(node for node in run.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert (train.end_lineno or 0) - train.lineno < 14
    assert not [node for node in ast.walk(train) if isinstance(node, ast.Lambda | ast.Yield | ast.YieldFrom)]


CONTRACT_BASES = frozenset(  # depth is counted from these, and from classes of other packages
    {"LayerAdapter", "ModelAdapter", "ParameterAdapter", "SharedPart", "TrainedCopy"}
    | {"Section", "AdapterSettings", "ObjectiveSettings", "StartSettings", "TunekitError"}
)


def own_bases() -> dict[str, set[str]]:
    """Each class of the package with the names of its bases; classes of one name count as one."""
    bases: dict[str, set[str]] = {}
    for node in (node for file in source_files() for node in ast.walk(tree_of(file))):
        if isinstance(node, ast.ClassDef):
            plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            bases.setdefault(node.name, set()).update(ast.unparse(base).rpartition(".")[2] for base in plain)
    return bases


def depth_of(name: str, bases: dict[str, set[str]]) -> int:
    """How many classes of ours a class is below a base of the contracts, or below one of another package."""
    if name in CONTRACT_BASES or name not in bases:
        return 0
    return max((1 + depth_of(base, bases) for base in bases[name] - {name, "Protocol", "Generic"}), default=0)


def test_inheritance_is_shallow() -> None:
    bases = own_bases()
    deep = {name: depth for name in bases if (depth := depth_of(name, bases)) > 2}
    assert not deep


def test_a_class_too_deep_is_found() -> None:
    bases = {"A": {"AdapterSettings"}, "B": {"A"}, "C": {"B", "Other"}, "D": set(), "E": {"D"}, "F": {"Module"}}
    assert {name: depth_of(name, bases) for name in bases} == {"A": 1, "B": 2, "C": 3, "D": 0, "E": 1, "F": 1}


def test_names_say_what_a_file_is() -> None:
    parts = {part for file in source_files() for part in file.relative_to(PACKAGE).with_suffix("").parts}
    assert not [part for part in parts if DRAWERS.match(part)]
    classes = [
        f"{name_of(file)}.{node.name}"
        for file in source_files()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Handler|Factory)$", node.name)
    ]
    assert not classes


def test_every_module_says_what_it_is() -> None:
    trees = {name_of(file): tree_of(file) for file in source_files()}
    assert not [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


MOST_ANY = 60  # parameters, attributes and results in tunekit that say nothing about their value


def bare_any(tree: ast.Module) -> Iterator[int]:
    """Lines with a parameter, a result or a variable whose whole type is `Any`."""
    for node in ast.walk(tree):
        types: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            types = [node.returns, *(argument.annotation for argument in named if argument is not None)]
        elif isinstance(node, ast.AnnAssign):
            types = [node.annotation]
        yield from (each.lineno for each in types if isinstance(each, ast.Name) and each.id == "Any")


def test_any_is_rare() -> None:
    counts = {name_of(file): len(list(bare_any(tree_of(file)))) for file in source_files()}
    worst = sorted(((count, name) for name, count in counts.items() if count), reverse=True)[:20]
    assert sum(counts.values()) <= MOST_ANY, f"{sum(counts.values())} times; most of them in {worst}"


def types_of(file: Path) -> Iterator[str]:
    """Classes, and names of types such as `Pixels = NDArray[np.uint8]`; type variables are no types."""
    for node in tree_of(file).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, variable = node.targets[0].id, isinstance(node.value, ast.Call) and _called_name(node.value)
            if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name) and variable != "TypeVar":
                yield name


def test_a_type_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for file in source_files():
        for name in types_of(file):
            places.setdefault(name, []).append(name_of(file))
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert not several


def tracked_files() -> list[Path]:
    """Files that git holds; in an unpacked archive, those of the package, the recipes, the scripts and the tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [REPOSITORY / name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]
    folders = ("tunekit", "recipes", "scripts", "tests")
    return [file for folder in folders for file in (REPOSITORY / folder).rglob("*") if file.is_file()]


def test_no_path_of_one_machine_is_written_anywhere() -> None:
    machine_path = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work|mnt|scratch|farm)/[a-z]")
    found: list[str] = []
    for file in tracked_files():
        if file == Path(__file__).resolve() or file.suffix in (".safetensors", ".gguf", ".parquet"):
            continue
        text = file.read_text("utf-8", errors="replace")
        found += [f"{file.relative_to(REPOSITORY)}: {match.group()}" for match in machine_path.finditer(text)]
    assert not found
