"""The contract of prompt methods, on networks of every family: what goes in, what comes out, what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from tests.support.peft_case import BASES, IDS, Base, move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import slot_count
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.adapters.method import load_method
from tunekit.errors import AdapterError
from tunekit.model.call import Call, calling
from tunekit.recipe.adapters.cpt import CptSettings
from tunekit.recipe.adapters.multitask_prompt import MultitaskPromptSettings
from tunekit.recipe.adapters.p_tuning import PTuningSettings
from tunekit.recipe.adapters.prompt import PromptSettings
from tunekit.recipe.training import TrainingSection

LENGTH = 4
DECODERS = ("llama", "gpt2", "mixtral")
PROMPTS: dict[str, Any] = {
    "vocabulary": PromptSettings(num_virtual_tokens=LENGTH),
    "random": PromptSettings(num_virtual_tokens=LENGTH, init="random"),
    "text": PromptSettings(num_virtual_tokens=LENGTH, init="text", init_ids=(9, 8, 7)),
    "mlp": PTuningSettings(num_virtual_tokens=LENGTH, encoder_hidden_size=12),
    "lstm": PTuningSettings(num_virtual_tokens=LENGTH, encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
    "multitask": MultitaskPromptSettings(num_virtual_tokens=LENGTH, num_ranks=2),
    "cpt": CptSettings(token_ids=(5, 6, 7, 8), token_types=(1, 2, 3, 4)),
}
COMPUTED = ("mlp", "lstm", "cpt")  # folders hold what was computed, not what was trained
every = pytest.mark.parametrize("name", PROMPTS)
CELLS = [(name, family) for name in PROMPTS for family in BASES if name != "cpt" or family in DECODERS]


def attach(base: Base, name: str, seed: int = 1) -> AttachedAdapter:
    return attach_adapter(base.make(), PROMPTS[name], seed=seed, head_name=base.head_name)


def logits(attached: AttachedAdapter, inputs: dict[str, Tensor]) -> Tensor:
    net: Any = attached.net
    found: Tensor = attached.outputs(net(**attached.inputs(inputs)).logits)
    return found


def saved(attached: AttachedAdapter, folder: Path) -> Path:
    save_adapter_folder(attached, folder, base_name="org/base", base_fingerprint=None, revision=None)
    return folder


@every
def test_weight_decay_spares_all_but_an_encoders_matrices(name: str) -> None:
    groups = attach(BASES["llama"], name).groups(TrainingSection(weight_decay=0.1))
    decaying = {name for names, _, decays in groups if decays for name in names}
    matrices = {name for names, _, _ in groups for name in names if ".weight" in name and "embedding" not in name}
    assert decaying == matrices


@pytest.mark.sampled(14)
@pytest.mark.parametrize(("name", "family"), CELLS)
def test_contract(name: str, family: str, tmp_path: Path) -> None:
    base = BASES[family]
    net: Any = base.make().requires_grad_(False)  # torch has other kernels for weights with a gradient
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    plain: Tensor = net(**base.inputs).logits
    attached = attach_adapter(net, PROMPTS[name], seed=1, head_name=base.head_name)
    assert not attached.starts_as_identity()  # something stands before each row, whatever its values
    if name != "multitask":  # whose product of small factors starts near 0
        assert (logits(attached, base.inputs) - plain).abs().max() > 1e-3
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(attached, base.inputs), plain)
        assert attached.virtual_tokens == 0
    assert attached.virtual_tokens == LENGTH
    move_from_start(attached.trained().values(), 0.2)
    changed = logits(attached, base.inputs)
    assert changed.shape == plain.shape
    changed.square().sum().backward()
    trained = attached.trained()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert not [
        key for key, parameter in net.named_parameters() if parameter.requires_grad or parameter.grad is not None
    ]
    model = load_method(attached.settings.method).model
    assert model is not None
    counted = slot_count(model.slots(PROMPTS[name], net).values())  # what plan tells
    assert counted == sum(parameter.numel() for parameter in trained.values())

    folder = saved(attached, tmp_path / "a")
    read = attach_adapter_folder(base.make(), folder, head_name=base.head_name)
    assert all(torch.equal(read.file_tensors()[key], tensor) for key, tensor in attached.file_tensors().items())
    assert torch.equal(logits(read, base.inputs), changed)
    again = saved(read, tmp_path / "b")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()

    attached.detach()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@every
def test_the_start_depends_on_the_seed_alone(name: str) -> None:
    first, same, other = (attach(BASES["llama"], name, seed).state() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], tensor) for key, tensor in same.items())
    fixed = name in ("text", "cpt")
    assert all(torch.equal(first[key], tensor) for key, tensor in other.items()) is fixed


def test_where_vectors_start() -> None:
    net: Any = BASES["llama"].make()
    table = net.get_input_embeddings().weight
    text = attach(BASES["llama"], "text").state()["prompt_embeddings"]
    assert torch.equal(text, table[[9, 8, 7, 9]])  # repeated to the length
    sampled = attach(BASES["llama"], "vocabulary").state()["prompt_embeddings"]
    assert all(any(torch.equal(row, known) for known in table) for row in sampled)
    context = attach(BASES["llama"], "cpt")
    assert torch.equal(context.file_tensors()["prompt_embeddings"], table[[5, 6, 7, 8]])


def test_a_token_of_another_vocabulary_is_refused() -> None:
    settings = PromptSettings(num_virtual_tokens=2, init="text", init_ids=(3, 97))
    with pytest.raises(AdapterError, match="token id 97 is too large: this base has 97 tokens"):
        attach_adapter(BASES["llama"].make(), settings, seed=1, head_name="lm_head")


@every
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(name: str, family: str) -> None:
    """Positions count real tokens, and outputs are those of the row."""
    attached = attach(BASES[family], name)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(attached, {"input_ids": IDS, "attention_mask": mask, "position_ids": positions})
    alone = logits(attached, {"input_ids": IDS[:1, 5:]})
    torch.testing.assert_close(padded[0, 5:], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1], logits(attached, {"input_ids": IDS[1:]})[0], rtol=0, atol=1e-5)


def test_cpt_keeps_outputs_and_bounds_the_rest() -> None:
    attached = attach(BASES["llama"], "cpt")
    start = attached.file_tensors()["prompt_embeddings"]
    move_from_start(attached.trained().values(), 5.0)
    far = attached.trained()["delta_embedding.weight"].detach().clone()
    moved = attached.file_tensors()["prompt_embeddings"] - start
    bound = 0.1 * (32 / 2048) ** 0.5
    assert moved[:3].norm(dim=1) == pytest.approx([bound] * 3, rel=1e-4)
    assert moved[3].abs().max() < 1e-6
    attached.after_step(0, 2)
    near = attached.trained()["delta_embedding.weight"].detach()
    assert torch.allclose(near[:3] / near[:3].norm(dim=1, keepdim=True), far[:3] / far[:3].norm(dim=1, keepdim=True))
    assert near[:3].norm(dim=1) == pytest.approx([bound] * 3, rel=1e-4)


@every
def test_a_folder_is_continued_where_it_holds_what_was_trained(name: str, tmp_path: Path) -> None:
    first, second = attach(BASES["llama"], name, 1), attach(BASES["llama"], name, 2)
    move_from_start(first.trained().values(), 0.2)
    folder = saved(first, tmp_path / "a")
    if name in COMPUTED:
        with pytest.raises(AdapterError, match="contains only values computed from the trained tensors"):
            load_into(second, folder)
    else:
        load_into(second, folder)
        assert all(torch.equal(second.state()[key], tensor) for key, tensor in first.state().items())


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("vocabulary", "num_virtual_tokens", 10**9, "expected \\[1000000000, 32\\]"),
        ("vocabulary", "num_virtual_tokens", None, "num_virtual_tokens"),
        ("vocabulary", "num_transformer_submodules", 2, "expected \\[8, 32\\]"),
        ("vocabulary", "num_transformer_submodules", 3, "num_transformer_submodules"),
        ("multitask", "num_tasks", 10**9, "prefix_task_cols"),
        ("multitask", "num_ranks", 0, "num_ranks"),
        ("cpt", "cpt_token_ids", [5], "token_ids must have the same length as token_types"),
        ("cpt", "num_virtual_tokens", 3, "is 3, but there are 4 cpt_token_ids"),
        ("mlp", "peft_type", "PROMPT_TUNING", "encoder_"),
        ("mlp", "num_virtual_tokens", "4", "num_virtual_tokens"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_allocated(
    name: str, field: str, value: Any, message: str, tmp_path: Path
) -> None:
    folder = saved(attach(BASES["llama"], name), tmp_path / "a")
    (folder / "tunekit.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(AdapterError, match=message):
        attach_adapter_folder(BASES["llama"].make(), folder, head_name="lm_head")


def test_the_encoder_of_a_file_is_never_built(tmp_path: Path) -> None:
    """The widths of what made the vectors mean nothing for them, whatever they claim."""
    folder = saved(attach(BASES["llama"], "mlp"), tmp_path / "a")
    (folder / "tunekit.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_hidden_size": 10**9}))
    read = attach_adapter_folder(BASES["llama"].make(), folder, head_name="lm_head")
    assert list(read.state()) == ["prompt_embeddings"]


def test_a_classifier_that_looks_at_ids_is_refused_or_called_with_padding_on_the_left() -> None:
    config = BartConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32)
    with pytest.raises(AdapterError, match="needs token ids to find"):
        attach_adapter(BartForSequenceClassification(config), PROMPTS["random"], seed=1, head_name=None)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    net: Any = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0)).eval()
    attached = attach_adapter(net, PROMPTS["random"], seed=1, head_name="score")
    alone = net(**attached.inputs({"input_ids": IDS[:1, 5:]})).logits
    mask = torch.ones_like(IDS[:1])
    mask[:, :5] = 0
    padded = net(**attached.inputs({"input_ids": IDS[:1], "attention_mask": mask})).logits
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_lstm_dropout_is_off_outside_training() -> None:
    settings = PROMPTS["lstm"].model_copy(update={"encoder_dropout": 0.5})
    attached = attach_adapter(BASES["llama"].make(), settings, seed=1, head_name="lm_head")
    inputs = BASES["llama"].inputs
    assert torch.equal(logits(attached, inputs), logits(attached, inputs))
    attached.net.train()
    assert not torch.equal(logits(attached, inputs), logits(attached, inputs))
    torch.testing.assert_close(attached.file_tensors(), attached.file_tensors(), rtol=0, atol=0)
