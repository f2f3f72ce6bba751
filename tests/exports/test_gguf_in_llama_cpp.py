"""GGUF files in llama.cpp: the bytes of its own quantizer, its tokens, and its log-probabilities beside torch's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import adapter_of, exportable
from tunekit.exports import gguf as format
from tunekit.exports.format import Evidence, Options
from tunekit.exports.llama_cpp.converter import imported
from tunekit.exports.llama_cpp.texts import sample_texts
from tunekit.exports.llama_cpp.types import FILE_TYPES
from tunekit.exports.programs.llama_cpp import tokens_of
from tunekit.exports.programs.program import Program, find_program
from tunekit.exports.questions import Questions, make_questions
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target

pytestmark = pytest.mark.slow
QUANTIZE = """
import sys
import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
C, LLAMA = get_ffi(), get_lib()
options = LLAMA.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), 1
if len(sys.argv) > 4:
    with np.load(sys.argv[4]) as arrays:
        kept = [(C.new("char[]", name.encode()), C.new("float[]", arrays[name].flatten().tolist())) for name in arrays]
    entries = C.new("struct llama_model_imatrix_data[]", len(kept) + 1)
    for entry, (name, values) in zip(entries, kept):
        entry.name, entry.data, entry.size = name, values, len(values)
    options.imatrix = entries
sys.exit(LLAMA.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), C.addressof(options)))
"""
TOKENIZE = """
import json, sys
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
C, LLAMA = get_ffi(), get_lib()
options = LLAMA.llama_model_default_params()
options.vocab_only = True
vocabulary = LLAMA.llama_model_get_vocab(LLAMA.llama_model_load_from_file(sys.argv[1].encode(), options))
ids = C.new("int32_t[]", 4096)
texts = [text.encode() for text in json.loads(sys.argv[2])]
print(json.dumps([list(ids[0:LLAMA.llama_tokenize(vocabulary, t, len(t), ids, 4096, False, True)]) for t in texts]))
"""
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, 1234567 digits, and\n\n\ttabs; naïve café 你好 🚀",
    "def add(first, second):\n    return first + second\n",
    "He said: 'I've been there, and we'll go.'",
]
EVIDENCE = Evidence(lambda count, tokens: ([[5, 9, 17, 33, 90]], "rows"), None, "model")


@pytest.fixture(scope="module")
def llama_cpp() -> Program:
    program = find_program("llama.cpp")
    if program is None:
        pytest.skip("llama.cpp is not installed: scripts/certify llama.cpp")
    return program


def run(program: Program, script: str, *arguments: str | Path) -> str:
    command = [str(program.python), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    with imported() as converter:
        reader = converter.gguf.GGUFReader(path)
        return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


def compare_with_quantizer(program: Program, base: Path, kind: str, folder: Path, imatrix: bool = False) -> int:
    """Export the base in a type, and compare it with what llama.cpp's quantizer makes of the float32 file.

    Returns how many tensors are quantized, all with equal bytes."""
    exact, theirs = folder / "exact.gguf", folder / f"{kind}-theirs.gguf"
    if not exact.exists():
        format.write(exportable(base), exact, EVIDENCE, Options(type="F32"))
    given: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        write_model = format.write_model

        def saved(converter: Any, model: Any, path: Path, file_type: str, weights: Any) -> Any:
            if weights is not None:
                np.savez(folder / "imatrix.npz", **weights)
                given.append(folder / "imatrix.npz")
            return write_model(converter, model, path, file_type, weights)

        patch.setattr(format, "write_model", saved)
        format.write(exportable(base), folder / f"{kind}.gguf", EVIDENCE, Options(type=kind, imatrix=imatrix))
    with imported() as converter:
        number = int(converter.gguf.LlamaFileType[f"MOSTLY_{kind}"])
    run(program, QUANTIZE, exact, theirs, str(number), *given)
    ours, expected = tensors_of(folder / f"{kind}.gguf"), tensors_of(theirs)
    assert {name: value[0] for name, value in ours.items()} == {name: value[0] for name, value in expected.items()}
    assert [name for name in ours if ours[name][1] != expected[name][1]] == []
    theirs.unlink()
    (folder / f"{kind}.gguf").unlink()
    return sum(value[0] not in ("F32", "F16", "BF16") for value in ours.values())


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},  # 4 query heads per key head
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 256, "n_layer": 8, "n_head": 4, "n_positions": 128},
    "falcon": {"num_key_value_heads": None, "ffn_hidden_size": 1024},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 256, "norm_topk_prob": True, "num_experts_per_tok": 2},
}


def make_base(kind: str, folder: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    shape = SHAPES[kind] if kind == "gpt2" else {**sizes, **SHAPES[kind]}
    return write_base(folder / "base", kind, **shape)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_type_has_the_bytes_of_llama_cpp_s_quantizer(llama_cpp: Program, kind: str, tmp_path: Path) -> None:
    base = make_base(kind, tmp_path)
    left_out = ("F32", "NVFP4", "Q1_0", *("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"))  # the last ones are slow
    types = [name for name in FILE_TYPES if name not in left_out]
    for name in types if kind == "llama" else ("Q4_K_M", "Q3_K_M", "Q4_K_S", "Q8_0"):
        needed = name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
        count = compare_with_quantizer(llama_cpp, base, name, tmp_path, imatrix=needed)
        assert count >= 9 or name in ("F16", "BF16")


def test_rows_of_other_lengths_fall_back_as_in_llama_cpp(llama_cpp: Program, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", intermediate_size=256)
    for name in ("Q4_K_M", "Q3_K_L", "Q5_K_S", "Q6_K", "IQ4_XS"):
        compare_with_quantizer(llama_cpp, base, name, tmp_path)


def test_an_importance_matrix_gives_the_bytes_of_llama_cpp(llama_cpp: Program, tmp_path: Path) -> None:
    for kind in ("llama", "gpt2", "qwen3_moe"):
        (tmp_path / kind).mkdir()
        base = make_base(kind, tmp_path / kind)
        for name in ("Q4_K_M", "IQ4_XS", "Q4_0"):
            compare_with_quantizer(llama_cpp, base, name, tmp_path / kind, imatrix=True)


def test_smollm2_has_the_bytes_of_llama_cpp_s_quantizer(llama_cpp: Program, smollm2: Path, tmp_path: Path) -> None:
    assert compare_with_quantizer(llama_cpp, smollm2, "Q4_K_M", tmp_path) == 211


@pytest.mark.parametrize("name", ["stories", "smollm2"])
def test_texts_become_the_same_tokens(
    llama_cpp: Program, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(name)
    exported = make_exportable(find_target(str(base), None, []))
    format.write(exported, tmp_path / "model.gguf", EVIDENCE, Options(type="F16"))
    found = json.loads(run(llama_cpp, TOKENIZE, tmp_path / "model.gguf", json.dumps(TEXTS)))
    assert exported.processor.tokenizer is not None
    assert found == [exported.processor.tokenizer.encode(text) for text in TEXTS]


def rounding_of_torch(base: Path, adapter: Path, questions: Questions) -> float:
    """The largest distance of torch's float32 log-probabilities from float64."""
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    net = PeftModel.from_pretrained(net, adapter).double().eval()
    with torch.no_grad():
        exact = [net(torch.tensor([row])).logits[0].log_softmax(-1) for row in questions.rows]
    return max(float((a - b).abs().max()) for a, b in zip(exact, questions.expected, strict=True))


@pytest.mark.parametrize("name", ["stories", "smollm2"])
def test_added_tokens_are_found_in_the_same_places(
    llama_cpp: Program, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """New tokens, and tokens of the vocabulary that became added ones, as plain text and in a conversation."""
    base = shutil.copytree(request.getfixturevalue(name), tmp_path / "base", copy_function=shutil.copyfile)
    base.chmod(0o755)
    tokenizer = json.loads((base / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    inside = next(token for token, number in vocabulary.items() if number > 300 and token.isalpha() and len(token) > 2)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": vocabulary[inside], "content": inside, **flags})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    exported = make_exportable(find_target(str(base), None, []))
    written = format.write(exported, tmp_path / "model.gguf", EVIDENCE, Options(type="F16"))
    texts = [f"{inside} and {inside}{inside}.", *sample_texts(exported)]
    tokenizer_ids = [exported.processor.tokenizer.native(text)["input_ids"] for text in texts]  # type: ignore[union-attr]
    assert tokens_of(llama_cpp, written.path, texts) == tokenizer_ids


EXPERTS = {"target_modules": ("q_proj",), "target_parameters": ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize("kind", SHAPES)
def test_llama_cpp_computes_what_torch_does(llama_cpp: Program, kind: str, tmp_path: Path) -> None:
    """Of a base, with a GGUF adapter, and merged; llama.cpp rounds GELU to 16 bits. Some positions of these random nets
    amplify rounding: there torch's own float32 is as far from float64."""
    base = make_base(kind, tmp_path)
    settings = EXPERTS if "experts" in " ".join(SHAPES[kind]) else {"use_rslora": True}
    tolerance = 1e-2 if kind in ("gpt2", "gemma3_text", "falcon") else 2e-4
    adapter = exportable(adapter_of(base, tmp_path / "adapter", **settings))
    questions = make_questions(adapter, with_base=True)
    assert questions.base is not None
    effect = max(float((a - b).abs().max()) for a, b in zip(questions.base, questions.expected, strict=True))
    assert effect > 100 * tolerance
    bound = tolerance + 2 * rounding_of_torch(base, tmp_path / "adapter", questions)
    assert bound < effect / 10
    for options in (Options(), Options(type="F32")):
        path = tmp_path / f"{options.type}.gguf"
        assert format.problems(adapter, options) == []
        written = format.write(adapter, path, EVIDENCE, options)
        certificate = format.certify(written, adapter, llama_cpp, lambda: questions, options)
        wrong = {name: part for name, part in certificate.parts.items() if part.largest > bound}
        assert not wrong
        assert all(part.mean < tolerance for part in certificate.parts.values())
        assert len(certificate.parts) == (1 if options.type else 2)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
ROTATIONS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rope_type": "default", "rope_theta": 100.0},
    "falcon": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama": YARN | {"attention_factor": 0.7},
    "gemma3_text": {},
    "mistral": {},
    "afmoe": {},
    "cohere2": {},
}
WINDOWS: dict[str, dict[str, Any]] = {  # with 16 tokens
    "afmoe": {
        "mup_enabled": True,
        "num_hidden_layers": 5,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_shared_experts": 1,
    },
    "cohere2": {"num_hidden_layers": 5},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_facts_that_the_converter_leaves_out_count_in_llama_cpp(llama_cpp: Program, kind: str, tmp_path: Path) -> None:
    """Gemma has a window in every second layer; Mistral's is ignored, and the file ends there. AFMoE's experts have
    weights that add up to 1, which no configuration states."""
    changes: dict[str, Any] = {"rope_parameters": ROTATIONS[kind]} if ROTATIONS[kind] else {"sliding_window": 16}
    changes |= WINDOWS.get(kind, {})
    if kind == "gemma3_text":
        types = ["sliding_attention", "full_attention"]
        changes |= {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": types}
    if kind == "falcon":
        changes |= {"num_key_value_heads": None, "ffn_hidden_size": 256}
    target = exportable(write_base(tmp_path / "base", kind, **changes))
    assert format.problems(target, Options()) == []
    written = format.write(target, tmp_path / "model.gguf", EVIDENCE, Options(type="F32"))
    certificate = format.certify(written, target, llama_cpp, lambda: make_questions(target), Options(type="F32"))
    assert certificate.warning == ""
    (part,) = certificate.parts.values()
    assert part.largest < (2e-4 if kind in ("llama", "mistral") else 1e-2)


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_named(llama_cpp: Program, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    target = exportable(base)
    written = format.write(target, tmp_path / "model.gguf", EVIDENCE, Options(type="F32"))
    values = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}))
    other = exportable(base)
    certificate = format.certify(written, other, llama_cpp, lambda: make_questions(other), Options(type="F32"))
    assert "texts as other tokens" in certificate.warning
