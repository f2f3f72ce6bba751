"""`adapter.start`: a name or a mapping, its keys in messages, and what it cannot be combined with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunekit.errors import RecipeError
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import dump_recipe, load_recipe
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.starts.pissa import PissaSettings


def written(tmp_path: Path, adapter: str, model: str = "{name_or_path: org/base}") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\ndata: {{train: rows.jsonl}}\noutput: {{dir: out}}\nadapter: {adapter}\n")
    return path


def test_a_name_and_a_mapping_mean_the_same(tmp_path: Path) -> None:
    by_name = load_recipe(written(tmp_path, "{start: pissa}")).recipe
    by_mapping = load_recipe(written(tmp_path, "{start: {method: pissa}}")).recipe
    assert by_name == by_mapping
    assert vars(by_name.adapter)["start"] == PissaSettings()
    overridden = load_recipe(written(tmp_path, "{start: pissa}"), ["adapter.start.iterations=4"]).recipe
    assert vars(overridden.adapter)["start"] == PissaSettings(iterations=4)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(overridden, tmp_path))
    assert load_recipe(copy).recipe == overridden


def test_a_start_without_settings_is_written_as_its_name() -> None:
    assert LoraSettings(start="olora").model_dump(mode="json")["start"] == "olora"
    assert LoraSettings().model_dump(exclude_defaults=True) == {}


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("{start: pisa}", "adapter.start: must be one of corda, default, eva"),
        ("{start: {method: pissa, iteration: 4}}", "adapter.start.iteration: unknown key; did you mean 'iterations'?"),
        ("{start: {method: pissa, iterations: 0}}", "adapter.start.iterations: must be at least 1, not 0"),
        ("{start: {iterations: 4}}", "adapter.start: must name a method"),
        ("{start: 4}", "adapter.start: must be a name or a mapping"),
        ("{start: {method: eva, rho: 0.5}}", "adapter.start.rho: must be at least 1, not 0.5"),
        ("{start: {method: corda, mode: both}}", "adapter.start.mode: must be ipm or kpm"),
        ("{start: olora, init_from: adapter}", "adapter.start: cannot be olora if init_from names an adapter"),
        ("{layers_pattern: layers}", "adapter.layers_pattern: has no effect without layers_to_transform"),
    ],
)
def test_what_is_wrong_is_named(adapter: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, adapter))
    lines = [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]
    assert any(line.startswith(f"recipe.yaml:4: {expected}") for line in lines), lines


@pytest.mark.parametrize(
    ("start", "model", "expected"),
    [
        ("pissa", "{name_or_path: org/base, quantization: nf4}", "would have to be quantized again"),
        ("olora", "{name_or_path: org/base, quantization: int8}", "would have to be quantized again"),
        ("corda", "{name_or_path: org/base, quantization: fp4}", "would have to be quantized again"),
        ("lora_ga", "{name_or_path: org/base, quantization: int8_weight_only}", "would have to be quantized again"),
        ("loftq", "{name_or_path: org/base}", "this base is not quantized"),
        ("loftq", "{name_or_path: base.gguf, quantization: nf4}", "a GGUF file can lack these weights"),
        ("eva", "{name_or_path: org/base, quantization: nf4}", None),
        ("loftq", "{name_or_path: org/base, quantization: nf4}", None),
        ("pissa", "{name_or_path: org/base}", None),
    ],
)
def test_starts_and_quantized_bases(start: str, model: str, expected: str | None, tmp_path: Path) -> None:
    found = refuse_unsupported(load_recipe(written(tmp_path, f"{{start: {start}}}", model)).recipe)
    assert [problem.key for problem in found] == ([] if expected is None else ["adapter.start"])
    assert expected is None or expected in found[0].what
