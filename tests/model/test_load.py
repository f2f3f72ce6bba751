"""Bases of every kind: what loads, what is refused and how, what is exact."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tests.memory.test_streaming_seq2seq import make_net
from tests.support.packed import packed_hash
from tunekit.errors import ModelError
from tunekit.model import compute as devices
from tunekit.model.load import base_fingerprint, load_model, load_packed_folder, make_meta_model, resolve_dtype
from tunekit.model.quantized.weights import PackedLinear, element_count, stored_bytes
from tunekit.model.storage import inspection
from tunekit.model.storage.source import find_source
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")


def section(folder: Path, **settings: Any) -> ModelSection:
    return ModelSection(name_or_path=str(folder), **{"dtype": "float32", **settings})


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_loaded_model_is_frozen_exact_and_described(tiny_llama: Path) -> None:
    model = load_model(section(tiny_llama), device=CPU)
    stored = load_file(tiny_llama / "model.safetensors")
    state = model.net.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert not any(module.training for module in model.net.modules())
    assert model.config.use_cache is False
    facts = model.facts
    assert facts.total_parameters == sum(tensor.numel() for tensor in stored.values())
    assert (facts.layers, facts.hidden_size, model.text.vocabulary_size) == (2, 64, 264)
    assert (facts.dtype, facts.attention, facts.model_type) == ("float32", "products_per_document", "llama")
    assert facts.fingerprint == base_fingerprint(section(tiny_llama))


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8", "int8_weight_only"])
def test_meta_model_is_the_loaded_one_without_weights(tiny_llama: Path, quantization: str) -> None:
    wanted = section(tiny_llama, quantization=quantization)
    real, meta = load_model(wanted, device=CPU), make_meta_model(wanted, device=CPU)
    assert all(tensor.is_meta for tensor in meta.net.state_dict().values())

    def described(net: torch.nn.Module) -> list[tuple[str, Any, Any]]:
        return [(name, tensor.shape, tensor.dtype) for name, tensor in net.state_dict().items()]

    assert described(real.net) == described(meta.net)
    assert stored_bytes(real.net) == stored_bytes(meta.net)
    expected = real.facts.__dict__ | {"fingerprint": None}
    assert meta.facts.__dict__ == expected
    output = meta.net.get_submodule("model.layers.0.mlp")(torch.empty(1, 5, 64, device="meta"))
    assert output.is_meta
    assert output.shape == (1, 5, 64)


@pytest.mark.parametrize("apart", [False, True])
def test_a_head_that_is_stored_beside_the_embedding_counts_where_it_differs(apart: bool, tmp_path: Path) -> None:
    """As transformers reads it: files may hold both although the configuration ties them."""
    folder = tmp_path / "t5"
    make_net("t5", vocab_size=300, tie_word_embeddings=True).save_pretrained(folder)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"] + float(apart)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, planned = load_model(section(folder), device=CPU), make_meta_model(section(folder), device=CPU)
    assert planned.family.tied(planned.net) == loaded.family.tied(loaded.net) == (not apart)
    assert stored_bytes(planned.net) == stored_bytes(loaded.net)


def test_quantized_layers_are_all_linears_but_the_head(tiny_llama: Path) -> None:
    model = load_model(section(tiny_llama, quantization="nf4"), device=CPU)
    packed = [name for name, module in model.net.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert model.family.head_name(model.net) == "lm_head"
    assert not any("lm_head" in name or "embed" in name for name in packed)
    plain = load_model(section(tiny_llama), device=CPU)
    assert model.facts.total_parameters == plain.facts.total_parameters == element_count(plain.net)
    assert stored_bytes(model.net) < stored_bytes(plain.net)
    again = load_model(section(tiny_llama, quantization="nf4"), device=CPU)
    assert packed_hash(model.net) == packed_hash(again.net)


def test_fused_experts_that_stay_dense_are_said(tmp_path: Path) -> None:
    from tests.model.test_families import make_net

    make_net("mixtral").save_pretrained(tmp_path / "base")
    model = load_model(section(tmp_path / "base", quantization="nf4"), device=CPU)
    assert any("experts are not quantized" in note for note in model.notes)


def test_sharded_folder_equals_the_whole(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    first, second = (load_model(section(folder), device=CPU).net.state_dict() for folder in (tiny_llama, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def html(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html><body>404: no such file, try again later</body></html>")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def traversal(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "evil.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../evil.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder: Path) -> None:
    nothing(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_key(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def run_folder(folder: Path) -> None:
    for name in ("plan.json", "recipe.yaml"):
        (folder / name).write_text("{}")


def adapter_folder(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def remote_code(folder: Path) -> None:
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("truncated or has extra bytes", truncate),
    ("git-lfs pointer", pointer),
    ("truncated or not a safetensors file", huge_header),
    ("web page", html),
    ("not a regular file", pipe),
    ("pickle", pickle_only),
    ("contains no model.safetensors", nothing),
    ("not a safetensors file of its folder", traversal),
    ("is missing", missing_shard),
    ("lacks weights", missing_key),
    (
        r"model\.safetensors: .* the tensor \S*up_proj\S* has the shape \[\d+, \d+\], but config.json declares",
        wrong_shape,
    ),
    ("config.json: is missing", no_config),
    ("cannot be read as JSON", deep_config),
    ("contains an adapter", adapter_folder),
    ("is a run", run_folder),
    ("runs remote code", remote_code),
    ("masked language model", configured(architectures=["BertForMaskedLM"], model_type="bert")),
    ("is not an encoder-decoder", configured(architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)),
    ("transformers has a class", configured(model_type="llava", vision_config={}, architectures=["LlavaForCausalLM"])),
    ("lacks weights.*score", configured(architectures=["LlamaForSequenceClassification"])),
    ("lacks weights.*score", configured(architectures=["LlamaForTokenClassification"])),
    ("question-answering model", configured(architectures=["LlamaForQuestionAnswering"])),
    ("is quantized|has quantized weights", configured(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("cannot be loaded|knows", configured(model_type="never_heard_of", architectures=["NeverForCausalLM"])),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[damage.__name__ + m[:9] for m, damage in DAMAGES])
def test_damaged_and_foreign_bases_are_refused_by_name(
    base: Path, message: str, damage: Callable[[Path], None]
) -> None:
    damage(base)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(section(base), device=CPU)
    assert str(base) in str(caught.value)
    assert not (base / "ran").exists()


def test_quantized_base_with_a_quantization_is_a_conflict(base: Path) -> None:
    change_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="cannot quantize it again") as caught:
        make_meta_model(section(base, quantization="nf4"), device=CPU)
    assert caught.value.problems[0].key == "model.quantization"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "missing.gguf"])
def test_absent_paths_are_refused_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(ModelError, match="no folder or file"):
        load_model(ModelSection(name_or_path=name), device=CPU)


def test_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 20)
    with pytest.raises(ModelError, match="not in the GGUF format"):
        load_model(ModelSection(name_or_path=str(path)), device=CPU)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        load_model(ModelSection(name_or_path=str(tmp_path / "text.txt")), device=CPU)


QUIET_AND_OFFLINE = """
import sys
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"network: {event} {arguments}")
sys.addaudithook(audit)
import torch
from tunekit.model.load import load_model
from tunekit.model.storage import inspection
from tunekit.model.storage.source import find_source
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection
section = ModelSection(name_or_path=sys.argv[1], quantization="nf4")
load_model(section, device=torch.device("cpu"))
load_tokenizer(section)
"""


@pytest.mark.slow
def test_local_base_needs_no_network_and_prints_nothing(tiny_llama: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", QUIET_AND_OFFLINE, str(tiny_llama)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_fingerprint_follows_the_weights_and_not_the_place(base: Path, tiny_llama: Path) -> None:
    first = base_fingerprint(section(tiny_llama))
    assert base_fingerprint(section(base)) == first
    change_config(base, transformers_version="0.0.0", use_cache=True)
    assert base_fingerprint(section(base)) == first
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(section(base)) != first


def test_dtypes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda native=native: native)
        assert resolve_dtype(section(tiny_llama, dtype="auto"), CPU) == expected
    with pytest.raises(ModelError, match="float16 is slow on a CPU"):
        resolve_dtype(section(tiny_llama, dtype="float16"), CPU)
    model = load_model(section(tiny_llama, dtype="bfloat16"), device=CPU)
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("claimed", [False, True])
def test_attention_that_would_leave_something_out_is_refused(
    tmp_path: Path, claimed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`claimed`: some versions of transformers say that sdpa knows the soft caps of gemma2."""
    from tests.model.test_families import make_net

    net = make_net("gemma2")
    net.save_pretrained(tmp_path)
    monkeypatch.setattr(type(net), "_supports_sdpa", claimed)
    assert make_meta_model(section(tmp_path), device=CPU).facts.attention == "eager_per_document"
    with pytest.raises(ModelError, match="sdpa"):
        make_meta_model(section(tmp_path, attention="sdpa"), device=CPU)
    with pytest.raises(ModelError, match="CUDA"):
        make_meta_model(section(tmp_path, attention="flash_attention_2"), device=CPU)


def test_other_families_are_refused_by_name(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="seq2seq"):
        load_model(section(tiny_llama, family="seq2seq"), device=CPU)


def test_vocabulary_is_checked(tiny_llama: Path) -> None:
    model, tokenizer = load_model(section(tiny_llama), device=CPU), load_tokenizer(section(tiny_llama))
    check_vocabulary(tokenizer, model.text.vocabulary_size)
    check_vocabulary(tokenizer, 200, largest_used_id=150)
    with pytest.raises(ModelError, match="tokens without a row"):
        check_vocabulary(tokenizer, 200)


def shift(folder: Path, remainder: int) -> Path:
    """Let the file's tensors begin so many bytes beyond a multiple of 64: its header is padded with spaces."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    header += b" " * ((remainder - 8 - len(header)) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


@pytest.mark.parametrize(("remainder", "dtype"), [(0, "float32"), (8, "float32"), (0, "bfloat16"), (8, "bfloat16")])
def test_a_resident_base_lies_at_64_bytes_and_is_copied_only_where_it_must(
    base: Path, remainder: int, dtype: str
) -> None:
    given = section(shift(base, remainder), dtype=dtype)
    model, stored = load_model(given, device=CPU), load_file(base / "model.safetensors")
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.net.parameters())
    kind = getattr(torch, dtype)
    assert all(torch.equal(model.net.state_dict()[name], tensor.to(kind)) for name, tensor in stored.items())
    assert make_meta_model(given, device=CPU).copied_while_read is (remainder != 0 or dtype == "bfloat16")


def test_a_single_row_is_the_same_product_in_a_streamed_base(base: Path) -> None:
    given = section(shift(base, 8))
    resident, streamed = load_model(given, device=CPU), load_model(given, device=CPU, streamed=True)
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resident.net.lm_head(row), streamed.net.lm_head(row))
    assert streamed.net.lm_head.weight.data_ptr() % 64 == 0


@pytest.mark.parametrize("damage", [truncate, pointer, html, pickle_only])
def test_weights_that_cannot_be_read_are_refused_before_they_are(base: Path, damage: Callable[[Path], None]) -> None:
    """By plan, in the words of train."""
    damage(base)
    refusals = []
    for load in (load_model, make_meta_model):
        with pytest.raises(ModelError) as caught:
            load(section(base), device=CPU)
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]


def test_a_folder_of_the_working_directory_shadows_no_hub_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tiny_llama)

    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert find_source(ModelSection(name_or_path="org/model"), weights=False).folder == tiny_llama
    assert find_source(ModelSection(name_or_path="./org/model"), weights=False).folder == Path("org/model")
    assert asked == ["org/model"]

    def offline(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError) as caught:
        find_source(ModelSection(name_or_path="org/model"), weights=False)
    assert f"if you mean the folder {tmp_path / 'org' / 'model'}, write this path" in str(caught.value)


def test_a_packed_folder_is_loaded_to_the_requested_device(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device map, transformers puts it on the first GPU, although merge compares models on the CPU."""
    settings: dict[str, object] = {}

    class Loader:
        @staticmethod
        def from_pretrained(folder: str, **given: object) -> None:
            settings.update(given)
            raise ModelError("stopped", "here")

    monkeypatch.setattr(inspection, "find_family", lambda *_: SimpleNamespace(auto_class=lambda: Loader))
    with pytest.raises(ModelError, match="stopped"):
        load_packed_folder(ModelSection(name_or_path=str(tiny_llama)), CPU)
    assert settings["device_map"] == {"": "cpu"}


SHARDS = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


@pytest.mark.parametrize(
    ("index", "single", "expected"),
    [
        (None, True, ["model.safetensors"]),
        (SHARDS, False, ["model-1.safetensors", "model-2.safetensors"]),
        (SHARDS, True, ["model.safetensors"]),  # read even if there is an index, which may be left over
        ({}, False, []),  # refused when it is read
    ],
)
def test_only_the_weights_that_are_read_are_fetched(
    index: dict[str, str] | None, single: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository like Mistral's and Llama's, which hold the weights twice."""
    files = ["config.json", "consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "model.bin"]
    files += [*(["model.safetensors"] * single), *([] if index is None else SHARDS.values())]
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    fetched: set[str] = set()

    def snapshot(name: str, revision: str, allow_patterns: Any) -> str:
        fetched.update(names := [*filter_repo_objects(files, allow_patterns=allow_patterns)])
        for name in names:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    find_source(ModelSection(name_or_path="org/model"), weights=True)
    assert sorted(fetched) == ["config.json", *expected]


@pytest.mark.parametrize("kind", ["ReadError", "ProxyError", "ReadTimeout", "RemoteProtocolError"])
def test_a_connection_that_breaks_is_no_bug(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

    def snapshot(name: str, **_: Any) -> str:
        raise getattr(library, kind)("the peer closed the connection\nwith a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError) as caught:
        find_source(ModelSection(name_or_path="org/model"), weights=True)
    assert str(caught.value) == (
        "model.name_or_path: org/model (main): the peer closed the connection; check the connection and the disk, and "
        "try again; finished files are kept"
    )
