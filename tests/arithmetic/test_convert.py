"""`tunekit adapter convert`: starts that moved weights, against PEFT's own conversion; other methods by a rank."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.arithmetic.test_combine import CONFIG, TENSORS, edit, logits_by_peft, logits_here, write
from tests.support.peft_case import BASES, logits_of, move_from_start
from tests.test_cli import run
from tunekit.adapter import convert_verb
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import save_adapter_folder
from tunekit.arithmetic.lora_folder import read_lora_folder
from tunekit.errors import TunekitError
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.recipe.adapters.bitfit import BitfitSettings
from tunekit.recipe.adapters.delora import DeloraSettings
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.hra import HraSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lokr import LokrSettings
from tunekit.recipe.adapters.lora_fa import LoraFaSettings
from tunekit.recipe.adapters.miss import MissSettings
from tunekit.recipe.adapters.vblora import VbloraSettings
from tunekit.recipe.adapters.vera import VeraSettings

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """Folders of the bases, written when they are asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            BASES[family].make().save_pretrained(str(root / family))
            for file in tiny_llama.glob("*token*"):
                shutil.copy(file, root / family)
        return root / family

    return folder


def convert(folder: Path, output: Path, rank: int | None = None, initial: Path | None = None, base: Any = None) -> Path:
    names = [None if value is None else str(value) for value in (initial, base)]
    convert_verb(str(folder), rank, names[0], names[1], str(output))
    return output


def trained_by_peft(folder: Path, start: str, family: str = "llama", **values: Any) -> Tensor:
    """folder/initial and folder/trained of a start that moves weights; the trained model's logits."""
    base = BASES[family]
    values = {"r": 4, "lora_alpha": 6, "target_modules": list(base.attention), **values}
    config = peft.LoraConfig(init_lora_weights=start, task_type=base.task_type, **values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base.make(), config).eval()
        theirs.save_pretrained(str(folder / "initial"))
        move_from_start([p for p in theirs.parameters() if p.requires_grad], 0.1)
        theirs.save_pretrained(str(folder / "trained"))
        expected = logits_of(theirs, base).detach()
        theirs.save_pretrained(str(folder / "theirs"), path_initial_model_for_weight_conversion=str(folder / "initial"))
    fields = json.loads((folder / "trained" / CONFIG).read_text())  # saving the conversion rewrites the initial one's
    assert fields["init_lora_weights"] == start
    assert (expected - logits_of(base.make(), base)).abs().max() > 1e-2
    return expected


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_moved_weights_come_back_with_the_initial_adapter(
    start: str, family: str, use_rslora: bool, tmp_path: Path
) -> None:
    if start == "olora" and family == "gpt2":
        family = "bert"  # PEFT cannot start OLoRA on Conv1D
    expected = trained_by_peft(tmp_path, start, family, use_rslora=use_rslora)
    new = convert(tmp_path / "trained", tmp_path / "new", initial=tmp_path / "initial")
    torch.testing.assert_close(logits_here(new, family), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(logits_by_peft(new, family), expected, rtol=0, atol=5e-5)
    config = json.loads((new / CONFIG).read_text())
    assert (config["r"], config["init_lora_weights"], config["use_rslora"]) == (8, True, False)
    theirs, ours = load_file(tmp_path / "theirs" / TENSORS), load_file(new / TENSORS)
    assert theirs.keys() == ours.keys()
    if not use_rslora:
        assert config["lora_alpha"] == 12
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_start_is_computed_again_from_the_base(
    start: str, family: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if start == "olora" and family == "gpt2":
        family = "bert"
    expected = trained_by_peft(tmp_path, start, family)
    new = convert(tmp_path / "trained", tmp_path / "new", base=bases(family))
    torch.testing.assert_close(logits_here(new, family), expected, rtol=0, atol=5e-5)
    assert f"the initialisation {start} is recomputed from {bases(family)}" in capsys.readouterr().out


def test_ranks_by_pattern_are_doubled_each(tmp_path: Path) -> None:
    expected = trained_by_peft(tmp_path, "pissa", rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3})
    new = convert(tmp_path / "trained", tmp_path / "new", initial=tmp_path / "initial")
    torch.testing.assert_close(logits_here(new), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(logits_by_peft(new), expected, rtol=0, atol=5e-5)
    assert {update.rank for update in read_lora_folder(new).updates.values()} == {4, 8}


def test_a_doubled_rank_can_be_cut_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_by_peft(tmp_path, "pissa")
    whole = read_lora_folder(convert(tmp_path / "trained", tmp_path / "whole", initial=tmp_path / "initial")).updates
    capsys.readouterr()
    cut = read_lora_folder(convert(tmp_path / "trained", tmp_path / "cut", 5, tmp_path / "initial")).updates
    lost = sum(float(torch.linalg.svdvals(update.dense())[5:].square().sum()) for update in whole.values())
    energy = sum(float(update.dense().square().sum()) for update in whole.values())
    assert {update.rank for update in cut.values()} == {5}
    assert f"rank 5: error {(lost / energy) ** 0.5:.2%} of the norm" in capsys.readouterr().out


def test_what_is_needed_is_said(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    trained_by_peft(tmp_path, "pissa")
    final, initial, new = tmp_path / "trained", tmp_path / "initial", tmp_path / "new"
    with pytest.raises(TunekitError, match=r"give --initial DIR.*or give --base MODEL"):
        convert(final, new)
    for start in ("corda", "lora_ga", "pissa_niter_16"):
        edit(final, init_lora_weights=start)
        with pytest.raises(
            TunekitError, match=f"the initialisation {start} moved .* cannot be recomputed; give --initial"
        ):
            convert(final, new, base=bases("llama"))
    convert(final, tmp_path / "with_initial", initial=initial)
    edit(final, init_lora_weights="loftq")
    with pytest.raises(TunekitError, match="LoftQ starts from a quantized base"):
        convert(final, new)
    edit(final, init_lora_weights="pissa")
    with pytest.raises(TunekitError, match=r"k_proj' has the shape .16, 32., but .64, 64. in the base"):
        convert(final, new, base=wider(tmp_path / "wider"))
    with pytest.raises(TunekitError, match=r"adapts 'model\.layers\.0\.self_attn\.k_proj', which .* does not have"):
        convert(final, new, base=bases("gpt2"))
    edit(initial, lora_alpha=7)
    with pytest.raises(TunekitError, match="shape, rank or scaling differs"):
        convert(final, new, initial=initial)
    edit(initial, lora_alpha=6)
    tensors = load_file(initial / TENSORS)
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}, initial / TENSORS)
    with pytest.raises(TunekitError, match="every B is zero"):
        convert(final, new, initial=initial)
    assert not new.exists()


def wider(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("alpha", [6, 5])
def test_rslora_becomes_plain_exactly(alpha: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1, alpha=alpha, use_rslora=True, rank_pattern={"v_proj": 3})
    new = convert(folder, tmp_path / "new")
    torch.testing.assert_close(logits_here(new), logits_here(folder), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_by_peft(new), logits_here(folder), rtol=0, atol=1e-5)
    assert json.loads((new / CONFIG).read_text())["use_rslora"] is False


@pytest.mark.parametrize("ids", [(7, 3), {"embed_tokens": (7, 3)}])
def test_rows_of_tokens_keep_their_order(ids: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1, use_rslora=True, trainable_token_indices=ids)
    new = convert(folder, tmp_path / "new")
    torch.testing.assert_close(logits_by_peft(new), logits_by_peft(folder), rtol=0, atol=1e-5)


def test_rslora_of_a_square_rank_keeps_its_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1, alpha=6, use_rslora=True)  # 6 / 2 = 12 / 4
    new = convert(folder, tmp_path / "new")
    assert json.loads((new / CONFIG).read_text())["lora_alpha"] == 12
    old, now = load_file(folder / TENSORS), load_file(new / TENSORS)
    assert all(torch.equal(old[key], now[key]) for key in old)


def trained(folder: Path, family: str, settings: Any, base_name: str) -> Path:
    base = BASES[family]
    attached = attach_adapter(base.make(), settings, seed=1, head_name=base.head_name)
    move_from_start(attached.trained().values(), 0.1)
    save_adapter_folder(
        attached, folder, base_name=base_name, base_fingerprint=None, revision=None, task_type=base.task_type
    )
    return folder


def test_lora_fa_is_lora(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", "llama", LoraFaSettings(r=4, alpha=6, target_modules=("q_proj",)), "org/base")
    new = convert(folder, tmp_path / "new")
    assert torch.equal(logits_here(new), logits_here(folder))
    assert json.loads((new / "tunekit.json").read_text())["settings"]["method"] == "lora"


FULL_RANK: dict[str, tuple[str, Any]] = {  # method -> family, settings; the layers have at most 32 ranks
    "loha": ("llama", LohaSettings(r=4, target_modules=("q_proj", "v_proj"))),
    "lokr": ("llama", LokrSettings(r=4, target_modules=("q_proj", "v_proj"))),
    "dora": ("gpt2", DoraSettings(r=4, target_modules=("c_attn",), modules_to_save=("ln_f",), bias="all")),
    "dora-embedding": ("llama", DoraSettings(r=4, target_modules=("embed_tokens", "q_proj"))),
    "ia3": ("gpt2", Ia3Settings(target_modules=("c_attn",), feedforward_modules=None)),
    "miss": ("bert", MissSettings(r=4, target_modules=("query", "value"))),
    "vera": ("llama", VeraSettings(r=4, target_modules=("q_proj", "o_proj"))),
}


LOW_RANK: dict[str, tuple[str, Any, int]] = {  # method -> family, settings, rank of the plain form
    "adalora": ("llama", AdaloraSettings(init_r=6, target_r=4, target_modules=("q_proj", "v_proj")), 6),
    "delora": ("llama", DeloraSettings(r=4, delora_lambda=3, target_modules=("q_proj",)), 4),
    "hra": ("llama", HraSettings(r=4, target_modules=("q_proj", "v_proj")), 4),
    "miss": ("bert", MissSettings(r=5, target_modules=("query", "value")), 5),
    "miss-mini": ("llama", MissSettings(r=4, variant="mini", mini_r=4, target_modules=("q_proj",)), 4),
    "vblora": ("llama", VbloraSettings(r=3, num_vectors=9, vector_length=4, target_modules=("q_proj", "v_proj")), 3),
    "vera": ("llama", VeraSettings(r=4, target_modules=("q_proj", "o_proj")), 4),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_in_another_spelling_is_written_out_exactly(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT computes the same from both folders."""
    family, settings, rank = LOW_RANK[name]
    folder = trained(tmp_path / "a", family, settings, str(bases(family)))
    new = convert(folder, tmp_path / "new")
    assert {update.rank for update in read_lora_folder(new).updates.values()} == {rank}
    expected = logits_by_peft(folder, family)
    assert (expected - logits_of(BASES[family].make(), BASES[family])).abs().max() > 1e-2
    torch.testing.assert_close(logits_by_peft(new, family), expected, rtol=0, atol=2e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FULL_RANK)
def test_another_method_at_full_rank_computes_the_same(
    name: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, settings = FULL_RANK[name]
    folder = trained(tmp_path / "a", family, settings, str(bases(family)))
    new = convert(folder, tmp_path / "new", 32)
    expected = logits_here(folder, family)
    assert (expected - logits_of(BASES[family].make(), BASES[family])).abs().max() > 1e-2
    torch.testing.assert_close(logits_here(new, family), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_by_peft(new, family), expected, rtol=0, atol=1e-4)
    assert "100.00% of the energy kept" in capsys.readouterr().out


def test_a_low_rank_is_the_best_one_and_its_error_is_told(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LohaSettings(r=4, target_modules=("q_proj", "v_proj"))
    folder = trained(tmp_path / "a", "llama", settings, str(bases("llama")))
    words = ["adapter", "convert", str(folder), "--rank", "3", "--output", str(tmp_path / "new")]
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    attached = attach_adapter(BASES["llama"].make(), settings, seed=1, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.1)
    lost = energy = 0.0
    for layer in attached.layers.values():
        delta, _ = layer.merged(torch.zeros(layer.target.out_features, layer.target.in_features), None)
        values = torch.linalg.svdvals(delta.detach())
        lost, energy = lost + float(values[3:].square().sum()), energy + float(values.square().sum())
    assert f"rank 3: error {(lost / energy) ** 0.5:.2%} of the norm of all updates" in out
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["r"] == 3


def test_a_quantized_base_is_seen_as_it_was(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """HiRA multiplies W itself: its update of the packed matrix is not that of the stored one."""
    from tunekit.adapters.folder.config import read_adapter_config
    from tunekit.arithmetic.on_base import attach_to_base
    from tunekit.model.quantized.weights import pack_linear, weight_of
    from tunekit.targets.target import base_section

    net = BASES["llama"].make()
    folder = trained(
        tmp_path / "a", "llama", Ia3Settings(target_modules=("q_proj",), feedforward_modules=None), str(bases("llama"))
    )
    facts = json.loads((folder / "tunekit.json").read_text())
    facts["base"] |= {"quantization": "nf4", "double_quantization": True, "dtype": "float32"}
    (folder / "tunekit.json").write_text(json.dumps(facts))
    _, rewriter = attach_to_base(folder, base_section(read_adapter_config(folder), {}, ""))
    name = "model.layers.0.self_attn.q_proj"
    packed = weight_of(pack_linear(net.get_submodule(name), "nf4", True, torch.float32))
    assert packed is not None
    assert torch.equal(rewriter.trained_on(name)[0], packed.read())
    assert not torch.equal(rewriter.trained_on(name)[0], net.get_submodule(name).weight)


def test_what_no_lora_can_do_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    loha = trained(tmp_path / "a", "llama", LohaSettings(r=4, target_modules=("q_proj",)), str(bases("llama")))
    with pytest.raises(TunekitError, match=r"loha adapter cannot be converted to LoRA exactly; merge it, .* --rank R"):
        convert(loha, tmp_path / "new")
    with pytest.raises(TunekitError, match="has no effect on a loha adapter"):
        convert(loha, tmp_path / "new", 4, initial=loha)
    with pytest.raises(TunekitError, match="rank must be at least 1"):
        convert(loha, tmp_path / "new", 0)
    edit(loha, base_model_name_or_path="../gone")
    with pytest.raises(TunekitError, match=r"belongs to ../gone, which was not found; name it with --base"):
        convert(loha, tmp_path / "new", 4)
    biases = trained(tmp_path / "b", "gpt2", BitfitSettings(), str(bases("gpt2")))
    with pytest.raises(TunekitError, match="only whole modules, but a LoRA only changes layers"):
        convert(biases, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_rows_that_enlarge_the_vocabulary_are_not_dropped(bases: Callable[[str], Path], tmp_path: Path) -> None:
    net = BASES["llama"].make()
    net.resize_token_embeddings(net.config.vocab_size + 2)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(net, config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    with pytest.raises(TunekitError, match=r"adds rows to lm_head and model\.embed_tokens, .*; merge it instead"):
        convert(tmp_path / "a", tmp_path / "new", 4, base=bases("llama"))


def test_the_net_of_a_test_is_what_its_folder_holds(bases: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    read: nn.Module = AutoModelForCausalLM.from_pretrained(str(bases("llama")), dtype=torch.float32)
    assert torch.equal(logits_of(read.eval(), BASES["llama"]), logits_of(BASES["llama"].make(), BASES["llama"]))
