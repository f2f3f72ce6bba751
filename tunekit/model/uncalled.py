"""Finds layers that the model's code never calls, because it multiplies the layer's weight directly. An example is
Mamba's dt_proj.

An adapter on such a layer would have no effect, and the layer cannot be quantized. The layers are found by parsing the
model's source code.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn

from tunekit.contracts import Modules
from tunekit.errors import listed

OWN_WEIGHT = re.compile(r"self\.(\w+)\.weight(\.\w+\([^()]*\))?")  # the whole matrix, perhaps cast or transposed
PRODUCTS = ("linear", "matmul")  # functions that multiply


def uncalled_layers(modules: Modules) -> set[str]:
    """Names of layers that the net does not call, because its code multiplies their weight directly, and of layers in a
    pooler whose output the net ignores."""
    split = ((name, *name.rpartition(".")[::2]) for name in modules if name)
    kinds: dict[str, type] = {name: type(module) for name, module in modules.items()}
    multiplied = {
        name for name, parent, attribute in split if parent in kinds and attribute in _multiplied_weights(kinds[parent])
    }
    return multiplied | _unread_poolers(modules)


def skipped_modules(net: nn.Module) -> list[str]:
    """Names of modules that get no gradient from rows of text: indexers, which only choose the positions that sparse
    attention reads, and layers that read only images (Mllama's)."""
    return [
        name
        for name, module in net.named_modules()
        if name.endswith(".indexer") or (hasattr(module, "cross_attn") and not hasattr(module, "self_attn"))
    ]


def skipped_notes(net: nn.Module) -> list[str]:
    """A note on modules that are not adapted, because rows of text do not train them."""
    names = skipped_modules(net)
    if not names:
        return []
    return [f"rows of text give no gradient to {listed(names, 4)}: these modules are not adapted"]


def _unread_poolers(modules: Modules) -> set[str]:
    """Names of the modules in a pooler, if the net ignores the pooler's output. For example, SigLIP's classifier uses
    the mean of all positions instead."""
    kinds: dict[str, type] = {name: type(module) for name, module in modules.items() if not name}
    if not kinds or _reads_pooled(kinds[""]):
        return set()
    poolers = [name for name in modules if name.count(".") == 1 and name.endswith((".head", ".pooler"))]
    return {name for name in modules if name.startswith(tuple(f"{pooler}." for pooler in poolers))}


@cache
def _reads_pooled(kind: type) -> bool:
    """Whether the net's forward may read more of its base's output than the hidden states, such as the
    pooler's output."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (AttributeError, OSError, TypeError):
        return True
    return ".last_hidden_state" not in source or "pooler_output" in source or "[1]" in source


@cache
def returns_several(kind: type) -> bool:
    """Whether the forward of this linear class returns a tuple, as in Llama 4's routers, and not only the product."""
    if getattr(kind, "forward", None) is nn.Linear.forward:
        return False
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(_code(kind)))


@cache
def _multiplied_weights(kind: type) -> frozenset[str]:
    """Names of the attributes (layers) of a class whose `weight` is used directly in the code of the class."""
    factors = (factor for node in ast.walk(_code(kind)) for factor in _factors(node))
    return frozenset(match[1] for factor in factors for match in [OWN_WEIGHT.fullmatch(ast.unparse(factor))] if match)


def _code(kind: type) -> ast.AST:
    """The class's syntax tree; an empty one if its source is not available."""
    return _classes(kind.__module__).get(kind.__name__, ast.Pass())


@cache
def _classes(module_name: str) -> dict[str, ast.AST]:
    """The syntax trees of the classes in a source file, by class name. Empty if the file neither reads a layer's weight
    nor defines a subclass of nn.Linear."""
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return {}
    tree = ast.parse(source) if OWN_WEIGHT.search(source) or "(nn.Linear)" in source else ast.Module([], [])
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _factors(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield from (node.left, node.right)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PRODUCTS:
        yield from node.args
    elif isinstance(node, ast.Assign) or (isinstance(node, ast.Attribute) and node.attr == "data"):
        yield node.value  # weights that are split, or changed in place like Gemma 3n's coefficients
