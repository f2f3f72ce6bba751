"""`tunekit adapter diff`: adapters and models against each other, and the LoRA of what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tunekit.arithmetic.difference
from tests.arithmetic.test_combine import CONFIG, logits_by_peft, logits_here, write
from tests.arithmetic.test_convert import bases as bases  # a fixture
from tests.arithmetic.test_convert import trained
from tests.support.peft_case import BASES, logits_of, move_from_start
from tests.test_cli import run
from tunekit.adapter import diff_verb
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.arithmetic.difference import compare
from tunekit.arithmetic.low_rank import LowRank
from tunekit.arithmetic.merge import merge
from tunekit.data.rows import load_evaluation_rows
from tunekit.errors import TunekitError
from tunekit.evaluation.evaluator import adapter_losses
from tunekit.machine.devices import make_devices
from tunekit.model.load import load_model
from tunekit.model.storage.builtin import write_tiny_llama
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.prompt import PromptSettings
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.targets.target import find_target

MODEL = "model.safetensors"


def diff(left: Any, right: Any, tmp_path: Path, rank: int | None = None, base: Any = None) -> dict[str, dict[str, Any]]:
    """Call the verb; its differences by name."""
    place = None if rank is None else str(tmp_path / "new")
    diff_verb(str(left), str(right), rank, None, None if base is None else str(base), str(tmp_path / "out.json"), place)
    return {entry["name"]: entry for entry in json.loads((tmp_path / "out.json").read_text())}


def deltas(folder: Path, family: str = "llama") -> dict[str, Tensor]:
    """Each layer's change of the base's matrix, by the layer itself."""
    base = BASES[family]
    attached = attach_adapter_folder(base.make(), folder, head_name=base.head_name)
    found = {}
    for name, layer in attached.layers.items():
        weight = layer.base_layer.weight.detach()
        weight = weight.t() if layer.target.kind == "conv1d" else weight
        found[name] = layer.merged(weight, None)[0].detach() - weight
    return found


def check_numbers(entry: dict[str, Any], one: Tensor, two: Tensor) -> None:
    assert entry["left"] == pytest.approx(float(one.norm()), rel=1e-4)
    assert entry["right"] == pytest.approx(float(two.norm()), rel=1e-4)
    assert entry["distance"] == pytest.approx(float((two - one).norm()), rel=1e-4)
    cosine = torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)
    assert entry["cosine"] == pytest.approx(float(cosine), abs=1e-4)


def test_two_loras_are_compared_without_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", 1, target_modules=("q_proj", "v_proj"))
    b = write(tmp_path / "b", 2, r=3, use_rslora=True, target_modules=("q_proj", "k_proj"))
    told, one, two = diff(a, b, tmp_path), deltas(a), deltas(b)
    assert told.keys() == one.keys() | two.keys()
    for name in one.keys() & two.keys():
        check_numbers(told[name], one[name], two[name])
    lonely = told["model.layers.0.self_attn.v_proj"]
    assert lonely.keys() == {"name", "left"}  # what cannot be compared is absent
    assert "6 updates of layers: 0 equal, 6 different" in capsys.readouterr().out


def test_an_adapter_is_equal_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 1)
    assert {entry["distance"] for entry in diff(a, b, tmp_path).values()} == {0.0}
    assert "6 updates of layers: 6 equal, 0 different" in capsys.readouterr().out
    with pytest.raises(TunekitError, match="there is nothing to extract"):
        diff(a, b, tmp_path, rank=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_difference_of_two_loras_leads_from_one_to_the_other(family: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1, family), write(tmp_path / "b", 2, family, r=3)
    diff(a, b, tmp_path, rank=7)
    new, one, two = deltas(tmp_path / "new", family), deltas(a, family), deltas(b, family)
    for name in new:
        torch.testing.assert_close(new[name], two[name] - one[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_by_peft(tmp_path / "new", family), logits_here(tmp_path / "new", family))


def test_other_methods_are_compared_on_their_base(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LohaSettings(r=4, target_modules=("q_proj", "v_proj"))
    a = trained(tmp_path / "a", "llama", settings, str(bases("llama")))
    scales = Ia3Settings(target_modules=("q_proj",), feedforward_modules=None)
    b = trained(tmp_path / "b", "llama", scales, str(bases("llama")))
    told, one, two = diff(a, b, tmp_path, rank=32), deltas(a), deltas(b)
    for name in two:
        check_numbers(told[name], one[name], two[name])
    assert "rank 32: error 0.00%" in capsys.readouterr().out
    new = deltas(tmp_path / "new")
    for name in new:
        torch.testing.assert_close(new[name], two.get(name, torch.zeros(())) - one[name], rtol=0, atol=1e-4)


def test_tensors_trained_whole_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / n, s, modules_to_save=("lm_head",)) for n, s in (("a", 1), ("b", 2)))
    told = diff(a, b, tmp_path, rank=8)
    key = "base_model.model.lm_head.weight"
    check_numbers(told[key], *(load_file(f / "adapter_model.safetensors")[key] for f in (a, b)))
    assert f"1 tensors that differ are left out, because a LoRA cannot change them: {key}" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["modules_to_save"] is None


def merged(folder: Path, base: Path, settings: Any, family: str = "llama") -> Path:
    """A model folder with an adapter merged into it."""
    trained(folder.with_name(folder.name + "-adapter"), family, settings, str(base))
    net = BASES[family].make()
    attached = attach_adapter_folder(net, folder.with_name(folder.name + "-adapter"), head_name="lm_head")
    changes = {name: layer.merged(layer.base_layer.weight.detach(), None)[0] for name, layer in attached.layers.items()}
    attached.detach()
    with torch.no_grad():
        for name, matrix in changes.items():
            net.get_submodule(name).weight.copy_(matrix)
    net.save_pretrained(str(folder))
    return folder


def test_a_lora_comes_back_out_of_the_merged_model(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LoraSettings(r=4, alpha=6, target_modules=("q_proj", "down_proj"))
    model = merged(tmp_path / "model", bases("llama"), settings)
    told = diff(bases("llama"), model, tmp_path, rank=4)
    changed = {name for name, entry in told.items() if entry["distance"] != 0}
    assert changed == {f"{name}.weight" for name in deltas(tmp_path / "model-adapter")}
    new, old = deltas(tmp_path / "new"), deltas(tmp_path / "model-adapter")
    assert new.keys() == old.keys()
    for name in new:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-5)
    out = capsys.readouterr().out
    assert "rank 4: error 0.00% of the norm of all updates, 100.00% of the energy kept" in out
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    target = find_target(str(tmp_path / "new"), None, [])
    assert Path(target.model.name_or_path) == bases("llama").resolve()
    torch.testing.assert_close(logits_by_peft(tmp_path / "new"), logits_here(tmp_path / "new"), rtol=0, atol=1e-5)


def test_every_kind_of_layer_is_extracted_and_the_rest_is_told(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = BASES["gpt2"].make()
    with torch.no_grad():
        for name in ("transformer.wte", "transformer.h.1.attn.c_attn"):
            weight = net.get_submodule(name).weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        net.get_submodule("transformer.ln_f").weight.add_(0.5)
    net.save_pretrained(str(tmp_path / "model"))
    diff(bases("gpt2"), tmp_path / "model", tmp_path, rank=32)
    assert (
        "1 tensors that differ are left out, because a LoRA cannot change them: transformer.ln_f.weight"
        in capsys.readouterr().out
    )
    with torch.no_grad():
        net.get_submodule("transformer.ln_f").weight.sub_(0.5)
    expected = logits_of(net, BASES["gpt2"])  # the tied head has changed with its embedding
    torch.testing.assert_close(logits_here(tmp_path / "new", "gpt2"), expected, rtol=0, atol=1e-4)


def test_an_extracted_lora_can_be_merged(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """From folder to folder: A and the LoRA make B, through the merge of the command line."""
    base, other = tmp_path / "base", tmp_path / "other"
    for folder in (base, other):
        folder.mkdir()
        write_tiny_llama(folder)
    tensors = load_file(other / MODEL)
    names = [name for name in tensors if name.endswith(("q_proj.weight", "up_proj.weight"))]
    for name in names:
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
        tensors[name] = (tensors[name].float() + 0.05 * noise).to(tensors[name].dtype)
    save_file(tensors, other / MODEL, metadata={"format": "pt"})
    diff(base, other, tmp_path, rank=max(min(tensors[name].shape) for name in names))
    merge(find_target(str(tmp_path / "new"), None, []), tmp_path / "again")
    again = load_file(tmp_path / "again" / MODEL)
    for name in tensors:
        torch.testing.assert_close(again[name].float(), tensors[name].float(), rtol=0, atol=1e-5)


def test_models_of_other_shapes_are_compared_by_name(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(bases("llama") / MODEL)
    (tmp_path / "other").mkdir()
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["extra"] = tensors.pop("lm_head.weight")
    tensors["whole"] = torch.arange(3)
    save_file(tensors, tmp_path / "other" / MODEL)
    (tmp_path / "other" / "config.json").write_bytes((bases("llama") / "config.json").read_bytes())
    told = diff(bases("llama"), tmp_path / "other", tmp_path)
    assert {name for name, entry in told.items() if entry.get("distance") != 0} == {
        *("model.norm.weight", "lm_head.weight", "extra", "whole")
    }
    assert told["extra"].keys() == {"name", "right"}
    assert "distance" not in told["model.norm.weight"]


def test_sums_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunekit.arithmetic.difference, "PIECE", 7)
    torch.manual_seed(0)
    one, two = torch.randn(5, 9), torch.randn(5, 9)
    found = compare("x", one, two)
    check_numbers(found.__dict__, one, two)
    mixed = compare("x", LowRank(torch.randn(2, 9), torch.randn(5, 2), 1.0), two)
    assert mixed.distance is not None
    assert mixed.distance > 0


def test_what_is_no_pair_is_refused(
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2, fingerprint="g")
    cases: list[tuple[list[object], str]] = [
        ([a, bases("llama")], "is an adapter, the other is a model"),
        ([a, tmp_path / "none"], "there is no folder"),
        ([a, b], "was trained on a different base"),
        ([a, a, "--extract-rank", "4"], "needs a rank and a folder"),
        ([a, a, "--extract-rank", "0", "--output", tmp_path / "new"], "needs a rank and a folder"),
        ([a, a, "--output", tmp_path / "new"], "needs a rank and a folder"),
        ([bases("llama"), bases("llama"), "--data", "x.jsonl"], "needs two adapters of one base"),
        ([bases("llama"), tmp_path / "none"], "there is no folder"),
        ([bases("llama"), bases("llama"), "--extract-rank", "4", "--output", tmp_path / "new"], "nothing to extract"),
        ([bases("llama"), bases("gpt2"), "--extract-rank", "4", "--output", tmp_path / "new"], "different modules"),
        ([bases("llama"), bases("llama"), "--extract-rank", "4", "--output", bases("llama")], "overlaps"),
    ]
    for words, message in cases:
        assert run(monkeypatch, "adapter", "diff", *map(str, words)) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_losses_are_measured_over_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `tunekit eval` measures each by itself."""
    base = tmp_path / "base"
    base.mkdir()
    write_tiny_llama(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"}) + "\n" for n in range(5)))
    net = load_model(ModelSection(name_or_path=str(base)), device=torch.device("cpu"))
    kinds = {"a": LoraSettings(r=2, target_modules=("q_proj", "up_proj")), "b": PromptSettings(num_virtual_tokens=3)}
    expected = {}
    for name, settings in kinds.items():
        attached = attach_adapter(net.net, settings, seed=1, head_name="lm_head")
        move_from_start(attached.trained().values(), 0.3)
        save_adapter_folder(attached, tmp_path / name, base_name=str(base), base_fingerprint=None, revision=None)
        attached.detach()
    for target in (base, tmp_path / "a", tmp_path / "b"):
        json_file = str(tmp_path / "eval.json")
        assert run(monkeypatch, "eval", str(target), "--data", str(rows), "--json", json_file) == 0
        expected[target.name] = json.loads(Path(json_file).read_text())["loss"]
    assert len({round(loss, 3) for loss in expected.values()}) == 3
    second = tmp_path / "c"
    settings = LoraSettings(r=3, target_modules=("v_proj",))
    attached = attach_adapter(net.net, settings, seed=2, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.3)
    save_adapter_folder(attached, second, base_name=str(base), base_fingerprint=None, revision=None)
    attached.detach()
    capsys.readouterr()
    assert run(monkeypatch, "adapter", "diff", str(tmp_path / "a"), str(second), "--data", str(rows)) == 0
    out = capsys.readouterr().out
    # next to the name, or below it if the folder's path is long
    told = [float(loss) for loss in re.findall(r"^ *(?:the base|with )[^\n]*?\s+(\d+\.\d+) *$", out, re.MULTILINE)]
    assert told[:2] == pytest.approx([expected["base"], expected["a"]], rel=1e-3)
    assert len(told) == 3
    model = load_model(ModelSection(name_or_path=str(base)), device=torch.device("cpu"))
    adapters = AdapterSet(model.net)
    for name in ("a", "b"):
        adapters.add(name, partial(attach_adapter_folder, model.net, tmp_path / name, head_name="lm_head"))
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base)))
    section = DataSection(train=(Source(path=str(rows)),), eval=(Source(path=str(rows)),))
    objective = make_objective(SftSettings(), tokenizer)
    encoded = load_evaluation_rows(section, objective, seed=0).evaluation
    assert encoded is not None
    devices = make_devices()
    losses = adapter_losses(model, adapters, tokenizer, objective, encoded, devices, EvaluationSection())
    devices.close()
    assert losses == pytest.approx({None: expected["base"], "a": expected["a"], "b": expected["b"]}, rel=1e-5)
