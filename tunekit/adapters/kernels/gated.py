"""Recognises MLPs that compute exactly down(act(gate(x)) * up(x)), by comparing their code."""

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

EXPRESSIONS = (
    "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
    "self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))",
)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether the module's forward is one of EXPRESSIONS, with an activation without weights."""
    activation = getattr(module, "act_fn", None)
    if not callable(activation) or (isinstance(activation, nn.Module) and any(True for _ in activation.parameters())):
        return False
    return _computes_gated(type(module))  # type: ignore[arg-type]


def forward_code(kind: type[nn.Module]) -> tuple[list[str], str]:
    """The arguments of a class's `forward` and its code without the docstring; empty if the code is not available."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return [], ""
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return [], ""
    body = function.body if ast.get_docstring(function) is None else function.body[1:]
    return [argument.arg for argument in function.args.args], "\n".join(map(ast.unparse, body))


@cache
def _computes_gated(kind: type[nn.Module]) -> bool:
    """Whether the body of `forward(self, x)` returns one of EXPRESSIONS, perhaps through one variable."""
    arguments, text = forward_code(kind)
    if len(arguments) != 2:
        return False
    return any(text in _forms(expression.replace("(x)", f"({arguments[1]})")) for expression in EXPRESSIONS)


def _forms(expression: str) -> list[str]:
    """The accepted function bodies: they return the expression directly, or through one variable with a usual name."""
    named = [f"{name} = {expression}\nreturn {name}" for name in ("down_proj", "output", "hidden_states", "x")]
    return [f"return {expression}", *named]
