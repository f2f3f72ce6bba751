"""The files of a diffusion adapter: diffusers loads both and computes the same, and both are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.image_case import ATTENTION, OF_TEXT, adapter_tensors
from tests.support.tiny_pipelines import SIZE, loaded_by_diffusers, saved_pipeline
from tunekit.adapter import combine_verb, convert_verb
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.diffusers_file import DIFFUSERS_NAME, METADATA, kohya_tensors, read_foreign, sdxl_name
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.arithmetic.adopt import adopt_lora
from tunekit.arithmetic.summary import summarise_adapter
from tunekit.errors import AdapterError, InputError
from tunekit.export import export_verb
from tunekit.model.families.diffusion import FAMILY, IDS
from tunekit.model.families.pipeline.parts import PIPELINES, load_net
from tunekit.model.families.pipeline.processor import PipelineProcessor, load_processor
from tunekit.recipe.model import ModelSection
from tunekit.recipe.recipe import make_adapter_settings

KINDS = ["sd", pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow)]
CASES = {
    "alpha is not the rank": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_blocks.*to_q": 2}, "alpha_pattern": {"up_blocks.*to_q": 7, "q_proj": 1}},
    "dora": {"method": "dora"},
}


def attached(folder: Path, kind: str, **settings: Any) -> tuple[AttachedAdapter, PipelineProcessor]:
    """A pipeline with an adapter of the denoiser and the first text encoder, whose B is not 0."""
    processor = load_processor(ModelSection(name_or_path=str(saved_pipeline(folder / kind, kind))))
    net = load_net(processor.folder, [PIPELINES[processor.kind], "text_encoder"], torch.float32)
    values = {"method": "lora", "r": 3, "alpha": 12, "target_modules": [*ATTENTION, *OF_TEXT], **settings}
    adapter = attach_adapter(net, make_adapter_settings(values), seed=0, head_name=None)
    torch.manual_seed(4)
    for name, parameter in adapter.trained().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return adapter, processor


def saved(
    adapter: AttachedAdapter, folder: Path, processor: PipelineProcessor, objective: dict[str, Any] | None = None
) -> Path:
    save_adapter_folder(
        adapter,
        folder,
        base_name=str(processor.folder),
        base_fingerprint=None,
        revision=None,
        task_type=None,
        objective=objective,
        of_pipeline=True,
    )
    return folder


@torch.no_grad()
def ours(adapter: AttachedAdapter, processor: PipelineProcessor) -> torch.Tensor:
    net: Any = adapter.net
    ids = {f"{IDS}{name}": torch.from_numpy(each) for name, each in processor.ids(["a photo of sks dog"]).items()}
    return FAMILY.logits(net, {**_inputs(processor), **ids})


def _inputs(processor: PipelineProcessor) -> dict[str, torch.Tensor]:
    latents = torch.randn(1, *processor.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    return {"latents": latents, "times": torch.tensor([500]), "sizes": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]])}


@torch.no_grad()
def theirs(processor: PipelineProcessor, kind: str, *files: Path | None, active: tuple[int, ...] = ()) -> torch.Tensor:
    """What the pipeline computes in diffusers, with the files of adapters; `active`: the numbers of those that act."""
    pipeline = loaded_by_diffusers(processor.folder, kind)
    for number, file in enumerate(files):
        if file is not None:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"adapter_{number}")
    if active:
        pipeline.set_adapters([f"adapter_{number}" for number in active])
    given, prompt = _inputs(processor), "a photo of sks dog"
    if kind == "sd":
        embeddings = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        return pipeline.unet(given["latents"], given["times"], embeddings).sample
    if kind == "sdxl":
        embeddings, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": given["sizes"].float()}
        return pipeline.unet(given["latents"], given["times"], embeddings, added_cond_kwargs=added).sample
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    return pipeline.transformer(
        hidden_states=given["latents"],
        timestep=given["times"],
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
    ).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_the_file_and_computes_the_same(tmp_path: Path, kind: str, case: str) -> None:
    if kind != "sd" and case in ("patterns", "dora"):
        pytest.skip("one pipeline shows it")
    adapter, processor = attached(tmp_path, kind, **CASES[case])
    file = saved(adapter, tmp_path / "adapter", processor) / DIFFUSERS_NAME
    expected = ours(adapter, processor)
    adapter.detach()
    assert (ours(adapter, processor) - expected).abs().max() > 1e-2  # the adapter does something
    assert torch.allclose(theirs(processor, kind, file), expected, atol=1e-5)


@pytest.mark.drawn
def test_diffusers_loads_several_files_at_once(tmp_path: Path) -> None:
    """Each of them alone computes as here, and both together as the sum of their changes."""
    first, processor = attached(tmp_path, "sd")
    files, expected, tensors = [], [], []
    for number in range(2):
        files.append(saved(first, tmp_path / f"adapter{number}", processor) / DIFFUSERS_NAME)
        expected.append(ours(first, processor))
        tensors.append({name: each.detach().clone() for name, each in first.trained().items()})
        for parameter in first.trained().values():
            parameter.data.normal_(0, 0.1)
    first.detach()
    for number in range(2):
        assert torch.allclose(theirs(processor, "sd", *files, active=(number,)), expected[number], atol=1e-5)
    both, _ = attached(tmp_path / "both", "sd", r=6, alpha=24)
    for name, parameter in both.trained().items():
        parameter.data.copy_(torch.cat([each[name] for each in tensors], dim=0 if "lora_A" in name else 1))
    assert torch.allclose(theirs(processor, "sd", *files, active=(0, 1)), ours(both, processor), atol=1e-5)


RANKS = {"rank_pattern": {"up_blocks.*to_q": 5, "mid_block.*to_k": 1}, "alpha_pattern": {"up_blocks.*to_k": 7}}


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("settings", [{}, RANKS, {"use_rslora": True, **RANKS}])
def test_diffusers_loads_kohyas_file_and_computes_the_same(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Also of layers with other ranks and alphas, of which diffusers reads one alpha for the whole UNet."""
    adapter, processor = attached(tmp_path, kind, **settings)
    tensors = adapter_tensors(saved(adapter, tmp_path / "adapter", processor))
    file, layers = tmp_path / "kohya.safetensors", layers_per_block(processor) if kind == "sdxl" else None
    converted = kohya_tensors(tensors, adapter.settings, adapter.targets, layers)
    assert any("input_blocks" in key for key in converted) == (kind == "sdxl")
    save_file(converted, file)
    assert torch.allclose(theirs(processor, kind, file), ours(adapter, processor), atol=1e-5)
    assert read_foreign(file, [target.name for target in adapter.targets]).tensors.keys() == tensors.keys()


def test_a_run_that_trained_the_text_encoder_is_exported(tmp_path: Path) -> None:
    adapter, processor = attached(tmp_path, "sd", **RANKS)
    trained = {"method": "dreambooth", "train_text_encoder": True}
    folder = saved(adapter, tmp_path / "adapter", processor, objective=trained)
    export_verb(str(folder), "kohya", str(tmp_path / "kohya.safetensors"))
    assert torch.allclose(theirs(processor, "sd", tmp_path / "kohya.safetensors"), ours(adapter, processor), atol=1e-5)


def test_dora_in_kohyas_format_is_refused(tmp_path: Path) -> None:
    adapter, processor = attached(tmp_path, "sd", target_modules=ATTENTION, method="dora")
    folder, file = saved(adapter, tmp_path / "adapter", processor), tmp_path / "kohya.safetensors"
    with pytest.raises(InputError, match=r"this adapter is dora: programs do not agree how to compute"):
        export_verb(str(folder), "kohya", str(file))
    assert not file.exists()
    with pytest.raises(AdapterError, match=r"also has base_model.*lora_magnitude_vector"):
        kohya_tensors(adapter_tensors(folder), adapter.settings, adapter.targets)


def layers_per_block(processor: PipelineProcessor) -> int:
    return json.loads((processor.folder / "unet" / "config.json").read_text())["layers_per_block"]


def test_the_names_of_sdxl_are_those_of_its_original_code() -> None:
    """Each name is the one of kohya's conversion map for the published UNet (two layers in a block)."""
    for diffusers, original in {
        "down_blocks.1.attentions.0.attn2.to_q": "input_blocks.4.1.attn2.to_q",
        "down_blocks.2.resnets.1.conv2": "input_blocks.8.0.out_layers.3",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert sdxl_name(diffusers, 2) == original


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_both_files_are_read_back_bit_for_bit(tmp_path: Path, kind: str, form: str) -> None:
    adapter, processor = attached(tmp_path, kind)
    folder = saved(adapter, tmp_path / "adapter", processor)
    tensors = adapter_tensors(folder)
    file = folder / DIFFUSERS_NAME
    if form == "kohya":
        if kind == "sd3":
            with pytest.raises(AdapterError, match="has no name for layers of 'transformer'"):
                kohya_tensors(tensors, adapter.settings, adapter.targets)
            return
        file = tmp_path / "kohya.safetensors"
        save_file(kohya_tensors(tensors, adapter.settings, adapter.targets), file)
    modules = [target.name for target in adapter.targets]
    found = read_foreign(file, modules)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[key], tensors[key]) for key in tensors)
    assert found.alphas == {target.name: 12.0 for target in adapter.targets}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_folder_has_one_file_of_tensors_and_is_the_same_adapter_again(tmp_path: Path, kind: str, case: str) -> None:
    if kind != "sd" and case in ("patterns", "dora"):
        pytest.skip("one pipeline shows it")
    adapter, processor = attached(tmp_path, kind, **CASES[case])
    folder, expected = saved(adapter, tmp_path / "adapter", processor), ours(adapter, processor)
    state = {name: tensor.clone() for name, tensor in adapter.state().items()}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", DIFFUSERS_NAME, "tunekit.json"]
    net = load_net(processor.folder, [PIPELINES[processor.kind], "text_encoder"], torch.float32)
    again = attach_adapter_folder(net, folder, head_name=None)
    assert again.settings.model_dump(exclude={"target_modules", "rank_pattern", "alpha_pattern"}) == (
        adapter.settings.model_dump(exclude={"target_modules", "rank_pattern", "alpha_pattern"})
    )
    assert again.state().keys() == state.keys()
    assert all(torch.equal(again.state()[name], state[name]) for name in state)
    assert torch.equal(ours(again, processor), expected)
    assert len(summarise_adapter(folder).tensors) == len(state)


def test_a_file_without_what_diffusers_asks_of_it_is_refused(tmp_path: Path) -> None:
    adapter, processor = attached(tmp_path, "sd")
    folder = saved(adapter, tmp_path / "adapter", processor)
    tensors = adapter_tensors(folder)
    (folder / "tunekit.json").unlink()
    save_file({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, folder / DIFFUSERS_NAME)
    with pytest.raises(AdapterError, match=r"has no lora_adapter_metadata; convert it with: tunekit adapter adopt"):
        attach_adapter_folder(adapter.net, folder, head_name=None)


@pytest.mark.parametrize("named", ["encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"])
def test_a_pattern_of_alphas_holds_by_either_name_of_a_layer(tmp_path: Path, named: str) -> None:
    module, file = "text_encoder.encoder.layers.0.self_attn.q_proj", tmp_path / "lora.safetensors"
    tensors = {f"text_encoder.text_model.{module[13:]}.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}
    fields = {"text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {named: 7}}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(fields)})
    assert read_foreign(file, [module]).alphas == {module: 7.0}


@pytest.mark.parametrize("text", ["{no", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 3}}'])
def test_a_damaged_header_is_told_of(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.a.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}, file, {METADATA: text})
    with pytest.raises(AdapterError, match=r"lora\.safetensors: has a damaged lora_adapter_metadata"):
        read_foreign(file, ["unet.a"])


def test_a_text_model_is_no_pipeline(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--base: .* is not a diffusion pipeline; name a diffusion pipeline"):
        adopt_lora(tmp_path / "lora.safetensors", {"name_or_path": str(tiny_llama)}, tmp_path / "adapter")


def test_a_file_for_another_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    adapter, processor = attached(tmp_path, "sd")
    file = saved(adapter, tmp_path / "adapter", processor) / DIFFUSERS_NAME
    modules = [target.name for target in adapter.targets if "up_blocks" not in target.name]
    with pytest.raises(AdapterError, match="is not the LoRA of a linear layer of this pipeline"):
        read_foreign(file, modules)
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"], fields["text_encoder.lora_alpha"]) == (3, 12, 12)


def test_combined_and_converted_adapters_of_a_pipeline_are_for_diffusers_too(tmp_path: Path) -> None:
    """Also with layers of different ranks and alphas."""
    first, processor = attached(tmp_path, "sd", **{**RANKS, "rank_pattern": {"up_blocks.*to_q": 2}})
    folders = [saved(first, tmp_path / name, processor) for name in ("a", "b")]
    expected = ours(first, processor)
    first.detach()
    combine_verb(
        [str(folder) for folder in folders], "0.5,0.5", "cat", None, None, None, None, None, str(tmp_path / "new")
    )
    convert_verb(str(folders[0]), None, None, None, str(tmp_path / "plain"))
    for folder in (tmp_path / "new", tmp_path / "plain"):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", DIFFUSERS_NAME, "tunekit.json"]
        assert torch.allclose(theirs(processor, "sd", folder / DIFFUSERS_NAME), expected, atol=1e-5)
        net = load_net(processor.folder, [PIPELINES[processor.kind], "text_encoder"], torch.float32)
        again = attach_adapter_folder(net, folder, head_name=None)
        assert torch.allclose(ours(again, processor), expected, atol=1e-5)
