"""Text rows on composite models: the peak that plan predicts, and the parts that the device never holds."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.composite_case import SHAPES, write_composite
from tests.support.loop_case import DEVICE as CUDA
from tests.support.train_case import train, write_recipe
from tunekit.model.load import load_model
from tunekit.model.parts import parts_apart
from tunekit.planning.simulated.kernels import workspace_bytes
from tunekit.recipe.model import ModelSection

GRANULE = 512  # bytes, to which the allocator rounds
TEXT_CLASSES = ("qwen3_5", "gemma3", "mistral3", "llama4", "llava", "smolvlm")  # those of the same language model


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device has no fused kernel that holds less than all scores; plan is to foresee the kernel that runs."""
    monkeypatch.setenv("TUNEKIT_DEVICE", str(CUDA))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def allocated() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def peaks(place: Path, folder: Path, *overrides: str) -> tuple[int, int]:
    """The peak bytes of a run as predicted and as measured, without the workspaces of matrix products."""
    product = torch.ones(8, 8, device=CUDA, requires_grad=True) @ torch.ones(8, 8, device=CUDA)
    product.sum().backward()  # type: ignore[no-untyped-call]  # both threads' workspaces, which later tests find there
    del product
    before = allocated()
    training = {"epochs": None, "max_steps": 2, "gradient_accumulation_steps": 1, "micro_batch_size": 8}
    run = train(write_recipe(place, folder, rows=32, training=training, data={"eval": None}), *overrides)
    report = json.loads((run / "report.json").read_text())
    return report["predicted_bytes"]["cuda"] - workspace_bytes(CUDA), report["measured_bytes"]["cuda"] - before


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model_type", SHAPES)
def test_the_peak_is_foreseen(model_type: str, quantization: str, tmp_path: Path) -> None:
    folder = write_composite(model_type, tmp_path / "model")
    predicted, measured = peaks(tmp_path, folder, f"model.quantization={quantization}")
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("model_type", SHAPES)
def test_the_device_holds_the_language_model_alone(model_type: str, tmp_path: Path) -> None:
    folder, before = write_composite(model_type, tmp_path), allocated()
    base = load_model(ModelSection(name_or_path=str(folder), dtype="float32"), device=CUDA)
    storages = {tensor.untyped_storage() for tensor in [*base.net.parameters(), *base.net.buffers()]}
    sizes = {storage.data_ptr(): -(-storage.nbytes() // GRANULE) * GRANULE for storage in storages}
    assert allocated() - before == sum(sizes.values())
    parts = parts_apart(base.net).values()
    assert parts
    assert all(tensor.is_meta for part in parts for tensor in [*part.parameters(), *part.buffers()])


@pytest.mark.parametrize("model_type", TEXT_CLASSES)
def test_a_run_takes_as_much_as_one_of_the_language_model_alone(model_type: str, tmp_path: Path) -> None:
    """To the byte: nothing of the towers is on the device at any time."""
    folder = write_composite(model_type, tmp_path / "composite")
    whole = AutoConfig.from_pretrained(folder)
    config = whole.get_text_config()
    config.tie_word_embeddings = whole.tie_word_embeddings
    write_composite(model_type, tmp_path / "text")  # its tokenizer
    for file in (tmp_path / "text").glob("*.safetensors*"):
        file.unlink()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "text")
    both = [peaks(tmp_path / f"run-{kind}", tmp_path / kind) for kind in ("composite", "text")]
    assert both[0] == both[1]
