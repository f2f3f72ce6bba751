"""Written model folders as older programs read them: by transformers 4's rules, and by the programs where they are."""

import importlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from tests.arithmetic.test_merge import CPU, merge, train, write_base
from tunekit.adapters.attach import attach_adapter
from tunekit.errors import ModelError
from tunekit.model.load import load_model
from tunekit.model.storage.model_folder import copy_other_files, write_portable_copy
from tunekit.model.storage.portable import TEMPLATE, make_portable, with_older_keys
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.adapters.full import FullSettings
from tunekit.recipe.model import ModelSection
from tunekit.targets.export import export_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default"}
FULL, SLIDING = "full_attention", "sliding_attention"


def by_layer_type(**scaling: Any) -> dict[str, Any]:
    return {FULL: {**PLAIN, **scaling, "rope_theta": 3e5}, SLIDING: {**PLAIN, "rope_theta": 5e3}}


# architecture -> its rope_parameters, and the keys of transformers 4.57.6's configuration class with its defaults: of
# the base frequency, of the share of a head that is rotated, and for sliding attention
READ = {
    "llama": ({**PLAIN, "rope_theta": 5e4}, ("rope_theta", 1e4), None, None),
    "llama-scaled": (
        {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5},
        ("rope_theta", 1e4),
        None,
        None,
    ),
    "mistral": ({**LINEAR, "rope_theta": 1e6}, ("rope_theta", 1e4), None, None),
    "qwen2": ({**PLAIN, "rope_theta": 1e6}, ("rope_theta", 1e4), None, None),
    "olmo2": ({**LINEAR, "rope_theta": 5e5}, ("rope_theta", 1e4), None, None),
    "phi": (
        {**PLAIN, "rope_theta": 3e4, "partial_rotary_factor": 0.25},
        ("rope_theta", 1e4),
        ("partial_rotary_factor", 0.5),
        None,
    ),
    "gpt_neox": (
        {**PLAIN, "rope_theta": 3e4, "partial_rotary_factor": 0.5},
        ("rotary_emb_base", 1e4),
        ("rotary_pct", 0.25),
        None,
    ),
    "gemma3_text": (by_layer_type(**LINEAR), ("rope_theta", 1e6), None, ("rope_local_base_freq", 1e4)),
    "modernbert": (by_layer_type(), ("global_rope_theta", 1.6e5), None, ("local_rope_theta", 1e4)),
    "olmo3": (
        {FULL: {**LINEAR, "rope_theta": 5e5}, SLIDING: {**PLAIN, "rope_theta": 5e5}},
        ("rope_theta", 1e4),
        None,
        ("rope_theta", 1e4),
    ),
}
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 512}


def configuration(name: str) -> Any:
    """The architecture's, with the frequencies of READ."""
    kind = name.partition("-")[0]
    own = {"head_dim": 16} if kind == "gemma3_text" else {}
    return CONFIG_MAPPING[kind](**SHAPE, **own, rope_parameters=json.loads(json.dumps(READ[name][0])))


def frequencies_now(config: Any, layer_type: str | None) -> torch.Tensor:
    """What the installed transformers computes (R/2,), R rotated numbers of a head."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    (rotary,) = [value for name, value in vars(module).items() if name.endswith("RotaryEmbedding")]
    net = rotary(config)
    found: torch.Tensor = net.inv_freq if layer_type is None else getattr(net, f"{layer_type}_inv_freq")
    return found


def frequencies_then(config: dict[str, Any], name: str, layer_type: str | None) -> torch.Tensor:
    """What transformers 4 computes (R/2,): from the older keys alone, else from its defaults."""
    _, theta, share, sliding = READ[name]
    key, default = sliding if layer_type == SLIDING and sliding is not None else theta
    rotated = int(16 * (1.0 if share is None else config.get(*share)))
    found = 1.0 / config.get(key, default) ** (torch.arange(0, rotated, 2).float() / rotated)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or layer_type == SLIDING:
        return found
    if kind == "linear":
        return found / scaling["factor"]
    assert kind == "llama3"
    lengths, old = 2 * torch.pi / found, scaling["original_max_position_embeddings"]
    low, high = old / scaling["low_freq_factor"], old / scaling["high_freq_factor"]
    part = (old / lengths - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    smooth = (1 - part) * found / scaling["factor"] + part * found
    scaled = torch.where(lengths > low, found / scaling["factor"], found)
    return torch.where((lengths <= low) & (lengths >= high), smooth, scaled)


@pytest.mark.parametrize("name", READ)
def test_transformers_4_reads_the_same_frequencies(name: str) -> None:
    config = configuration(name)
    written = json.loads(config.to_json_string())
    older = with_older_keys(written)
    wrong = []
    for layer_type in (None,) if READ[name][3] is None else (FULL, SLIDING):
        now = frequencies_now(config, layer_type)
        torch.testing.assert_close(frequencies_then(older, name, layer_type), now)
        before = frequencies_then(written, name, layer_type)
        wrong.append(before.shape != now.shape or not torch.allclose(before, now, rtol=1e-3))
    assert any(wrong)  # without the older keys


@pytest.mark.parametrize("name", READ)
def test_transformers_5_reads_what_it_read(name: str) -> None:
    def of(config: Any) -> Any:
        rope = config.rope_parameters
        parts = [rope[each] for each in (FULL, SLIDING)] if FULL in rope else [rope]
        return [{key: value for key, value in part.items() if key != "type"} for part in parts]

    config = configuration(name)
    again = type(config).from_dict(with_older_keys(json.loads(config.to_json_string())))
    assert of(again) == of(config)


def test_older_keys_of_parts_and_types() -> None:
    """Parts have their own; what is written already, or has no older spelling, is left alone."""
    rope = {"rope_type": "default", "rope_theta": 5e4}
    text = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": rope}
    assert with_older_keys({"model_type": "llava", "text_config": text, "dtype": None})["text_config"] == {
        **text,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e4,
        "rope_scaling": None,
    }
    older = {"model_type": "llama", "rope_theta": 5e4, "torch_dtype": "float16"}
    assert with_older_keys(older) == older
    packed = {"model_type": "gpt2", "quantization_config": {"dtype": "int8"}}
    assert with_older_keys(packed) == packed
    newer = {"model_type": "gemma4_text", "rope_parameters": by_layer_type()}
    assert with_older_keys(newer) == newer
    factors = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0, "rope_theta": 1e4}
    phi = with_older_keys({"model_type": "phi3", "rope_parameters": factors})["rope_scaling"]
    assert phi == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}  # it refuses a fourth key


def test_a_written_configuration_that_has_all_keys_stays_byte_for_byte(tmp_path: Path) -> None:
    texts = {"config.json": '{"model_type":"llama","rope_theta":5e4}', "tokenizer_config.json": '{"eos_token":"é"}'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    make_portable(tmp_path)
    assert {name: (tmp_path / name).read_text("utf-8") for name in texts} == texts


@pytest.mark.parametrize("kind", ["merged", "full"])
def test_every_fact_is_in_each_place_where_a_program_looks(kind: str, tmp_path: Path) -> None:
    """Also if the recipe replaces the template: some programs would use the base's, in the tokenizer's file."""
    folder = written_folder(kind, tmp_path, "llama", template="{{ messages[0]['content'] }}")
    tokenizer, generation = (
        json.loads((folder / name).read_text("utf-8")) for name in ("tokenizer_config.json", "generation_config.json")
    )
    own = (folder / "chat_template.jinja").read_text("utf-8")
    assert tokenizer["chat_template"] == own == "{{ messages[0]['content'] }}"
    read = AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == own
    assert read.pad_token == tokenizer["pad_token"] == read.eos_token
    assert read(["a", "a b"], padding=True)["attention_mask"][0][-1] == 0
    settings = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (read.eos_token_id, read.pad_token_id)
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (read.eos_token_id, read.pad_token_id)


def test_numbers_and_parts_that_transformers_4_cannot_read() -> None:
    tagged = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    older = with_older_keys({"model_type": "x", **tagged, "decoder": {"model_type": "llama", **rope, **tagged}})
    assert older["time_step_limit"] == older["decoder"]["time_step_limit"] == [0.0, float("inf")]
    assert older["decoder"]["rope_theta"] == 5e4
    axial = {"model_type": "y", "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    assert with_older_keys(axial) == axial


def written_folder(kind: str, tmp_path: Path, model_type: str, template: str | None = None, **changes: Any) -> Path:
    """A folder made from a base that transformers 5 wrote: merged, of a full run, mended. `template`: the recipe's."""
    base = write_base(tmp_path / "base", model_type, **changes)
    if template is not None:  # the base has a different one, in the older place
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": "the base's"}), "utf-8")
        (base / "chat_template.jinja").unlink()
    if kind == "mended":
        write_portable_copy(base, tmp_path / "new")
        return tmp_path / "new"
    section = ModelSection(name_or_path=str(base), dtype="float32")
    model = load_model(section, device=CPU)
    if kind == "merged":
        adapter = train(model, tmp_path / "adapter")
        if template is not None:
            (adapter / TEMPLATE).write_text(template, "utf-8")
        merge(adapter, tmp_path / "new")
    else:
        attached = attach_adapter(model.net, FullSettings(), seed=0, head_name="lm_head")
        export_model(tmp_path / "new", section, model, attached, load_tokenizer(section), template, None)
    return tmp_path / "new"


def llama_folder(kind: str, tmp_path: Path) -> Path:
    return written_folder(kind, tmp_path, "llama", rope_parameters=READ["llama"][0])


@pytest.mark.parametrize("kind", ["merged", "full"])
def test_every_writer_of_model_folders_writes_both(kind: str, tmp_path: Path) -> None:
    folder = llama_folder(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5e4
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in written  # transformers 4 takes it for a mapping
    new, old = (AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "base"))
    text = "<|im_start|>user\nHéllo<|im_end|>"
    assert new(text)["input_ids"] == old(text)["input_ids"]
    assert new.all_special_ids == old.all_special_ids
    assert new.chat_template == old.chat_template


READERS = {
    "transformers 4": (
        "TUNEKIT_TRANSFORMERS4",
        "'transformers>=4.57,<5' torch",
        """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = net(input_ids=torch.tensor([ids])).logits[0].float().tolist()
""",
    ),
    "mlx-lm": (
        "TUNEKIT_MLX",
        "'mlx[cpu]' mlx-lm",
        """
import mlx.core, mlx_lm
net, tokenizer = mlx_lm.load(folder)
logits = net(mlx.core.array([ids]))[0].astype(mlx.core.float32).tolist()
""",
    ),
}
BEFORE = "import json, sys\nfolder, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
AFTER = "print('\\n' + json.dumps([tokenizer.encode(text), logits]))\n"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["merged", "full", "mended"])
@pytest.mark.parametrize("reader", READERS)
def test_other_programs_compute_the_same(reader: str, kind: str, model_type: str, tmp_path: Path) -> None:
    variable, packages, program = READERS[reader]
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(
            f"no environment of {reader}: python -m venv ENV; ENV/bin/pip install {packages}; {variable}=ENV/bin/python"
        )
    changes = {} if model_type == "llama" else {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 4}
    folder = written_folder(kind, tmp_path, model_type, rope_parameters=READ[model_type][0], **changes)
    text = "The capital of France is Paris, and that of Italy is Rome."
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    done = subprocess.run(
        [python, "-c", BEFORE + program + AFTER, str(folder), text, json.dumps(ids)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    their_ids, their_logits = json.loads(done.stdout.splitlines()[-1])
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([ids])).logits[0]
    assert their_ids == ids
    assert float((torch.tensor(their_logits) - logits).abs().max()) < 1e-4


PARTS = ("llava", "gemma3", "gemma3n", "mistral3", "qwen2_5_vl", "llava_onevision")


@pytest.mark.slow
def test_transformers_4_reads_the_parts_of_mended_folders(tmp_path: Path) -> None:
    python = os.environ.get("TUNEKIT_TRANSFORMERS4")
    if python is None:
        pytest.skip("no environment of transformers 4; see the test above")
    for kind in PARTS:
        config = CONFIG_MAPPING[kind]()
        rope = config.text_config.rope_parameters
        for frequency, part in zip((7e4, 5e3), (rope[FULL], rope[SLIDING]) if FULL in rope else (rope,), strict=False):
            part["rope_theta"] = frequency
        config.save_pretrained(tmp_path / f"{kind}-5")
        write_portable_copy(tmp_path / f"{kind}-5", tmp_path / kind)
    program = "import json, sys; from transformers import AutoConfig; kinds = sys.argv[1:]\n"
    program += "parts = [AutoConfig.from_pretrained(kind).text_config for kind in kinds]\n"
    program += "print(json.dumps([[getattr(part, 'rope_local_base_freq', None), part.rope_theta] for part in parts]))"
    done = subprocess.run(
        [python, "-c", program, *(str(tmp_path / kind) for kind in PARTS)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[5e3 if "gemma3" in kind else None, 7e4] for kind in PARTS]


def test_a_link_to_a_private_file_is_not_copied(tmp_path: Path) -> None:
    """Links of a downloaded folder could publish it. Links of the hub's cache, and to the same file, are followed."""
    base, blobs, secret = write_base(tmp_path / "base", "llama"), tmp_path / "blobs", tmp_path / "id_rsa"
    blobs.mkdir()
    (base / "config.json").rename(blobs / "0123")
    (base / "config.json").symlink_to(blobs / "0123")
    (base / "model.safetensors").rename(tmp_path / "model.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    write_portable_copy(base, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").is_file()
    secret.write_text("key")
    processor: Any = SimpleNamespace(save=lambda folder: None)
    (base / "NOTICE.txt").symlink_to(secret)
    with pytest.raises(ModelError, match=r"NOTICE\.txt: is a link to .*id_rsa, outside of the model folder"):
        write_portable_copy(base, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ModelError, match=r"NOTICE\.txt: is a link"):
        copy_other_files(ModelSection(name_or_path=str(base)), base, processor, None, tmp_path / "copy", None)
