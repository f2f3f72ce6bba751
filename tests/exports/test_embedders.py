"""Exports of embedding models: the published rules of programs that read a folder of sentence-transformers, and GGUF
files with their pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_case
from tests.support.train_case import train
from tunekit.errors import InputError, ModelError, TunekitError
from tunekit.export import export_verb
from tunekit.exports.llama_cpp.converter import converter_folder, imported
from tunekit.merge import merge_verb

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MEAN, CLS, LAST = 1, 2, 3  # llama.cpp's numbers of the kinds of pooling


def _has_converter() -> bool:
    try:
        return converter_folder().is_dir()
    except TunekitError:
        return False


needs_converter = pytest.mark.skipif(not _has_converter(), reason="llama.cpp's converter is not installed")


def write_word_pieces(folder: Path) -> Path:
    """A random encoder with a tokenizer of word pieces, as BERT has."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    words = models.WordPiece({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=96, **sizes, **drops)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_pieces(tmp_path_factory.mktemp("encoder"))


def run_of(folder: Path, base: Path, **objective: Any) -> Path:
    return train(write_case(folder, base, objective, training={"max_steps": 2, "epochs": None}))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def vllm_pooling(folder: Path) -> tuple[str, bool]:
    """vLLM's rule (get_pooling_config): the kind of pooling, and whether embeddings get the length 1."""
    types = {module["type"]: module for module in read(folder, "modules.json")}
    pooling = read(folder, f"{types['sentence_transformers.models.Pooling']['path']}/config.json")
    [name] = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    kinds = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
    found = name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
    return kinds[found], "sentence_transformers.models.Normalize" in types


@pytest.mark.drawn
@pytest.mark.parametrize(("pooling", "kind"), [("mean", "MEAN"), ("cls", "CLS"), ("lasttoken", "LAST")])
def test_the_merged_folder_follows_the_rules_of_its_readers(
    pooling: str, kind: str, bert: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, bert, pooling=pooling, normalize=pooling != "cls", max_lengths={"document": 48})
    folder = tmp_path / "merged"
    merge_verb(str(run), str(folder), None, None, [])
    assert vllm_pooling(folder) == (kind, pooling != "cls")
    lengths = read(folder, "sentence_bert_config.json")  # vLLM reads the file only if it has both keys
    assert (lengths["max_seq_length"], lengths["do_lower_case"]) == (48, False)
    modes = read(folder, "1_Pooling/config.json")  # TEI: at this path, with these keys
    required = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    assert all(isinstance(modes[f"pooling_mode_{name}"], bool) for name in required)
    assert "pooling_mode" not in modes  # vLLM before 2026-09 and older llama.cpp read only the booleans
    assert (folder / "tokenizer.json").is_file()
    assert read(folder, "tokenizer_config.json")["model_max_length"] == 48


def fields_and_tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with imported() as converter:
        reader = converter.gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return fields, tensors


@needs_converter
@pytest.mark.drawn
@pytest.mark.parametrize(("pooling", "number"), [("mean", MEAN), ("cls", CLS), ("lasttoken", LAST)])
def test_a_gguf_file_of_a_run_states_its_pooling_and_has_the_merged_weights(
    pooling: str, number: int, bert: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, bert, pooling=pooling)
    export_verb(str(run), "gguf", str(tmp_path / "model.gguf"))
    fields, tensors = fields_and_tensors(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "bert"
    assert fields["bert.pooling_type"] == number
    assert fields["bert.attention.causal"] is False
    assert fields["tokenizer.ggml.model"] == "bert"
    assert fields["tokenizer.ggml.add_bos_token"] is not False  # [CLS] is a part of every text
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for ours, theirs in (
        ("token_embd", "embeddings.word_embeddings"),
        ("blk.1.attn_q", "encoder.layer.1.attention.self.query"),
        ("blk.0.ffn_down", "encoder.layer.0.output.dense"),
    ):
        torch.testing.assert_close(tensors[f"{ours}.weight"].float(), merged[f"{theirs}.weight"].float())
    assert not any("pooler" in name for name in tensors)


@needs_converter
def test_a_gguf_file_of_a_decoder_pools_its_last_token(tmp_path: Path) -> None:
    run = run_of(tmp_path, write_tiny_llama(tmp_path / "base"))
    export_verb(str(run), "gguf", str(tmp_path / "model.gguf"))
    fields, _ = fields_and_tensors(tmp_path / "model.gguf")
    assert fields["llama.pooling_type"] == LAST


@needs_converter
def test_dense_layers_are_not_left_out_of_a_gguf_file(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    run = run_of(tmp_path, bert)
    merge_verb(str(run), str(folder), None, None, [])
    modules = read(folder, "modules.json")
    place = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], place]), encoding="utf-8")
    (folder / "2_Dense").mkdir()
    values = {"in_features": 32, "out_features": 8, "bias": False, "activation_function": "torch.nn.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file({"linear.weight": torch.zeros(8, 32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match="the file would lack the model's dense layers; choose another --to"):
        export_verb(str(folder), "gguf", str(tmp_path / "model.gguf"))
    (folder / "2_Dense").rename(tmp_path / "elsewhere")
    place["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps([*modules[:2], place]), encoding="utf-8")
    with pytest.raises(ModelError, match=r"in N_Dense/, but is \.\./elsewhere/"):
        export_verb(str(folder), "gguf", str(tmp_path / "model.gguf"))


@needs_converter
def test_a_pooling_that_llama_cpp_does_not_know_is_refused(bert: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, bert, pooling="max")
    with pytest.raises(InputError, match=r"llama\.cpp pools by mean, cls, lasttoken, but the model pools by max"):
        export_verb(str(run), "gguf", str(tmp_path / "model.gguf"))
