"""Merged models against the running adapter and against peft, from non-zero adapters."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING

from tests.architectures.tiny import write_tiny
from tests.conftest import write_tiny_llama
from tests.support.quantized_folders import write_mxfp4, write_quantized
from tests.support.train_case import in_child
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import save_adapter_folder
from tunekit.arithmetic.merge import choose_onto
from tunekit.arithmetic.merge import merge as merge_target
from tunekit.arithmetic.merge_output import REPORT, SPARE_BYTES, check_space
from tunekit.errors import InputError, ModelError, NumericsError, ResourceError
from tunekit.merge import merge_verb
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.model.storage.portable import make_portable
from tunekit.model.storage.rewrite import Rewriter
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.targets.target import find_target

CPU = torch.device("cpu")


def write_base(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random base of any architecture with the tokenizer of tiny llama (262 tokens)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.conftest import write_tiny_llama

    write_tiny_llama(folder)
    shape: dict[str, Any] = {
        "vocab_size": 270,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **changes}), dtype=dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder)
    return folder


def train(base: LoadedModel, folder: Path, **settings: Any) -> Path:
    """An adapter with random, non-zero tensors, saved."""
    attached = attach_adapter(
        base.net, LoraSettings(**{"r": 4, **settings}), seed=0, head_name=base.family.head_name(base.net)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attached.trained().values():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    save_adapter_folder(
        attached,
        folder,
        base_name=base.facts.name_or_path,
        base_fingerprint=base.fingerprint,
        revision=None,
        base_dtype=base.facts.dtype,
        quantization=base.facts.quantization,
        double_quantization=base.facts.double_quantization,
    )
    return folder


IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(net: nn.Module) -> torch.Tensor:
    return net(input_ids=IDS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def merged_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What transformers alone computes from the merged folder; nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM

    net, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits_of(net.eval())


def prepared(
    tmp_path: Path, model_type: str, *, quantization: str = "none", dtype: str = "float32", **settings: Any
) -> tuple[Path, torch.Tensor]:
    """A base, an adapter of it, and the logits of both running together."""
    base_settings = settings.pop("base", {})
    base = write_base(tmp_path / "base", model_type, getattr(torch, dtype), **base_settings)
    section = ModelSection(name_or_path=str(base), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    model = load_model(section, device=CPU)
    plain = logits_of(model.net)
    adapter = train(model, tmp_path / "adapter", **settings)
    running = logits_of(model.net)
    assert (running - plain).abs().max() > 0.05  # the adapter does something
    return adapter, running


def merge(adapter: Path, output: Path, onto: str | None = None, **overrides: str) -> Any:
    changes = [f"model.{key}={value}" for key, value in overrides.items()]
    return merge_target(find_target(str(adapter), None, changes), output, onto)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"base": {"attention_bias": True, "mlp_bias": True}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ("gpt2", {"target_modules": ["wte"]}),
    ("gpt2", {"target_modules": ["lm_head", "wte"]}),
    ("llama", {"target_modules": ["lm_head"], "base": {"tie_word_embeddings": True}}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "base": {"tie_word_embeddings": True}}),
    ("mixtral", {"target_modules": ["q_proj", "v_proj"], "base": {"num_local_experts": 2}}),
    ("gpt_neox", {"use_rslora": True}),
    ("gemma2", {"base": {"head_dim": 16}}),
    # a tied head with its own bias
    ("modernbert-decoder", {"target_modules": ["decoder"], "base": {"pad_token_id": 0}}),
    ("modernbert-decoder", {"target_modules": ["decoder"], "bias": "lora_only", "base": {"pad_token_id": 0}}),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("model_type", "settings"), CASES)
def test_merged_equals_running(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    adapter, running = prepared(tmp_path, model_type, **settings)
    result = merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)
    assert result.onto == "full"
    assert result.difference.largest < 1e-4
    report = json.loads((tmp_path / "merged" / REPORT).read_text())
    assert report["largest_logit_difference"] == result.difference.largest
    tied = {"lm_head", "embed_tokens", "wte", "decoder"} & set(settings.get("target_modules", ()))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config.get("tie_word_embeddings") is False) or not tied
    assert "quantization_config" not in config


def test_adapter_of_peft_on_a_tied_head(tmp_path: Path) -> None:
    """peft's own merge of it is far off, for it changes the embedding as well."""
    import peft
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    running = logits_of(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8_weight_only"])
def test_dequantized_is_the_default_and_equals_the_running_adapter(tmp_path: Path, quantization: str) -> None:
    adapter, running = prepared(tmp_path, "llama", quantization=quantization)
    result = merge(adapter, tmp_path / "merged")
    assert result.onto == "dequantized"
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)
    full = merge(adapter, tmp_path / "full", "full")
    assert full.difference.largest > 100 * result.difference.largest
    gap = (merged_logits(tmp_path / "full") - running).abs().max()
    assert gap > 0.001


def test_requantized_on_request_with_its_error(tmp_path: Path) -> None:
    base = {"intermediate_size": 128}  # transformers' own reading needs whole blocks in a row
    adapter, running = prepared(tmp_path, "llama", quantization="nf4", base=base)
    result = merge(adapter, tmp_path / "merged", "quantized")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    logits = merged_logits(tmp_path / "merged")
    assert 0.001 < (logits - running).abs().mean() < running.std() / 2
    assert result.difference.largest > 0.001
    read = load_model(
        find_target(str(tmp_path / "merged"), None, ["model.dtype=float32"]).model, device=torch.device("cpu")
    )
    assert packed_layers(read.net)  # eval and generate take the merged folder as it is
    with torch.no_grad():
        difference = (read.net(input_ids=IDS).logits - logits).abs()
    assert difference.mean() < 0.01 * logits.std()  # transformers multiplies in the bfloat16 of its configuration


def test_conv1d_of_a_quantized_base(tmp_path: Path) -> None:
    """gpt2's square matrices: orientation cannot be told from the shape."""
    adapter, running = prepared(tmp_path, "gpt2", quantization="nf4", target_modules=["c_attn", "c_proj"])
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)


def test_one_cast_from_float32(tmp_path: Path) -> None:
    """bfloat16: every merged weight is the nearest to W + delta, computed in float64."""
    adapter, _ = prepared(tmp_path, "llama", dtype="bfloat16", target_modules=["q_proj"])
    merge(adapter, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        if "q_proj" not in name:
            assert torch.equal(after[name], weight)
            continue
        stem = "base_model.model." + name.removesuffix(".weight")
        delta = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double() * 8
        exact = weight.double() + delta
        bound = 2.0 ** (exact.abs().log2().floor() - 8) * 1.001 + 1e-8  # half a unit in the last of 8 bits
        assert ((after[name].double() - exact).abs() <= bound).all()


def test_trained_copies_are_written_as_they_were_trained(tmp_path: Path) -> None:
    """Heads, norms and biases of a float32 base, of which a run in bfloat16 keeps float32 copies."""
    base = write_base(tmp_path / "base", "llama", attention_bias=True)
    model = load_model(ModelSection(name_or_path=str(base), dtype="bfloat16"), device=CPU)
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all")
    merge(adapter, tmp_path / "merged")
    trained, merged = load_file(adapter / "adapter_model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(merged["lm_head.weight"], trained["base_model.model.lm_head.weight"])
    for name in ("q_proj", "k_proj"):
        key = next(
            key
            for key in trained
            if key.startswith(f"base_model.model.model.layers.0.self_attn.{name}.") and "bias" in key
        )
        assert torch.equal(merged[f"model.layers.0.self_attn.{name}.bias"], trained[key])


@pytest.mark.parametrize(
    ("stored", "written"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_the_written_dtype_and_how_much_of_the_difference_is_its_rounding(
    tmp_path: Path, stored: str, written: str
) -> None:
    adapter, _ = prepared(tmp_path, "gpt2", dtype=stored, target_modules=["c_attn", "c_proj", "wte"])
    target = find_target(str(adapter), None, ["model.dtype=float32"])
    result = merge_target(target, tmp_path / "merged", None, getattr(torch, written))
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, written)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == written
    difference = result.difference
    assert difference.unrounded is not None
    assert difference.rounding is not None
    assert difference.unrounded < 1e-4
    if written == "float32":
        assert difference.rounding == 0
        return
    assert difference.rounding > 10 * difference.unrounded
    assert difference.rounding == pytest.approx(difference.largest, abs=difference.unrounded + 1e-5)
    told = json.loads((tmp_path / "merged" / REPORT).read_text())
    assert (told["dtype"], told["computed_in"]) == (written, "float32")
    assert told["largest_logit_difference_of_rounding"] == difference.rounding


def test_the_certificate_of_a_half_precision_run_says_what_is_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = prepared(tmp_path, "llama", quantization="nf4", dtype="bfloat16", target_modules=["lm_head", "q_proj"])
    merge_verb(str(adapter), str(tmp_path / "merged"), None, None, [])
    told = json.loads((tmp_path / "merged" / REPORT).read_text())
    assert told["largest_logit_difference_unrounded"] < 1e-3 < told["largest_logit_difference"]
    printed = capsys.readouterr().out
    assert re.search(
        r"^weights in bfloat16, computed in float32: .*, of which rounding the weights causes \S+", printed, re.M
    )
    assert "computed in bfloat16, as the adapter runs here: logits differ by" in printed
    with pytest.raises(InputError, match="quantized weights cannot be written in another dtype"):
        merge_verb(str(adapter), str(tmp_path / "packed"), None, "quantized", [], "float16")
    with pytest.raises(InputError, match="--dtype: int8 is unknown; choose float32"):
        merge_verb(str(adapter), str(tmp_path / "packed"), None, None, [], "int8")


def test_the_certificate_leads_with_the_written_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A float32 base and its adapter in bfloat16: a reader of that difference first takes the merge for broken."""
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    merge_verb(str(adapter), str(tmp_path / "merged"), None, None, ["model.dtype=bfloat16"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "differ" in line]
    largest = [float(re.search(r"by (\S+) at most", line).group(1)) for line in lines]  # type: ignore[union-attr]
    assert lines[0].startswith("weights in float32, computed in float32: logits differ")
    assert lines[1].startswith("computed in bfloat16, as the adapter runs here")
    assert largest[0] < 1e-4 < largest[1]
    report = json.loads((tmp_path / "merged" / REPORT).read_text())
    assert report["largest_logit_difference_in_float32"] == pytest.approx(largest[0], rel=1e-2)


def test_sharded_base_and_prefixless_names(tmp_path: Path) -> None:
    """gpt2 as the hub has it, without `transformer.`, in several files."""
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", "gpt2")
    net = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    net.transformer.save_pretrained(base, max_shard_size="100KB")
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(config))
    assert len(list(base.glob("*.safetensors"))) > 1
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU)
    adapter = train(model, tmp_path / "adapter", target_modules=["c_attn", "wte"])
    running = logits_of(model.net)
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("exaone" not in CONFIG_MAPPING, reason="this release of transformers has no EXAONE")
def test_a_base_with_the_names_of_an_older_version(tmp_path: Path) -> None:
    """EXAONE's files say `transformer.h.0.mlp.c_proj` where transformers now has `model.layers.0.mlp.down_proj`."""
    base = write_tiny("exaone", tmp_path / "base")
    assert "transformer.h.0.mlp.c_proj.weight" in load_file(base / "model.safetensors")
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU)
    adapter = train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    running = logits_of(model.net)
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("fp8-blocks", "float32"), ("awq", "bfloat16"), ("mxfp4", "float32")])
def test_a_base_with_quantized_weights_is_merged_to_dense_weights(tmp_path: Path, name: str, dtype: str) -> None:
    base, targets = tmp_path / "base", {"target_modules": ["q_proj", "o_proj"]}
    if name == "mxfp4":
        write_mxfp4(base)
        targets |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    else:
        dense = write_tiny_llama(tmp_path / "dense", hidden=192)
        write_quantized(dense, base, name, dtype=dtype)
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU)
    adapter = train(model, tmp_path / "adapter", **targets)
    running = logits_of(model.net)
    merge(adapter, tmp_path / "merged")
    exact = dtype == "float32"
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), running, rtol=1e-5, atol=1e-5 if exact else 0.02)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    kinds = {tensor.dtype for key, tensor in load_file(tmp_path / "merged/model.safetensors").items() if "proj" in key}
    assert kinds == {getattr(torch, dtype)}


def test_companions_come_along_byte_for_byte(tmp_path: Path) -> None:
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    config = (tmp_path / "base" / "config.json").read_bytes()
    make_portable(tmp_path / "base")  # nothing is left to add then
    (tmp_path / "base" / "config.json").write_bytes(config)  # by which the adapter knows its base
    (tmp_path / "base" / "LICENSE").write_text("as you like")
    (tmp_path / "base" / "modeling_evil.py").write_text("raise SystemExit")
    merge(adapter, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not (tmp_path / "merged" / "modeling_evil.py").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_output_that_would_destroy_something_is_refused(tmp_path: Path) -> None:
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "base")
    for output in (tmp_path / "base", tmp_path / "base" / "inside", link, adapter, tmp_path, full):
        with pytest.raises(InputError):
            merge(adapter, output)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    merge(adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_numbers_that_overflow_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    (adapter / "tunekit.json").unlink()
    with pytest.raises(NumericsError, match="q_proj"):
        merge(adapter, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_logits_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit.arithmetic import merge as module

    def broken(*inputs: Any) -> list[torch.Tensor]:
        logits = computed(*inputs)
        logits[1][-1, 0] = torch.nan  # the last position of the second row
        return logits

    computed = module.logits_of
    monkeypatch.setattr(module, "logits_of", broken)
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    with pytest.raises(NumericsError, match="are not finite on 4 fixed texts"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_terminated_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = prepared(tmp_path, "llama")
    monkeypatch.setattr(
        "tunekit.arithmetic.merge.measure_difference", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    ended = in_child(lambda: merge_verb(str(adapter), str(tmp_path / "merged"), None, None, []), tmp_path / "merge.log")
    assert ended.code == 143, ended.output
    assert "stopped by SIGTERM during the merge; the unfinished output was removed" in ended.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merge.log"]


def test_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    free = SPARE_BYTES
    monkeypatch.setattr("tunekit.arithmetic.merge_output.free_bytes", lambda path: free)
    with pytest.raises(ResourceError, match="free"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    free += 1000
    check_space(tmp_path / "merged", 1000)
    with pytest.raises(ResourceError, match="free"):
        check_space(tmp_path / "merged", 1001)


def test_choices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    adapter, _ = prepared(tmp_path, "llama", target_modules=["q_proj"])
    for onto in ("dequantized", "quantized", "sideways"):
        with pytest.raises(InputError, match="this adapter's base is not quantized"):
            merge(adapter, tmp_path / "merged", onto)
    quantized: Any = SimpleNamespace(model=ModelSection(name_or_path="base", quantization="nf4"))
    with pytest.raises(InputError, match="--onto sideways is unknown"):
        choose_onto(quantized, "sideways")
    with pytest.raises(InputError, match="no adapter"):
        merge(tmp_path / "base", tmp_path / "merged")


def test_unwritable_change_is_refused(tmp_path: Path) -> None:
    from tunekit.model.storage.rewrite import Changes

    base = write_base(tmp_path / "base", "llama")
    rewriter = Rewriter(ModelSection(name_or_path=str(base), dtype="float32"), "full")
    (tmp_path / "out").mkdir()
    missing = Changes(layers={"model.layers.0.nowhere": lambda weight, bias: (weight, bias)}, parameters={})
    with pytest.raises(ModelError, match="nowhere"):
        rewriter.write(tmp_path / "out", missing)
    new_bias = Changes(
        layers={"model.layers.0.self_attn.q_proj": lambda weight, _: (weight, weight[:, 0])}, parameters={}
    )
    with pytest.raises(ModelError, match="bias"):
        rewriter.write(tmp_path / "out", new_bias)


def test_an_enlarged_vocabulary_is_stated_where_the_base_states_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.model.storage.rewrite import Changes

    base = write_base(tmp_path / "base", "llama")
    rewriter, enlarged = Rewriter(ModelSection(name_or_path=str(base)), "full"), Changes({}, {}, vocabulary_size=272)
    assert rewriter.configuration(enlarged)["vocab_size"] == 272
    multimodal = {"text_config": {"vocab_size": 270}}  # as that of Gemma 3 with images
    monkeypatch.setattr("tunekit.model.storage.rewrite.inspection.read_config", lambda source: multimodal)
    assert rewriter.configuration(enlarged) == {"text_config": {"vocab_size": 272}}
    monkeypatch.setattr(rewriter, "unties", lambda changes: True)
    tied = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}  # as saved by transformers 4
    monkeypatch.setattr("tunekit.model.storage.rewrite.inspection.read_config", lambda source: tied)
    untied = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    assert rewriter.configuration(Changes({}, {})) == untied  # else transformers ties the merged head again


@pytest.mark.slow
def test_memory_is_bounded_by_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a base is rewritten, no more dense tensors are alive than a shard and the layer at hand."""
    from tunekit.model.storage import rewrite, shards
    from tunekit.model.storage.rewrite import Changes

    base = write_base(tmp_path / "base", "llama", num_hidden_layers=12)
    largest = 270 * 64 * 4
    rewriter = Rewriter(ModelSection(name_or_path=str(base), dtype="float32"), "full")
    monkeypatch.setattr(rewrite, "ShardWriter", lambda folder: shards.ShardWriter(folder, max_shard_bytes=2 * largest))
    peak = 0
    gc.collect()
    before = {id(thing) for thing in gc.get_objects()}

    def change(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal peak
        alive = [
            thing
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor and id(thing) not in before and not thing.is_meta
        ]
        peak = max(peak, sum(tensor.numel() * tensor.element_size() for tensor in alive))
        return weight, bias

    layers = [name for name, module in rewriter.net.named_modules() if isinstance(module, nn.Linear)]
    (tmp_path / "out").mkdir()
    rewriter.write(tmp_path / "out", Changes(layers=dict.fromkeys(layers, change), parameters={}))
    total = (base / "model.safetensors").stat().st_size
    assert total > 12 * largest
    assert 0 < peak < 5 * largest
    original = load_file(base / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        written |= load_file(path)
    assert set(written) == set(original)
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
