"""Encoder-decoders layer by layer against all at once: bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.architectures.tiny import model_types
from tests.support.data_case import objective_of, source_row
from tests.support.loop_case import CPU
from tests.support.peft_case import move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.contracts import Row, StepBatches
from tunekit.memory.blobs import frozen_tensors
from tunekit.memory.offload import prepare_layers
from tunekit.memory.streaming import host_embedding, make_slots, stream_layers
from tunekit.model.families.seq2seq import FAMILY
from tunekit.model.families.stages import PROVEN
from tunekit.model.load import load_model
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.reading.names import settings_class
from tunekit.training.engine import StepWork
from tunekit.training.streaming import make_engine
from tunekit.tuned.model import TunedModel

LAYERS, VOCABULARY = 3, 97
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"d_model": 32, "max_position_embeddings": 64, "init_std": 0.1, "scale_embedding": True} | {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in {"layers": LAYERS, "attention_heads": 4, "ffn_dim": 48, "layerdrop": 0.0}.items()
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-v1.1": ("t5", {**T5, **V1_1, "num_decoder_layers": LAYERS - 1}),
    "mt5": ("mt5", T5),
    **{name: (name, BART) for name in ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot")},
}


def make_net(name: str, **changes: Any) -> nn.Module:
    """Random, large enough for a missing bias or norm to show; biases and norms are not what they start as."""
    kind, sizes = NETS[name]
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    net = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **{**sizes, **ids, **changes}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name, each written when it is first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            make_net(name).save_pretrained(self[name])  # type: ignore[operator]
            return self[name]

    return Folders()


def make_window(step: int) -> StepBatches:
    """Three micro-batches of two rows each, padded in source and answer."""
    generator = np.random.default_rng(step)
    batches = []
    for number in range(3):
        rows = [answer_row(generator, 7 + number, 5 + number), answer_row(generator, 4 + number, 3)]
        batches.append(objective_of(Seq2seqSettings()).rows.collate([[row] for row in rows]))
    return StepBatches(step, 0.0, (0, 1, 2), tuple(batches))


def answer_row(generator: np.random.Generator, source: int, answer: int) -> Row:
    """So many tokens, with the 0 between them with which these nets' answers begin."""
    ids = generator.integers(3, VOCABULARY, source + 1 + answer)
    ids[source] = 0
    return source_row(ids[:source], ids[source:], "rows:1")


@dataclass
class Run:
    """What two steps left: losses, and each trained tensor's gradients."""

    model: TunedModel
    losses: list[Tensor]
    gradients: dict[str, list[Tensor]]


def tune(
    folder: Path, settings: Any, streaming: dict[str, Any] | None, quantization: str = "none"
) -> tuple[TunedModel, int]:
    """A base with an adapter that is not as it starts, and the micro-batches of a pass."""
    section = ModelSection(name_or_path=str(folder), dtype="float32", quantization=quantization)
    base = load_model(section, device=CPU)
    layers = [layer for _, layer in base.family.layers(base.net)]
    weights = [frozen_tensors(layer) for layer in layers]
    adapter = attach_adapter(base.net, settings, seed=1, head_name=base.family.head_name(base.net))
    move_from_start(adapter.trained().values(), 0.1)
    prepare_layers(layers, 0)
    if streaming is None:
        return TunedModel(base, adapter), 1
    chosen = dict(streaming)
    pass_size = chosen.pop("pass_size", 99)
    slots = make_slots(weights, CPU, tier="host", poison=True, **chosen)
    stream_layers(layers, slots)
    return TunedModel(base, adapter, slots=slots), pass_size


def run(folder: Path, settings: Any, streaming: dict[str, Any] | None, quantization: str = "none") -> Run:
    """Two steps of plain gradient descent, dropout as the base says."""
    tuned, pass_size = tune(folder, settings, streaming, quantization)
    assert tuned.adapter is not None
    trained, objective = tuned.adapter.trained(), objective_of(Seq2seqSettings())
    losses, gradients = [], {name: list[Tensor]() for name in trained}
    with tuned.training_mode(True):
        for step in range(2):
            step = make_window(step)
            units = torch.stack([objective.loss.units(batch) for batch in step.batches]).sum(0)
            work = StepWork(tuned, objective, step, units, 5, micro_batches=3, micro_batches_per_pass=pass_size)
            [result] = make_engine(tuned).run([work])
            losses.append(result.checked().total)
            for name, parameter in trained.items():
                assert parameter.grad is not None, name
                gradients[name].append(parameter.grad.clone())
                with torch.no_grad():
                    parameter.sub_(parameter.grad * 0.1)
                parameter.grad = None
    return Run(tuned, losses, gradients)


def adapter_of(method: str, **values: Any) -> Any:
    return settings_class("adapters", method).model_validate({"method": method, **values})


def both(folder: Path, settings: Any, quantization: str = "none", **streaming: Any) -> tuple[Run, Run]:
    plain, streamed = (run(folder, settings, each, quantization) for each in (None, streaming))
    assert any(gradient.abs().max() > 0 for each in plain.gradients.values() for gradient in each)
    return plain, streamed


def assert_same(plain: Run, streamed: Run) -> None:
    """Bit for bit."""
    assert all(map(torch.equal, plain.losses, streamed.losses))
    for name, gradients in plain.gradients.items():
        for ours, theirs in zip(gradients, streamed.gradients[name], strict=True):
            assert torch.equal(ours, theirs), f"{name}: {(ours - theirs).abs().max()}"


def test_every_proven_family_is_tested() -> None:
    elsewhere = {"whisper", "moonshine"}  # tests/objectives/test_speech.py, test_moonshine.py
    elsewhere |= {"qwen2_5_vl_text", "qwen3_vl_text"}  # tests/runs/test_composite_runs.py
    elsewhere |= {"qwen2_vl_text", "glm4v_text"}  # tests/runs/test_image_text_runs.py
    kinds = {kind for kind, _ in NETS.values()}
    assert kinds == PROVEN - (model_types().keys() - kinds) - elsewhere


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NETS)
def test_every_family_trains_alike(folders: dict[str, Path], name: str) -> None:
    """The bases' dropout of 0.1 and the adapter's included."""
    settings = adapter_of("lora", r=4, dropout=0.1, target_modules="all-linear")
    assert_same(*both(folders[name], settings, pass_size=2))


ENDS = r"(SelfAttention|EncDecAttention)\.(q|k|v|o)|(self_attn|encoder_attn)\.(q|k|v)_proj"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # on T5, v1.1 and BART
    "decoder": ("lora", {"r": 4, "target_modules": rf"(model\.)?decoder\..*\.({ENDS})"}),
    "encoder": ("lora", {"r": 4, "target_modules": rf"(model\.)?encoder\..*\.({ENDS})"}),
    "ia3": ("ia3", {}),
    "norms": ("ln_tuning", {}),  # those after the layers, too
    "quantities": ("adalora", {"init_r": 6, "target_r": 4, "tinit": 0, "tfinal": 1, "orth_reg_weight": 0.5}),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("what", METHODS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_methods_train_alike(folders: dict[str, Path], name: str, what: str) -> None:
    method, values = METHODS[what]
    assert_same(*both(folders[name], adapter_of(method, **values), pass_size=2))


OUTSIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "embeddings": ("t5", "lora", {"r": 4, "target_modules": ["embed_tokens", "q", "v"]}),
    "a prompt": ("t5", "prompt", {"num_virtual_tokens": 3, "init": "random"}),
    "a computed prompt": ("bart", "p_tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "a prefix": ("bart", "prefix", {"num_virtual_tokens": 3, "init": "random"}),
    "position biases": ("t5", "lora", {"r": 4, "target_modules": ["relative_attention_bias", "q"]}),
    "position biases alone": ("mt5", "lora", {"r": 4, "target_modules": ["relative_attention_bias"]}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", OUTSIDE)
def test_what_lies_outside_the_layers_or_acts_on_several_trains_alike(folders: dict[str, Path], what: str) -> None:
    """T5's position biases belong to the first layer of each stack, and every layer reads them."""
    name, method, values = OUTSIDE[what]
    assert_same(*both(folders[name], adapter_of(method, **values), pass_size=2))


def test_rows_that_embed_source_and_answer_are_summed_in_another_order(folders: dict[str, Path]) -> None:
    """Of all micro-batches first the answers, then the sources, where one graph sums each micro-batch's."""
    settings = adapter_of("lora", r=4, target_modules=["q_proj"], trainable_token_indices=[3, 7, 40, 90])
    plain, streamed = both(folders["bart"], settings)
    for name, gradients in plain.gradients.items():
        torch.testing.assert_close(gradients, streamed.gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8_weight_only"])
def test_quantized_bases_train_alike(folders: dict[str, Path], quantization: str) -> None:
    settings = adapter_of("lora", r=4, target_modules="all-linear")
    assert_same(*both(folders["t5-v1.1"], settings, quantization))


def test_nothing_is_computed_again_below_the_lowest_trained_layer(folders: dict[str, Path]) -> None:
    """Of six layers; in the second step the first is still to be brought in, and what trains is there at the turn."""
    settings = adapter_of("lora", r=4, target_modules=r"decoder\.block\.[12]\..*\.q")
    streamed = run(folders["t5"], settings, {})
    assert streamed.model.slots is not None
    # forward 6; back through 5 and 4, which are there; layer 0 for the next step, whose forward brings five more
    assert streamed.model.slots.copies == 2 * (2 * LAYERS + 1) - 1
    assert_same(run(folders["t5"], settings, None), streamed)


def test_evaluation_finds_each_layer_in_its_slot(folders: dict[str, Path]) -> None:
    settings = adapter_of("lora", r=4, target_modules="all-linear")
    inputs = make_window(0).batches[0].inputs
    found = []
    for streaming in (None, {}):
        tuned, _ = tune(folders["bart"], settings, streaming)
        with torch.no_grad(), tuned.training_mode(False):
            found.append(tuned.hidden(inputs))
    assert torch.equal(*found)


def test_the_tables_of_two_stacks_stay_on_a_gpu(tmp_path: Path) -> None:
    """Each stack looks up in a module of its own, and none of them is the one that the net names."""
    make_net("bart", tie_word_embeddings=False).save_pretrained(tmp_path)  # type: ignore[operator]
    base = load_model(ModelSection(name_or_path=str(tmp_path), dtype="float32"), device=CPU)
    assert not base.family.tied(base.net)
    assert host_embedding(replace(base, device=torch.device("cuda"))) is None


@pytest.mark.parametrize("setting", ["encoder_layerdrop", "decoder_layerdrop"])
def test_layers_left_out_at_random_are_not_cut(setting: str) -> None:
    family = FAMILY
    assert family.stages(make_net("bart")) is not None
    assert family.stages(make_net("bart", **{setting: 0.1})) is None
