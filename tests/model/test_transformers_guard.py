"""Other libraries are left as they were found, after success and after an error."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.utils import chat_template_utils

from tests.model.test_families import make_net
from tunekit.errors import DataError
from tunekit.model.attention.documents import attend_per_document
from tunekit.model.attention.segments import Segments
from tunekit.model.call import Call, calling
from tunekit.model.families.causal import FAMILY
from tunekit.model.storage.reading import unfilled_net
from tunekit.model.text.templates import FIXED_DAY, render_template
from tunekit.model.transformers_guard import replaced
from tunekit.planning.simulated.kernels import kernels_as_on

CPU = torch.device("cpu")
TEMPLATE = "{{ strftime_now('%Y') }}{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}"


class Failure(Exception):
    """What a test raises inside a block."""


def state() -> dict[str, Any]:
    """What tunekit exchanges for the time of a block."""
    clock = chat_template_utils._compile_jinja_template(TEMPLATE).environment.globals["strftime_now"]
    return {
        "parameters": (nn.Module.register_parameter, dict(nn.modules.module._global_parameter_registration_hooks)),
        "documents": masking_utils.find_packed_sequence_indices,
        "attention": functional.scaled_dot_product_attention,
        "products": getattr(functional, "grouped_mm", None),
        "clock": clock,
    }


@pytest.fixture(autouse=True)
def left_as_found() -> Any:
    before = state()
    yield
    assert state() == before


def test_a_replaced_name_comes_back() -> None:
    namespace = {"kept": 1, "other": 2}
    with replaced(namespace, kept=3, added=4):
        assert namespace == {"kept": 3, "added": 4, "other": 2}
    assert namespace == {"kept": 1, "other": 2}
    with pytest.raises(Failure), replaced(namespace, kept=3, added=4):
        raise Failure
    assert namespace == {"kept": 1, "other": 2}


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_on_meta(fails: bool) -> None:
    seen = []

    def from_config(config: Any, **named: Any) -> Any:
        seen.append(nn.Linear(2, 2).weight.is_meta)
        if fails:
            raise Failure
        return AutoModelForCausalLM.from_config(config)

    config = copy.deepcopy(make_net("llama").config)
    assert isinstance(config, type(AutoConfig.for_model("llama")))
    raises(fails, lambda: unfilled_net(SimpleNamespace(from_config=from_config), config, torch.float32, "sdpa"))
    assert seen == [True]
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("fails", [False, True])
def test_documents_of_packed_rows(fails: bool) -> None:
    net: Any = make_net("llama")
    attend_per_document(net, CPU, torch.float32)
    plain, seen = masking_utils.find_packed_sequence_indices, []

    def look(*_: Any) -> None:
        seen.append(masking_utils.find_packed_sequence_indices is not plain)
        if fails:
            raise Failure

    net.model.layers[0].register_forward_pre_hook(look)
    inputs = {"input_ids": torch.arange(5)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with calling(Call(segments=Segments(((3, 2),)))):
        raises(fails, lambda: FAMILY.hidden(net, inputs))
    raises(fails, lambda: FAMILY.hidden(net, inputs))  # without segments transformers finds out by itself
    assert seen == [True, False]


@pytest.mark.parametrize("fails", [False, True])
def test_kernels_of_a_simulation(fails: bool) -> None:
    plain = functional.scaled_dot_product_attention

    def simulate() -> None:
        with kernels_as_on(CPU):
            assert functional.scaled_dot_product_attention is not plain
            if fails:
                raise Failure

    raises(fails, simulate)


@pytest.mark.parametrize("fails", [False, True])
def test_the_clock_of_a_template(fails: bool) -> None:
    texts = []

    def apply_chat_template(messages: Any, chat_template: str, **named: Any) -> str:
        rendered, _ = chat_template_utils.render_jinja_template([messages], chat_template=chat_template)
        texts.append(rendered[0])
        return str(rendered[0])

    native = SimpleNamespace(apply_chat_template=apply_chat_template)
    written = str(FIXED_DAY.year)  # also what the message says, so that its content stands in the text
    messages = [{"role": "user", "content": written}] * (2 if fails else 1)
    raises(fails, lambda: render_template(native, TEMPLATE, messages, None, False), DataError)
    assert texts == ([] if fails else [written])


IMPORT = """
import torch
from tunekit.errors import ModelError
compiler = torch.compile
from tunekit.model.quantized.codec import import_bitsandbytes
try:
    import_bitsandbytes()
except ModelError as error:
    assert "bitsandbytes" in str(error) and "replaced" not in str(error), error
    assert str(error.__cause__) == "replaced: True", error.__cause__
else:
    raise SystemExit("imported")
assert torch.compile is compiler
"""


@pytest.mark.drawn
def test_a_failed_import_of_bitsandbytes_leaves_the_compiler(tmp_path: Path) -> None:
    lines = "import torch\nraise ImportError(f'replaced: {torch.compile.__module__.startswith(\"tunekit\")}')\n"
    (tmp_path / "bitsandbytes.py").write_text(lines)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IMPORT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def raises(fails: bool, work: Callable[[], object], kind: type[Exception] = Failure) -> None:
    if not fails:
        work()
        return
    with pytest.raises(kind):
        work()
