"""Answers of composite models to texts: generate and serve give what transformers generates in the class that
config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForMultimodalLM

from tests.arithmetic.test_composite_models import load as load_base
from tests.arithmetic.test_composite_models import save_adapter
from tests.support.composite_case import SHAPES, write_composite
from tests.talking.test_conversation import load
from tests.test_serve import ask, client, serving
from tunekit.generate import answer

QUESTIONS = ["Say something long, please.", "And you?"]
LIMIT = 8


def by_transformers(net: Any, model_type: str, tokenizer: Any, question: str) -> str:
    net = net.language_model if model_type == "llama4" else net  # the forward of the whole class fails in 5.24
    text = tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text)])
    written = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :].tolist(), skip_special_tokens=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", SHAPES)
def test_generate_and_serve_answer_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    base = write_composite(model_type, tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    adapter = save_adapter(load_base(base), tmp_path / "adapters" / "tuned")
    net = AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32).eval()
    targets = {
        name: load(folder, f"evaluation.max_new_tokens={LIMIT}")
        for name, folder in (("base", base), ("tuned", adapter))
    }
    expected = {"base": [by_transformers(net, model_type, targets["base"].tokenizer, each) for each in QUESTIONS]}
    net = peft.PeftModel.from_pretrained(net, str(adapter)).eval().base_model.model
    expected["tuned"] = [by_transformers(net, model_type, targets["base"].tokenizer, each) for each in QUESTIONS]
    assert expected["base"] != expected["tuned"]
    for name, target in targets.items():
        assert answer(target, QUESTIONS) == expected[name]
    with serving(base, adapter.parent) as port:
        asked = client(port)
        for name, texts in expected.items():
            replies = [ask(asked, name, question, max_tokens=LIMIT) for question in QUESTIONS]
            assert [reply.choices[0].message.content for reply in replies] == texts
