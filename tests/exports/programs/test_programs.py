"""Programs that read model folders, beside torch, on a tiny random llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.programs import needs
from tunekit.errors import InputError
from tunekit.exports.compare import difference
from tunekit.exports.format import Difference
from tunekit.exports.programs import llama_cpp, mlx, transformers4, vllm
from tunekit.exports.programs.answer import NextTokens
from tunekit.exports.programs.program import Program, find_program
from tunekit.model.storage.portable import make_portable

ROWS = [[1, 5, 9, 17, 33, 90, 2, 7], [3, 4]]


def installed(name: str) -> Program:
    program = find_program(name)
    assert program is not None
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A llama with a base frequency that no program has as its default, and heads as large as vLLM wants them."""
    folder = tmp_path_factory.mktemp("llama")
    for file in tiny_llama.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def beside_torch(folder: Path, answers: list[NextTokens]) -> Difference:
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [net(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    return difference(ROWS, expected, answers)


class TestMLX:
    pytestmark = needs("mlx")

    def test_the_older_keys_make_it_equal(self, folder: Path) -> None:
        """mlx-lm does not read rope_parameters: without make_portable it computes something else."""
        wrong = beside_torch(folder, mlx.answers(installed("mlx"), folder, ROWS))
        make_portable(folder)
        right = beside_torch(folder, mlx.answers(installed("mlx"), folder, ROWS))
        assert wrong.largest > 0.01
        assert right.largest < 1e-4
        assert right.greedy_differences == 0


class TestTransformers4:
    pytestmark = needs("transformers4")

    def test_equal(self, folder: Path) -> None:
        make_portable(folder)
        result = beside_torch(folder, transformers4.answers(installed("transformers4"), folder, ROWS))
        assert result.largest < 1e-5


class TestVLLM:
    pytestmark = needs("vllm")

    def test_the_largest_log_probabilities(self, folder: Path) -> None:
        answers = vllm.answers(installed("vllm"), folder, ROWS)
        assert answers[0].values.shape == (8, 20)
        result = beside_torch(folder, answers)
        assert result.largest < 1e-4
        assert result.perplexity == pytest.approx(result.torch_perplexity, rel=1e-4)


class TestLlamaCpp:
    pytestmark = needs("llama.cpp")

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
        with pytest.raises(InputError, match=r"llama\.cpp .* ended with exit code 1: .*does not read .*model\.gguf"):
            llama_cpp.answers(installed("llama.cpp"), tmp_path / "model.gguf", ROWS)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (5, 8), (16, 16), (257, 320), (512, 512), (600, 600)])
def test_ranks_of_vllm(rank: int, allowed: int) -> None:
    assert vllm.max_lora_rank(rank) == allowed
