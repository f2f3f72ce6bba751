"""Folders whose files store quantized weights (FP8, MXFP4, compressed-tensors, AWQ), read as dense weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.architectures.tiny import write_tiny
from tests.conftest import write_tiny_llama
from tests.support.composite_case import write_composite
from tests.support.quantized_folders import FORMATS, write_folder, write_mxfp4, write_quantized
from tunekit.errors import ModelError
from tunekit.files.tensors import make_header
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")
WHOLE_BLOCKS = ("fp8-small-blocks", "fp8-tensor", "fp8-exponents")  # in which transformers reads FP8 correctly


def section(folder: Path, **keys: Any) -> ModelSection:
    return ModelSection(name_or_path=str(folder), **{"dtype": "float32", **keys})


def hashes(net: nn.Module) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in net.state_dict().items()}


def digest(tensor: Tensor) -> str:
    return sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose matrices have 96, 192 and 384 rows, so that blocks of 128 end at the edge."""
    return write_tiny_llama(tmp_path_factory.mktemp("dense") / "llama", hidden=192, layers=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_plain_formula(name: str, dtype: str, dense: Path, tmp_path: Path) -> None:
    values = write_quantized(dense, tmp_path / "quantized", name)
    write_folder(dense, tmp_path / "plain", values)
    ours = load_model(section(tmp_path / "quantized", dtype=dtype), device=CPU)
    plain = load_model(section(tmp_path / "plain", dtype=dtype), device=CPU)
    assert hashes(ours.net) == hashes(plain.net)
    assert not hasattr(ours.net.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*WHOLE_BLOCKS, *(name for name in FORMATS if name.startswith("compressed"))])
def test_weights_are_those_of_transformers(name: str, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    write_quantized(dense, folder, name)
    if name.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
    ours = load_model(section(folder, dtype=str(dtype)[6:]), device=CPU)
    assert hashes(ours.net) == hashes(by_transformers(folder, dtype))


def by_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    kinds = {"mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig}
    kind: Any = kinds.get(settings["quant_method"], FineGrainedFP8Config)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=kind(dequantize=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_experts_are_those_of_the_plain_formula_and_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "gpt-oss"
    values = write_mxfp4(folder)
    ours = load_model(section(folder, dtype=str(dtype)[6:]), device=CPU).net
    assert hashes(ours) == hashes(by_transformers(folder, dtype))
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert digest(ours.get_parameter(name)) == digest(values[name].to(dtype))


@pytest.mark.parametrize("name", ["fp8-blocks", "compressed-int4", "awq"])
def test_fused_experts_are_dequantized_piece_by_piece(name: str, tmp_path: Path) -> None:
    dense = write_tiny("deepseek_v3", tmp_path / "dense")
    values = write_quantized(dense, tmp_path / "quantized", name)
    write_folder(dense, tmp_path / "plain", values)
    ours, plain = (load_model(section(tmp_path / folder), device=CPU).net for folder in ("quantized", "plain"))
    assert any(parameter.dim() == 3 for parameter in ours.parameters())
    assert hashes(ours) == hashes(plain)


@pytest.mark.parametrize("quantization", ["nf4", "int8_weight_only"])
@pytest.mark.parametrize("name", ["fp8-blocks", "compressed-int8", "awq"])
def test_packed_bytes_are_those_of_the_dense_weights(quantization: str, name: str, dense: Path, tmp_path: Path) -> None:
    write_folder(dense, tmp_path / "plain", write_quantized(dense, tmp_path / "quantized", name))
    keys = {"quantization": quantization, "dtype": "bfloat16"}
    ours, plain = (load_model(section(tmp_path / folder, **keys), device=CPU) for folder in ("quantized", "plain"))
    assert packed_layers(ours.net)
    assert hashes(ours.net) == hashes(plain.net)
    assert ours.notes[0].endswith(f"each is dequantized when it is read, then packed to {quantization}")


Q_PROJ = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]  # of the stored tensors and of the settings


def without(ending: str) -> Change:
    return lambda tensors, _: tensors.pop(f"{Q_PROJ}.{ending}")


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({f"{Q_PROJ}.{ending}": change(tensors[f"{Q_PROJ}.{ending}"])})


def added(ending: str, tensor: Tensor) -> Change:
    return lambda tensors, _: tensors.update({f"{Q_PROJ}.{ending}": tensor})


def set_to(**settings: Any) -> Change:
    return lambda _, stored: stored.update(settings)


def of_group(**settings: Any) -> Change:
    return lambda _, stored: stored["config_groups"]["group_0"]["weights"].update(settings)


FILE, CONFIG, AT = r"model\.safetensors: ", r"config\.json: quantization_config: ", r"\S*q_proj\."
DAMAGES: list[tuple[str, Change, str]] = [
    ("fp8-blocks", without("weight_scale_inv"), rf"{FILE}.*{AT}weight is quantized, but .* no {AT}weight_scale_inv;"),
    (
        "fp8-blocks",
        changed("weight_scale_inv", lambda s: s[:1]),
        rf"{FILE}.*{AT}weight_scale_inv has the shape \[1, 2\]",
    ),
    ("fp8-blocks", changed("weight_scale_inv", lambda s: s.flatten()), rf"{FILE}.*has the shape \[4\].*needs \[2, 2\]"),
    ("fp8-blocks", changed("weight_scale_inv", lambda s: s[0, 0]), rf"{FILE}.*has the shape \[\].*needs \[2, 2\]"),
    ("fp8-blocks", changed("weight_scale_inv", lambda s: s * torch.inf), rf"{FILE}.*a scale that is NaN or infinite"),
    ("fp8-blocks", changed("weight_scale_inv", lambda s: s.long()), rf"{FILE}.*contains scales as torch.int64"),
    ("fp8-blocks", changed("weight", lambda w: w.bfloat16()), rf"{FILE}.*{AT}weight_scale_inv belongs to no quantized"),
    ("fp8-blocks", changed("weight", lambda w: w[:128, :128]), rf"{FILE}.*weight \[128, 128\] .* needs \[1, 1\]"),
    ("fp8-blocks", changed("weight", lambda w: w[:, :0]), rf"{FILE}.*{AT}weight is empty"),
    ("fp8-blocks", set_to(weight_block_size=[64, 64]), rf"{FILE}.*blocks of 64 x 64 needs \["),
    ("fp8-blocks", set_to(weight_block_size=[128]), rf"{CONFIG}weight_block_size is \[128\]"),
    ("fp8-blocks", set_to(weight_block_size=[128, 0]), rf"{CONFIG}weight_block_size is"),
    ("fp8-blocks", lambda _, stored: stored.clear(), rf"{FILE}.*is stored as float8, and config.json does not say"),
    ("awq", without("qzeros"), rf"{FILE}.*{AT}qweight is quantized, but .* no {AT}qzeros"),
    ("awq", changed("qzeros", lambda z: z[:2]), rf"{FILE}.*{AT}qzeros has the shape \[2, 24\]"),
    ("awq", changed("scales", lambda z: z[:, :8]), rf"{FILE}.*{AT}scales has the shape \[6, 8\]"),
    ("awq", changed("qweight", lambda q: q.long()), rf"{FILE}.*{AT}qweight is torch.int64"),
    ("awq", set_to(group_size=64), rf"{FILE}.*in blocks of 64 x 1 needs \[\d+, 192\]"),
    ("awq", set_to(bits=8), rf"{CONFIG}AWQ with bits 8"),
    ("awq", set_to(version="gemv"), rf"{CONFIG}AWQ with bits 4, version gemv"),
    ("compressed-int4", without("weight_scale"), rf"{FILE}.*no {AT}weight_scale"),
    ("compressed-int4", without("weight_packed"), rf"{FILE}.*belongs to no quantized weight"),
    ("compressed-int4", changed("weight_shape", lambda s: s - 1), rf"{FILE}.*states the shape \[191, 191\]"),
    ("compressed-int4", changed("weight_shape", lambda s: s[:1]), rf"{FILE}.*weight_shape has the shape \[1\]"),
    ("compressed-int4", added("weight_g_idx", torch.zeros(192)), rf"{FILE}.*in the order of {AT}weight_g_idx"),
    ("compressed-int4", of_group(num_bits=6), rf"{CONFIG}compressed-tensors with int of 6 bits"),
    ("compressed-int4", of_group(strategy="token"), rf"{CONFIG}.*strategy token"),
    ("compressed-int4", of_group(type="float"), rf"{FILE}.*no group of config_groups in config.json fits"),
    ("compressed-int4", set_to(transform_config={"R1": {}}), rf"{CONFIG}the weights are rotated or sparse"),
    ("compressed-int4-zeros", changed("weight_zero_point", lambda z: z[:3]), rf"{FILE}.*_point has the shape \[3, 6\]"),
    ("compressed-nvfp4", changed("weight_global_scale", lambda g: g.expand(7)), rf"{FILE}.*scale has the shape \[7\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES, ids=[f"{d[0]}-{n}" for n, d in enumerate(DAMAGES)])
def test_damaged_scales_and_unknown_settings_are_refused_in_one_line(
    name: str, change: Change, message: str, dense: Path, tmp_path: Path
) -> None:
    write_quantized(dense, tmp_path / "whole", name)
    tensors, config = (
        load_file(tmp_path / "whole/model.safetensors"),
        json.loads((tmp_path / "whole/config.json").read_text()),
    )
    change(tensors, config["quantization_config"])
    write_folder(tmp_path / "whole", tmp_path / "damaged", tensors, quantization_config=config["quantization_config"])
    for quantization in ("none", "nf4"):
        with pytest.raises(ModelError, match=message) as caught:
            load_model(section(tmp_path / "damaged", quantization=quantization), device=CPU)
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
    if "NaN" not in message and "states" not in message:  # which only the data show
        with pytest.raises(ModelError, match=message):
            make_meta_model(section(tmp_path / "damaged"), device=CPU)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "settings", [{"quant_method": "modelopt"}, {"quant_method": "exl3"}, {"bits": 4, "group_size": 64}]
)
def test_unknown_methods_are_refused_wherever_config_names_them(
    settings: dict[str, Any], inside: bool, dense: Path, tmp_path: Path
) -> None:
    folder, named = tmp_path / "Llama-3-8B-Instruct-FP8", {"quantization_config": settings}
    write_folder(dense, folder, load_file(dense / "model.safetensors"), **({"text_config": named} if inside else named))
    sibling = re.escape(f"choose the unquantized base, by its name {tmp_path}/Llama-3-8B-Instruct")
    method = settings.get("quant_method", "unknown")
    for load in (load_model, make_meta_model):
        with pytest.raises(ModelError, match=rf"quantized weights \({method}\), which.*{sibling}, and set"):
            load(section(folder), device=CPU)
        with pytest.raises(ModelError, match=rf"quantized already \({method}\).*{sibling}$"):
            load(section(folder, quantization="nf4"), device=CPU)


def test_settings_inside_text_config_count(tmp_path: Path) -> None:
    dense = write_composite("gemma3", tmp_path / "dense")
    tensors = {name: tensor for path in dense.glob("*.safetensors") for name, tensor in load_file(path).items()}
    (dense / "model.safetensors.index.json").unlink()
    for path in dense.glob("model-*.safetensors"):
        path.unlink()
    config = json.loads((dense / "config.json").read_text())
    write_folder(dense, tmp_path / "plain", tensors)
    values = write_quantized(
        tmp_path / "plain",
        tmp_path / "quantized",
        "fp8-tensor",
        quantization_config=None,
        text_config={**config["text_config"], "quantization_config": FORMATS["fp8-tensor"][1]},
    )
    write_folder(dense, tmp_path / "dequantized", values)
    ours, plain = (load_model(section(tmp_path / folder), device=CPU).net for folder in ("quantized", "dequantized"))
    assert hashes(ours) == hashes(plain)
    assert not hasattr(ours.config.text_config, "quantization_config")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes that a process reads")
def test_opening_400_gb_reads_only_headers(dense: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "large", json.loads((dense / "config.json").read_text())
    shutil.copytree(dense, folder)
    sizes = {"hidden_size": 2**14, "intermediate_size": 2**16, "num_hidden_layers": 106, "head_dim": 128}
    config |= sizes | {
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "quantization_config": FORMATS["fp8-blocks"][1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, tensor in net.state_dict().items():
        quantized = name.endswith("_proj.weight")
        entries.append((name, torch.float8_e4m3fn if quantized else torch.bfloat16, tuple(tensor.shape)))
        if quantized:
            grid = tuple(ceil(side / 128) for side in tensor.shape)
            entries.append((f"{name}_scale_inv", torch.float32, grid))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(make_header(entries))
        file.truncate(file.tell() + sum(prod(shape) * dtype.itemsize for _, dtype, shape in entries))
    assert (folder / "model.safetensors").stat().st_size > 400e9
    before = read_bytes()
    planned = make_meta_model(section(folder, dtype="bfloat16"), device=CPU)
    assert read_bytes() - before < 20 * 2**20
    assert planned.facts.total_parameters > 390e9
    assert planned.copied_while_read
    assert planned.read_alone


def read_bytes() -> int:
    """What this process has read from files so far, from Linux."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])
