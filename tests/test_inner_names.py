"""The places where tunekit leans on the inside of another library: one row each, and one test each, named after the
name. A release that moves a name fails its row.

A name is inner if the library's documentation does not state it: a name that begins with an underscore, a module below
the documented ones, an argument or a result that only the source shows, or a name that tunekit replaces.
`test_every_inner_name_has_a_row` walks the source of tunekit, so that the table cannot lack one.

Three kinds of code are left out. Files in exports/programs/inside run in environments of other programs, and
exports/llama_cpp/converter.py runs llama.cpp's own converter: both name the version for which they are written.
Names in recipe/foreign are words of other tools' files, which tunekit reads without those tools.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from tunekit.adapters.kernels.gated import is_gated_mlp
from tunekit.adapters.kernels.norms import computes_rms_norm
from tunekit.adapters.method import load_method
from tunekit.model.families.routers import FORMULA
from tunekit.model.quantized.codec import import_bitsandbytes
from tunekit.model.transformers_guard import FETCHERS, KERNEL_USERS, replaced
from tunekit.recipe.reading.names import known_names

PACKAGE = Path(__file__).resolve().parent.parent / "tunekit"
OPTIONAL = ("lm_eval", "liger_kernel", "diffusers", "kernels")  # of extras: their rows need the package


@dataclass(frozen=True)
class Row:
    """An inner name. `files`: the files of tunekit that use it, without .py. `breaks`: what fails without it. `holds`:
    whether the name is as tunekit expects, perhaps of the object with this name; None: it exists. `word`: the word in
    these files, if it is not the name's last part."""

    name: str
    files: str
    why: str
    breaks: str
    holds: Callable[..., object] | None = None
    word: str = ""


def found(name: str) -> Any:
    """The object with this dotted name. Raises: ImportError or AttributeError."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            continue
        return functools.reduce(getattr, parts[count:], value)
    raise ImportError(name)


def accepts(function: str | Callable[..., object], *names: str) -> bool:
    """Whether a function declares these arguments."""
    own = found(function) if isinstance(function, str) else function
    return set(names) <= inspect.signature(own).parameters.keys()


def has(kind: str, *names: str) -> bool:
    """Whether an object of this name has these attributes."""
    return all(hasattr(found(kind), name) for name in names)


def declares(operation: str, *names: str) -> bool:
    """Whether an operation of torch declares these arguments."""
    return set(names) <= {argument.name for argument in found(operation).default._schema.arguments}


SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(kind: str, device: str = "meta", **settings: object) -> Any:
    """A net of a class of transformers, such as MixtralForCausalLM."""
    net = getattr(transformers, kind)
    with torch.device(device):
        return net(net.config_class(**SIZES, **settings)).eval()


llama = functools.cache(functools.partial(tiny, "LlamaForCausalLM"))


def cache_of(config: Any) -> Any:
    """An empty key-value cache of a net with this configuration."""
    return transformers.DynamicCache(config=config)


# --- what rows check in more than one line ----------------------------------------------------------------------------


def sets_attention_of_parts() -> bool:
    config = transformers.Gemma3Config(text_config=SIZES, vision_config={"num_hidden_layers": 1, "image_size": 8})
    config._attn_implementation = {"": "eager", "text_config": "sdpa"}
    return (config._attn_implementation, config.text_config._attn_implementation) == ("eager", "sdpa")


def asks_for_documents() -> bool:
    asked = list[Tensor]()
    module = found("transformers.masking_utils")
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    with replaced(vars(module), find_packed_sequence_indices=lambda positions: asked.append(positions)):
        llama()(input_ids=ids, position_ids=ids, use_cache=False)
    return bool(asked)


def passes_its_inputs() -> bool:
    """Whether `generate` hands its inputs to `custom_generate`, under the names that tunekit drops or passes on."""
    settings = transformers.GenerationConfig(max_new_tokens=1, pad_token_id=0, eos_token_id=None, use_cache=True)
    ids = torch.zeros(1, 3, dtype=torch.int64)

    def loop(net: nn.Module, input_ids: Tensor, *_: object, **named: object) -> set[str]:
        assert input_ids.shape == ids.shape
        return {*named}

    names = tiny("LlamaForCausalLM", "cpu").generate(input_ids=ids, generation_config=settings, custom_generate=loop)
    return names >= {"logits_processor", "stopping_criteria", "generation_config", "use_cache"}


def initialises_again() -> bool:
    net, linear = tiny("LlamaForCausalLM", "cpu"), nn.Linear(4, 4)
    nn.init.zeros_(linear.weight)
    vars(linear)["_is_hf_initialized"] = False
    net._init_weights(linear)
    return bool(linear.weight.any()) and "_is_hf_initialized" in inspect.getsource(type(net)._initialize_weights)


def follows_the_clock() -> bool:
    template = "{{ strftime_now('%Y') }}"
    compiled = found("transformers.utils.chat_template_utils._compile_jinja_template")(template)
    with replaced(compiled.environment.globals, strftime_now=lambda _: "then"):
        render = found("transformers.utils.chat_template_utils.render_jinja_template")
        return render([[{"role": "user", "content": ""}]], chat_template=template)[0] == ["then"]


def splits_experts() -> bool:
    net, name = tiny("MixtralForCausalLM", num_local_experts=2), "model.layers.0.mlp.experts.gate_up_proj"
    pieces = found("transformers.core_model_loading.revert_weight_conversion")(net, {name: net.get_parameter(name)})
    return len(pieces) == 4 and all(piece.dim() == 2 for piece in pieces.values())


def keeps_wo_in_float32() -> bool:
    with torch.device("meta"):
        net = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8))
    patterns = list(net._get_dtype_plan(torch.float16))
    wanted = found("transformers.core_model_loading.build_glob_alternation")(patterns)[0]
    return bool(wanted.search("encoder.block.0.layer.1.DenseReluDense.wo.weight")) and not wanted.search(
        "shared.weight"
    )


def scales_rotary_embeddings() -> bool:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(**SIZES, rope_parameters={**rope, "original_max_position_embeddings": 64})
    make = found("transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS")["llama3"]
    return make(config, torch.device("cpu"))[0].shape == (2,)


def processes_rows() -> bool:
    module = found("transformers.modeling_gguf_pytorch_utils")
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
    rows = found("numpy").arange(8)
    by_kind = module.TENSOR_PROCESSORS["llama"](config=config).process(weights=rows, name="blk.0.attn_q.bias").weights
    plain = module.TensorProcessor(config=config).process(weights=rows, name="blk.0.attn_q.bias").weights
    return sorted(by_kind) == [*rows] and [*plain] == [*rows]


def names_gguf_tensors() -> bool:
    module = found("transformers.modeling_gguf_pytorch_utils")
    names = module.get_gguf_hf_weights_map(llama(), module.TensorProcessor(config={}))
    return names["blk.1.attn_q.weight"] == "model.layers.1.self_attn.q_proj.weight"


@functools.cache
def gguf_file(folder: Path) -> str:
    import gguf

    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", found("numpy").zeros((2, 8), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / "tiny.gguf")


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    SHARED.folder = SHARED.folder or tmp_path_factory.mktemp("inner")


SHARED = SimpleNamespace(folder=None)


def reads_metadata() -> bool:
    values, _ = found("transformers.integrations.gguf.read_gguf_metadata")(gguf_file(SHARED.folder))
    return values["general.architecture"] == "llama" and values["tokenizer.ggml.model"] == "gpt2"


def reads_tokens() -> bool:
    read = found("transformers.integrations.gguf.get_gguf_tokenizer")
    return [*read(gguf_file(SHARED.folder))[1]["tokens"]] == ["a", "b"]


def reads_merges_through_the_module() -> bool:
    module = found("transformers.integrations.gguf.gguf_tokenizer_mapping")
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    return any("get_merges" in function.__code__.co_names for function in functions)


def lists_tensors() -> bool:
    import gguf

    (tensor,) = gguf.GGUFReader(gguf_file(SHARED.folder)).tensors
    return (tensor.name, tensor.tensor_type.name, [*tensor.shape], tensor.data.shape) == (
        *("token_embd.weight", "F32", [8, 2]),
        (2, 8),
    )


def imports_the_reader_late() -> bool:
    """Whether transformers takes the functions from gguf when it reads a file, so that a replaced one is used."""
    source = inspect.getsource(found("transformers.modeling_gguf_pytorch_utils"))
    return all(
        re.search(rf"\n +from gguf import .*\b{name}\b", source) for name in ("GGUFReader", "get_tensor_name_map")
    )


def attends_through_the_module() -> bool:
    calls = list[object]()
    states = torch.zeros(1, 2, 3, 4)
    attend = transformers.AttentionInterface()["sdpa"]
    module = SimpleNamespace(is_causal=True, training=False)
    plain = functional.scaled_dot_product_attention
    with replaced(vars(functional), scaled_dot_product_attention=lambda *a, **k: calls.append(0) or plain(*a, **k)):
        attend(module, states, states, states, None)
    return bool(calls)


def multiplies_groups() -> bool:
    rows, matrices = torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(1, 16, 16, dtype=torch.bfloat16)
    offsets = torch.tensor([2], dtype=torch.int32)
    return bool((torch._grouped_mm(rows, matrices, offs=offsets) == 16).all())


def dispatches() -> bool:
    """Whether a dispatch mode sees every operation, with its name, and tree functions see the tensors in its inputs."""
    tree, seen = found("torch.utils._pytree"), list[tuple[str, int]]()

    class Seen(found("torch.utils._python_dispatch.TorchDispatchMode")):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
            seen.append((func._schema.name, len(tree.tree_leaves(args))))
            return func(*tree.tree_map(lambda leaf: leaf, args), **(kwargs or {}))

    with Seen():
        torch.cat([torch.ones(1), torch.ones(1)])
    return ("aten::cat", 2) in seen


def knows_storages() -> bool:
    meta = torch.empty(4, device="meta")
    other = torch.empty(4, device="meta")
    return meta.untyped_storage()._cdata == meta[1:].untyped_storage()._cdata != other.untyped_storage()._cdata


def counts_versions() -> bool:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


def runs_replaced_layers() -> bool:
    net = nn.Sequential(nn.Identity())
    with replaced(net._modules, **{"0": nn.Flatten()}):
        return net(torch.ones(2, 2, 2)).shape == (2, 4)


def marks_classes() -> bool:
    import datasets

    return datasets.Features({"a": datasets.ClassLabel(names=["x"])}).to_dict()["a"]["_type"] == "ClassLabel"


def imported(name: str) -> Any:
    import_bitsandbytes()
    return found(name)


def http_error_is_the_base() -> bool:
    kind = found("huggingface_hub.errors.HfHubHTTPError")
    connection = importlib.import_module(kind.__bases__[0].__module__.partition(".")[0]).ConnectError
    return kind.__bases__[0] is kind.__mro__[1] and issubclass(connection, kind.__mro__[1])


def disables_every_bar() -> bool:
    bars = ("transformers.utils.logging.tqdm_lib.tqdm", "huggingface_hub.utils.tqdm.tqdm", "tqdm.auto.tqdm")
    return all(issubclass(found(bar), found("tqdm.tqdm")) for bar in bars)


# --- the table --------------------------------------------------------------------------------------------------------

# fmt: off
TRANSFORMERS = [
    Row("transformers.PreTrainedConfig._attn_implementation",
        "model/attention/documents model/attention/padding_free model/attention/earlier_keys model/load "
        "model/storage/inspection adapters/kernels/native",
        "chooses the attention function of a loaded net; set_attn_implementation refuses some names of ours",
        "packed rows, rows without padding and the native kernels", sets_attention_of_parts),
    Row("transformers.AutoModelForCausalLM._model_mapping",
        "model/pretrained model/base_spec model/compute targets/exportable",
        "says which class an Auto class makes of a configuration, before the net is made",
        "every base: whether its family has a class is unknown",
        lambda: transformers.AutoModelForCausalLM._model_mapping[transformers.LlamaConfig]
            is transformers.LlamaForCausalLM),
    Row("transformers.PreTrainedModel._supports_sdpa", "model/compute",
        "says whether a class can use torch's attention", "attention: auto, which then chooses eager",
        lambda: transformers.LlamaForCausalLM._supports_sdpa),
    Row("transformers.PreTrainedModel._supports_attention_backend", "model/attention/documents",
        "says whether the layers look their attention function up in transformers' table",
        "packed rows: documents would not be kept apart",
        lambda: transformers.LlamaForCausalLM._supports_attention_backend),
    Row("transformers.PreTrainedModel._keep_in_fp32_modules", "model/quantized/weights model/storage/packing",
        "names layers that overflow in float16", "T5 in half precision, and T5 quantized",
        lambda: "wo" in transformers.T5ForConditionalGeneration._keep_in_fp32_modules),
    Row("transformers.PreTrainedModel._keep_in_fp32_modules_strict", "model/quantized/weights",
        "names layers that need float32 in every dtype, such as a router", "quantized mixtures of experts"),
    Row("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", "model/storage/reading",
        "names tensors of the files that the class leaves out on purpose",
        "bases with such tensors: transformers reads them, which takes longer and more memory"),
    Row("transformers.PreTrainedModel._get_dtype_plan", "model/storage/reading",
        "says which parameters from_pretrained reads in float32",
        "bases that tunekit reads itself: their numbers would differ from from_pretrained's", keeps_wo_in_float32),
    Row("transformers.core_model_loading.build_glob_alternation", "model/storage/reading",
        "turns this plan's patterns into one expression",
        "bases that tunekit reads itself: their numbers would differ from from_pretrained's", keeps_wo_in_float32),
    Row("transformers.core_model_loading.revert_weight_conversion", "model/storage/converted model/storage/reading",
        "says of which tensors of the files a fused parameter is made",
        "mixtures of experts, and every base with renamed parameters", splits_experts),
    Row("transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN", "model/families/structure",
        "names the layout of the experts of a model type", "adapter folders of mixtures of experts, as PEFT reads them",
        lambda it: it["qwen3_moe"] == "qwen2_moe"),
    Row("transformers.masking_utils.find_packed_sequence_indices", "model/attention/documents",
        "replaced: it would read positions from the device in each forward, and fails on the meta device",
        "packed rows, and the simulated run of plan", asks_for_documents),
    Row("transformers.masking_utils.sdpa_mask", "model/attention/documents",
        "tunekit's mask function is called with its arguments, and calls it", "packed rows",
        lambda: accepts(transformers.AttentionMaskInterface()["sdpa"], "mask_function", "device", "attention_mask",
            "local_size", "use_vmap"), word="AttentionMaskInterface()"),
    Row("transformers.integrations.sdpa_attention.sdpa_attention_forward", "model/attention/documents",
        "attends inside each document", "packed rows", lambda it: it is transformers.AttentionInterface()["sdpa"]),
    Row("transformers.models.llama.modeling_llama.eager_attention_forward", "model/attention/documents",
        "every model's file has a function of this name, with its soft caps and sinks",
        "packed rows of bases that cannot use sdpa",
        lambda it: accepts(it, "module", "query", "key", "value", "attention_mask", "scaling")),
    Row("transformers.PreTrainedModel._from_config", "model/attention/documents",
        "makes a second net of the class in half precision, for a test call on the meta device",
        "packed rows of families that no test covers",
        lambda: llama()._from_config(llama().config, dtype=torch.bfloat16).dtype == torch.bfloat16),
    Row("transformers.GenerationMixin._update_model_kwargs_for_generation", "model/text/cohort",
        "carries the cache and the mask from one token to the next",
        "generation of recurrent bases and of encoder-decoders",
        lambda it: accepts(it, "outputs", "model_kwargs", "is_encoder_decoder")),
    Row("transformers.GenerationMixin.prepare_inputs_for_generation", "model/text/cohort",
        "prepares the inputs of one forward; two arguments are documented nowhere",
        "generation of recurrent bases and of encoder-decoders",
        lambda it: accepts(it, "input_ids", "next_sequence_length", "is_first_iteration")),
    Row("transformers.GenerationMixin.generate.custom_generate", "model/text/cohort",
        "tunekit's loop takes the inputs that generate has prepared, by their names",
        "generation of recurrent bases and of encoder-decoders", passes_its_inputs),
    Row("transformers.cache_utils.DynamicSlidingWindowLayer", "model/text/slots",
        "is the kind of a layer with a window, which can share a key-value cache",
        "generation in batches of bases with a window",
        lambda it: all(type(layer) is it
            for layer in transformers.DynamicCache(config=transformers.MistralConfig(**SIZES,
            sliding_window=4)).layers)),
    Row("transformers.DynamicLayer.get_seq_length", "model/text/slots",
        "tunekit's cache is a subclass, and states these facts to transformers' masks", "generation in batches",
        lambda: [type(layer) for layer in cache_of(llama().config).layers]
            == [transformers.DynamicLayer] * 2 and has("transformers.DynamicLayer", "update", "get_mask_sizes")
            and {"keys", "values", "is_initialized"} <= vars(transformers.DynamicLayer()).keys()),
    Row("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.rope_type", "model/text/cohort",
        "says whether rotary factors depend on the longest row so far",
        "generation in several batches with rope_type dynamic",
        lambda: any(getattr(module, "rope_type", "") == "default" for module in llama().modules())),
    Row("transformers.cache_utils.LinearAttentionLayer", "model/text/slots",
        "the names of layers that cache something per token begin with Dynamic or Dummy, those of others do not",
        "packing of recurrent bases, and their generation: rows would affect each other",
        lambda: {type(layer).__name__ for layer in cache_of(transformers.JambaConfig()).layers}
            == {"DynamicLayer", "LinearAttentionLayer"}, word="STATELESS"),
    Row("transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock._setup_cache",
        "model/text/slots model/text/cohort", "shows that a module stores a recurrent state",
        "generation with RecurrentGemma: a row would see the state of the rows before"),
    Row("transformers.utils.chat_template_utils._compile_jinja_template", "model/text/templates",
        "a template's function strftime_now is replaced by a fixed day; a variable of this name is made a text",
        "rows of templates with today's date: they would differ tomorrow", follows_the_clock),
    Row("transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "model/parts",
        "names the classes of composite models; the public mapping would import all of them",
        "bases that also read images or audio", lambda it: "Gemma3ForConditionalGeneration" in it.values()),
    Row("transformers.models.whisper.tokenization_whisper.LANGUAGES", "model/speech/processor",
        "lists Whisper's languages", "speech: the setting language", lambda it: it["en"] == "english"),
    Row("transformers.models.whisper.tokenization_whisper.TO_LANGUAGE_CODE", "model/speech/processor",
        "turns the name of a language into its code", "speech: the setting language", lambda it: it["english"] == "en"),
    Row("transformers.models.whisper.english_normalizer.BasicTextNormalizer", "model/speech/processor",
        "normalises transcripts before they are compared", "speech: the metric word_error_rate",
        lambda it: it()("A, b").split() == ["a", "b"]),
    Row("transformers.models.whisper.english_normalizer.EnglishTextNormalizer", "model/speech/processor",
        "normalises English transcripts, with the spellings of a model's file", "speech: the metric word_error_rate",
        lambda it: it({"colour": "color"})("Colour") == "color"),
    Row("transformers.PreTrainedModel._init_weights", "model/families/heads",
        "initialises the module of a head as the class does", "new heads: they would begin with other numbers",
        initialises_again),
    Row("transformers.PreTrainedModel._initialize_weights", "model/families/heads",
        "leaves out a module that it has initialised before, by this mark on it",
        "new heads: they would begin with other numbers", initialises_again,
        word="_is_hf_initialized"),
    Row("transformers.PreTrainedModel._can_record_outputs", "model/families/routers",
        "names the routers of a mixture of experts, and the place of their logits in their outputs",
        "training.router_loss",
        lambda: all(hasattr(transformers.MixtralModel._can_record_outputs["router_logits"], name)
            for name in ("index", "target_class", "layer_name"))),
    Row("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", "model/families/routers",
        "shows that a class has the router loss that tunekit computes", "training.router_loss",
        lambda it: [ *inspect.signature(it).parameters ] == FORMULA),
    Row("transformers.Qwen2VLProcessor._get_num_multimodal_tokens", "model/images/limit",
        "counts the tokens of an image by its size", "data.image_tokens", lambda it: accepts(it, "image_sizes")),
    Row("transformers.ProcessorMixin.__call__.return_text_replacement_offsets", "model/images/processor",
        "makes a processor return the text that it writes for an image", "rows with images",
        lambda: "return_text_replacement_offsets" in inspect.getsource(transformers.ProcessorMixin.__call__)),
    Row("transformers.Gemma3Model.forward.mm_encoder_outputs", "model/families/composite",
        "takes features of images that were computed before", "rows with images",
        lambda: accepts("transformers.Gemma3Model.forward", "mm_encoder_outputs")),
    Row("transformers.Qwen2VLModel.get_rope_index", "model/images/features", "makes the positions of rows with images",
        "rows with images on Qwen-VL", lambda it: accepts(it, "mm_token_type_ids", "image_grid_thw")),
    Row("transformers.GenerationConfig._from_model_config", "model/storage/reading model/storage/programs",
        "says that generation settings come from config.json",
        "generation settings of bases without generation_config.json",
        lambda: transformers.GenerationConfig.from_model_config(llama().config)._from_model_config),
    Row("transformers.pytorch_utils.Conv1D", "model/quantized/weights",
        "is the linear layer of GPT-2, recognised by its name", "adapters on GPT-2"),
    Row("transformers.PreTrainedConfig.to_dict._name_or_path",
        "model/storage/inspection model/storage/rewrite exports/hub",
        "is a path of this machine in config.json, which is left out",
        "merged models: their config.json would name a local folder",
        lambda: transformers.LlamaConfig(name_or_path="x").to_dict()["_name_or_path"] == "x"),
    Row("transformers.BitsAndBytesConfig.to_dict._load_in_4bit", "model/storage/inspection",
        "says in config.json that weights are stored in 4 bits", "bases with weights packed by bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()["_load_in_4bit"]),
    Row("transformers.PreTrainedModel.from_pretrained.transformers_weights", "model/base_spec",
        "is a key of config.json that selects another file of weights, and is removed",
        "bases with this key: another file than the checked one would be read",
        lambda: '"transformers_weights"' in inspect.getsource(found("transformers.modeling_utils"))),
    Row("transformers.models.llama.modeling_llama.LlamaMLP.forward", "adapters/kernels/gated",
        "MLPs are recognised by their code, which kernels replace", "speed: kernels of gated MLPs would not be used",
        lambda: is_gated_mlp(llama().model.layers[0].mlp)),
    Row("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", "adapters/kernels/norms",
        "norms are recognised by their code, which kernels replace",
        "memory and speed: kernels of norms would not be used", lambda: computes_rms_norm(llama().model.norm)),
]

TRANSFORMERS += [
    Row(f"{module}.is_kernels_available", "model/transformers_guard",
        "replaced: the reader of GGUF files would ask for a kernel of the hub", "GGUF files, offline")
    for module in KERNEL_USERS
]
TRANSFORMERS += [
    Row(f"{module}.{name}", "model/transformers_guard",
        "replaced by an error: it downloads code, or runs downloaded code",
        "a base could run code that nobody has read")
    for module, names in FETCHERS.items()
    for name in names
]
TRANSFORMERS += [
    Row("transformers.integrations.hub_kernels.USE_HUB_KERNELS", "model/transformers_guard",
        "is the environment variable that forbids kernels from the hub", "a base could run code that nobody has read",
        lambda: "USE_HUB_KERNELS" in inspect.getsource(found("transformers.integrations.hub_kernels"))),
]

GGUF = [
    Row("transformers.integrations.gguf.gguf_tokenizer_mapping.get_merges", "model/text/gguf_tokenizer",
        "replaced: it would refuse the merge that tunekit writes for llama.cpp",
        "GGUF files that tunekit wrote with a tokenizer without merges", reads_merges_through_the_module),
    Row("transformers.integrations.gguf.gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS", "model/text/gguf_tokenizer",
        "names the pre-tokenizers that transformers knows",
        "GGUF files with a pre-tokenizer that tunekit does not know", lambda it: "qwen2" in it),
    Row("transformers.integrations.gguf.get_gguf_tokenizer", "model/text/gguf_tokenizer", "reads the tokens of a file",
        "GGUF files next to a tokenizer.json", reads_tokens),
    Row("transformers.integrations.gguf.read_gguf_metadata", "model/text/gguf_tokenizer",
        "reads the metadata of a file, without its lists", "GGUF files", reads_metadata),
    Row("transformers.integrations.gguf.gguf_conversion_mapping.GGUF_ARCHS", "model/storage/gguf",
        "names the architectures that transformers reads with its newer code",
        "GGUF files of these architectures: their numbers could be read wrongly", lambda it: len(it) > 0),
    Row("transformers.integrations.gguf.gguf_config_mapping.GGUF_CONFIG_ARCHS", "model/storage/gguf_settings",
        "names the architectures whose settings transformers reads completely",
        "GGUF files of these architectures: their numbers could be read wrongly", lambda it: len(it) > 0),
    Row("transformers.integrations.ggml.GGUF_CONFIG_MAPPING", "model/storage/gguf_settings",
        "names the settings of a file that transformers reads",
        "GGUF files: unknown settings would be refused, or settings would be lost",
        lambda it: it["llama"]["block_count"] == "num_hidden_layers"),
    Row("transformers.integrations.gguf.dequant.GGML_BLOCK", "model/quantized/blocks",
        "says how many numbers and bytes a block has, by the number of its type", "quantization: kept",
        lambda it: it[8] == (32, 34)),
    Row("transformers.integrations.gguf.dequant.dequantize", "model/quantized/blocks", "unpacks blocks on every device",
        "quantization: kept", lambda it: it(torch.zeros(34, dtype=torch.uint8), 8, torch.float32).numel() == 32),
    Row("transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS", "model/storage/gguf",
        "says in which order the rows of a file's matrix are",
        "GGUF files: transformers reads each whole, which takes longer and more memory", processes_rows),
    Row("transformers.modeling_gguf_pytorch_utils.TensorProcessor", "model/storage/gguf",
        "is the same for architectures whose rows keep their order",
        "GGUF files: transformers reads each whole, which takes longer and more memory", processes_rows),
    Row("transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map", "model/storage/gguf",
        "names the tensor of the net for each tensor of a file",
        "GGUF files: transformers reads each whole, which takes longer and more memory", names_gguf_tensors),
    Row("transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS", "model/storage/gguf_positions",
        "computes the rotary factors of Llama 3, which are compared with a file's", "GGUF files of Llama 3.1 and later",
        scales_rotary_embeddings),
    Row("gguf.GGUFReader", "model/storage/gguf model/storage/gguf_facts",
        "replaced for a while by a copy that remembers: transformers would parse the file several times",
        "GGUF files: each loads some seconds longer", imports_the_reader_late),
    Row("gguf.get_tensor_name_map", "model/storage/gguf",
        "names the tensor of a file for each module; replaced like the reader", "quantization: kept",
        lambda it: it(found("gguf.MODEL_ARCH.LLAMA"), 1).get_name("model.layers.0.self_attn.q_proj") == "blk.0.attn_q"),
    Row("gguf.MODEL_ARCH_NAMES", "model/storage/gguf", "numbers the architectures, for the table of names",
        "quantization: kept", lambda it: "llama" in it.values()),
    Row("gguf.ReaderTensor", "model/storage/gguf model/storage/gguf_facts",
        "is a tensor of a file: its name, type, shape and bytes", "GGUF files", lists_tensors),
    Row("gguf.GGMLQuantizationType", "model/quantized/blocks", "numbers the types of blocks", "quantization: kept",
        lambda it: it.__members__["Q8_0"] == 8),
    Row("gguf.quants.dequantize", "model/storage/gguf model/storage/gguf_positions",
        "unpacks the blocks of a file on the host", "GGUF files",
        lambda it: it(found("numpy").zeros((1, 34), "uint8"), found("gguf.GGMLQuantizationType.Q8_0")).shape == (1,
            32)),
]

ATEN = "torch.ops.aten"
SIMULATED = "the memory that plan states for a GPU: attention would count as a product of all scores"
TORCH = [
    Row("torch._int_mm", "model/quantized/codec",
        "allocates the integers that LLM.int8's product makes, in the simulated run",
        "the memory that plan states for quantization: int8",
        lambda: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8))[0, 0] == 8),
    Row("torch._scaled_mm", "model/quantized/fp8", "multiplies fp8 matrices on a GPU",
        "quantization: fp8 on a GPU, which then computes it slowly",
        lambda: declares(f"{ATEN}._scaled_mm", "scale_a", "scale_b", "out_dtype")),
    Row("torch._grouped_mm", "adapters/expert_parameters",
        "is the product of experts, as transformers calls it; the public function exists only from torch 2.10 on",
        "adapters on fused experts: each expert's matrix would be changed and copied", multiplies_groups),
    Row("torch._fused_sdp_choice", "planning/simulated/kernels", "says which kernel torch chooses for attention",
        SIMULATED,
        lambda: isinstance(torch._fused_sdp_choice(*[torch.ones(1, 1, 2, 8)] * 3, None, 0.0, True, scale=None), int)),
    *(
        Row(f"{ATEN}._scaled_dot_product_{kernel}", "planning/simulated/kernels",
            "allocates on the meta device what this kernel allocates", SIMULATED,
            functools.partial(declares, f"{ATEN}._scaled_dot_product_{kernel}", "query", "dropout_p", "scale", *others))
        for kernel, others in {
            "flash_attention_for_cpu": ("attn_mask",),
            "flash_attention": ("return_debug_mask",),
            "efficient_attention": ("attn_bias", "compute_log_sumexp"),
            "cudnn_attention": ("attn_bias", "compute_log_sumexp", "return_debug_mask"),
        }.items()
    ),
    Row(f"{ATEN}._local_scalar_dense", "planning/simulated/tracker",
        "is what `item` calls: on the meta device it gets a known value", "the simulated run of plan",
        lambda: declares(f"{ATEN}._local_scalar_dense", "self")),
    Row(f"{ATEN}._unsafe_view", "adapters/kernels/lora_products",
        "makes a tensor that autograd does not take for a view",
        "LoRA's joined products: changing an output in place fails",
        lambda: not torch.ops.aten._unsafe_view(torch.ones(2), [2])._is_view()),
    Row("torch.nn.functional.scaled_dot_product_attention", "planning/simulated/kernels",
        "replaced, because a function mode is not active in recomputation; transformers takes it from the module",
        SIMULATED, attends_through_the_module),
    Row("torch.compile", "model/quantized/codec",
        "replaced while bitsandbytes is imported, which compiles two functions",
        "time and memory of a run with bitsandbytes",
        lambda: "torch.compile(" in inspect.getsource(imported("bitsandbytes.backends.default.ops"))),
    Row("torch.distributed.distributed_c10d._get_default_store", "machine/meeting",
        "is the store of a group that Ray has formed", "runs on several machines under Ray"),
    Row("torch.distributed.distributed_c10d._abort_process_group", "machine/peers",
        "ends a group without waiting for the other ranks",
        "runs on several GPUs: after an error they would wait for ever"),
    Row("torch.nn.modules.conv._ConvNd", "model/storage/packing adapters/module_names",
        "is the class of all convolutions",
        "notes on experts that stay dense, and the parameters that adapters may change",
        lambda it: isinstance(nn.Conv2d(1, 1, 1), it)),
    Row("torch.nn.modules.batchnorm._NormBase", "model/families/structure",
        "is the class of all norms with running statistics",
        "bases with batch normalisation: training would change them", lambda it: isinstance(nn.BatchNorm2d(1), it)),
    Row("torch._ops.OpOverload._schema", "planning/simulated/tracker",
        "says whether an operation makes new tensors or changes its inputs", "the simulated run of plan",
        lambda: torch.ops.aten.add_.Tensor._schema.arguments[0].alias_info.is_write),
    Row("torch.utils._python_dispatch.TorchDispatchMode", "planning/simulated/tracker", "sees every operation of a run",
        "the simulated run of plan, and every figure of memory", dispatches),
    Row("torch.utils._pytree.tree_leaves", "planning/simulated/tracker", "finds the tensors in an operation's inputs",
        "the simulated run of plan, and every figure of memory", dispatches),
    Row("torch.utils._pytree.tree_map", "planning/simulated/tracker", "replaces these tensors",
        "the simulated run of plan, and every figure of memory", dispatches),
    Row("torch.UntypedStorage._cdata", "planning/simulated/tracker",
        "tells storages apart on the meta device, where addresses are 0",
        "the simulated run of plan, and every figure of memory", knows_storages),
    Row("torch.Tensor._base", "model/storage/converted exports/llama_cpp/activations",
        "is the tensor of which another is a view",
        "mixtures of experts: pieces would be copied; importance matrices of experts",
        lambda: (whole := torch.ones(2))[1:]._base is whole),
    Row("torch.Tensor._version", "tuned/network", "counts changes in place",
        "sweeps of trials that share one base: a change of it would not be noticed", counts_versions),
    Row("torch.nn.Module._modules", "model/families/stages model/families/pipeline/parts adapters/base",
        "replaced for a while by recorders, without a registration that would rename the layers",
        "streaming of layers; pipelines", runs_replaced_layers),
    Row("torch.nn.Module._parameters", "adapters/folder/class_names",
        "says that a module was made with parameters, also if they are None",
        "adapter folders of other classes than the base's",
        lambda: [*nn.Linear(1, 1, bias=False)._parameters] == ["weight", "bias"]),
    Row("torch.nn.Module._apply", "model/quantized/weights",
        "moves a module; a packed layer keeps the dtype of its scales", "quantized bases: `to` would round the scales",
        lambda it: accepts(it, "fn", "recurse")),
    *(
        Row(f"torch.nn.Module.{name}", "adapters/kernels/joined_lora",
            "says whether somebody reads a layer's inputs or outputs",
            "LoRA's joined products: such a hook would not be called",
            functools.partial(lambda name: name in vars(nn.Linear(1, 1)), name))
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ),
]

BITS = "torch.ops.bitsandbytes"
OTHERS = [
    Row("accelerate.utils.check_cuda_p2p_ib_support", "machine/devices",
        "says whether the driver lets GPUs exchange directly", "runs on several RTX 40 with an old driver",
        lambda it: isinstance(it(), bool)),
    Row("accelerate.tracking.LOGGER_TYPE_TO_CLASS", "artifacts/trackers", "names the class of a tracker",
        "output.report_to", lambda it: "tensorboard" in it),
    Row("accelerate.tracking.get_available_trackers", "artifacts/trackers", "names the trackers that are installed",
        "output.report_to", lambda it: isinstance(it(), list)),
    Row("datasets.Dataset._fingerprint", "data/reading/source", "is a hash of a data set's content",
        "data sets of the hub: the cache of encoded rows could be that of other rows",
        lambda: len(found("datasets.Dataset").from_dict({"a": [1]})._fingerprint) == 16),
    Row("datasets.Features.to_dict._type", "data/reading/class_names", "marks a column of class numbers in a file",
        "names of classes in saved data sets and in Parquet files", marks_classes),
    Row("huggingface_hub.errors.HfHubHTTPError.__bases__", "model/storage/source model/storage/upload",
        "its base is also the class of errors of connections, in the HTTP library",
        "the message for a network that fails", http_error_is_the_base, word="HfHubHTTPError.__"),
    Row("tqdm.tqdm.__init__", "model/transformers_guard",
        "replaced: the libraries' own switches do not disable all progress bars",
        "bars of the libraries between tunekit's lines", disables_every_bar),
    Row(f"{BITS}.gemm_4bit", "model/quantized/codec", "multiplies by a 4-bit matrix",
        "quantization: nf4 and fp4 on a GPU",
        lambda: imported("torch") and declares(f"{BITS}.gemm_4bit", "A", "B", "shapeB", "absmax", "absmax_8bit",
            "absmax_code", "absmax_offset")),
    Row(f"{BITS}.dequantize_4bit", "model/quantized/codec", "unpacks a 4-bit matrix",
        "quantization: nf4 and fp4 on a GPU",
        lambda: imported("torch") and declares(f"{BITS}.dequantize_4bit", "A", "absmax", "blocksize", "quant_type")),
    Row(f"{BITS}.dequantize_blockwise", "model/quantized/codec", "unpacks the scales of double quantization",
        "quantization: nf4 and fp4 on a GPU",
        lambda: imported("torch") and declares(f"{BITS}.dequantize_blockwise", "A", "absmax", "code", "blocksize")),
    Row(f"{BITS}.int8_mixed_scaled_mm", "model/quantized/codec", "is the product of LLM.int8", "quantization: int8",
        lambda: imported("torch") and declares(f"{BITS}.int8_mixed_scaled_mm", "A", "CA", "CB", "SCA", "SCB", "bias")),
    Row("diffusers.ConfigMixin._class_name",
        "model/families/pipeline/parts model/families/pipeline/drawing model/families/pipeline/processor",
        "names the class of each model and scheduler in a pipeline's files", "pipelines",
        lambda: json.loads(found("diffusers.DDPMScheduler")().to_json_string())["_class_name"] == "DDPMScheduler"),
    Row("diffusers.ConfigMixin._diffusers_version", "model/storage/inspection",
        "is a key of a pipeline's files that changes no number", "the fingerprint of a pipeline's base",
        lambda: "_diffusers_version" in json.loads(found("diffusers.DDPMScheduler")().to_json_string())),
    Row("lm_eval.tasks._yaml_loader.load_yaml", "evaluation/tasks/run",
        "reads the file of a task, to name its data sets", "evaluation.tasks"),
    Row("lm_eval.evaluator.get_git_commit_hash", "evaluation/tasks/run",
        "replaced: git prints a message outside a repository", "git's message between tunekit's lines"),
    Row("lm_eval.utils.get_rolling_token_windows", "evaluation/tasks/harness", "cuts a long text into windows",
        "tasks of perplexity", lambda it: accepts(it, "token_list", "prefix_token", "max_seq_len")),
    Row("lm_eval.utils.make_disjoint_window", "evaluation/tasks/harness", "makes these windows disjoint",
        "tasks of perplexity"),
    *(
        Row(f"liger_kernel.ops.{name}", "adapters/kernels/liger", "is a kernel of liger", "training.kernels: liger")
        for name in ("swiglu.swiglu_forward", "swiglu.swiglu_backward", "rms_norm.LigerRMSNormFunction")
    ),
]

# fmt: on


def peft_class(peft_type: str) -> Any:
    peft = importlib.import_module("peft")
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]


def reads_fields(method: Any) -> bool:
    """Whether PEFT's class of a method has the fields that tunekit writes and reads, and none that it leaves out."""
    names = {field.name for field in dataclasses.fields(peft_class(method.peft.peft_type))}
    return names >= {*method.peft.fields, *method.peft.fixed, *method.peft.claims} and not names & method.peft.absent


METHODS = {name: load_method(name) for name in known_names("adapters")}
OWN_PEFT_TYPES = ("BITFIT",)  # of tunekit: PEFT has no such method
PEFT = [
    Row(
        f"peft.{method.peft.peft_type}.{name}",
        f"adapters/methods/{name}",
        "PEFT's class of the method declares the fields of adapter_config.json that tunekit writes and reads",
        f"adapter folders of the method {name}, in both directions",
        functools.partial(reads_fields, method),
        word="METHOD",
    )
    for name, method in METHODS.items()
    if method.peft.peft_type not in ("", *OWN_PEFT_TYPES)
]

ROWS = [*TRANSFORMERS, *GGUF, *TORCH, *OTHERS, *PEFT]


def wants(check: Callable[..., object]) -> int:
    """How many arguments a check needs: the object, or none."""
    parameters = inspect.signature(check).parameters.values()
    return sum(each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty for each in parameters)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_inner_name(row: Row) -> None:
    library = row.name.partition(".")[0]
    if library in OPTIONAL and find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    lost = f"{row.name} has changed. Its use in tunekit: {row.why}. Without it, this breaks: {row.breaks}"
    try:
        holds = row.holds(*map(found, [row.name] * wants(row.holds))) if row.holds else [found(row.name)]
    except Exception as error:
        raise AssertionError(f"{lost} ({type(error).__name__}: {error})") from error
    assert holds, lost


def test_every_row_is_used() -> None:
    """A row names each file that uses the name, and no other file."""
    unused = [
        f"{row.name}: {file}"
        for row in ROWS
        for file in row.files.split()
        if (row.word or row.name.rpartition(".")[2]) not in (PACKAGE / f"{file}.py").read_text("utf-8")
    ]
    assert not unused
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- the walk ---------------------------------------------------------------------------------------------------------

# library -> the modules that its documentation describes; names of other modules are inner
DOCUMENTED = {
    "transformers": ("transformers", "transformers.utils", "transformers.modeling_outputs"),
    "tokenizers": tuple(
        f"tokenizers{part}" for part in ("", ".models", ".decoders", ".normalizers", ".pre_tokenizers")
    ),
    "accelerate": ("accelerate",),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.nn", "bitsandbytes.optim"),
    "datasets": ("datasets",),
    "peft": ("peft",),
    "huggingface_hub": ("huggingface_hub", "huggingface_hub.errors"),
    "safetensors": ("safetensors", "safetensors.torch"),
    "diffusers": ("diffusers",),
    "gguf": (),
    "kernels": (),
    "lm_eval": ("lm_eval", "lm_eval.tasks", "lm_eval.api.model"),
    "liger_kernel": (),
    "torch": ("",),  # everything that has no underscore
}
DOCUMENTED_NAMES = ("accelerate.tracking", "accelerate.tracking.GeneralTracker", "gguf", "lm_eval.evaluator")
LEFT_OUT = ("exports/programs/inside/", "exports/llama_cpp/converter", "recipe/foreign/")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
OF_MODULES = {*filter(PRIVATE.fullmatch, vars(nn.Module())), "_apply"}
# texts without any of these use no inner name, and need not be parsed
SUSPECT = re.compile(
    rf"(?:from |import |[\"'])(?:{'|'.join(DOCUMENTED.keys() - {'torch'})})\b|(?<!self)(?<!cls)\._[a-zA-Z]"
    rf"|\.(?:{'|'.join(OF_MODULES)})\b|import .*\b_[a-zA-Z]|ops\.bitsandbytes|[\"']_[a-z]\w*[\"']|[(,]\s*_[a-z]\w*="
)
OWN = re.compile(r"(?<=def )_[a-z]\w*|(?<=self\.)_[a-z]\w*(?=:| =|, )|(?<=    )_[a-z]\w*(?=:| =)")
LOOKUPS = ("getattr", "hasattr", "setattr", "delattr")


def is_module(name: str) -> bool:
    """Whether a name is that of a module. The library is not imported."""
    library, *parts = name.split(".")
    spec = find_spec(library)
    places = [Path(folder).joinpath(*parts) for folder in (spec and spec.submodule_search_locations) or ()]
    return any(place.is_dir() or place.with_name(f"{place.name}.py").is_file() for place in places)


@functools.cache
def is_inner(name: str) -> bool:
    """Whether a dotted name is not documented."""
    library, *parts = name.split(".")
    if any(PRIVATE.fullmatch(part) for part in parts):
        return True
    if library == "torch" or name in DOCUMENTED_NAMES:
        return name.startswith("torch.ops.bitsandbytes")
    module = library
    for part in parts:
        if not is_module(f"{module}.{part}"):
            break
        module = f"{module}.{part}"
    return module not in DOCUMENTED[library]


class File:
    """A file of tunekit: the names of libraries in it, and the private names that it defines itself."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        self.tree = ast.parse(path.read_text("utf-8"))
        self.own = set(defined(self.tree))
        self.nodes = [*ast.walk(self.tree)]
        self.imports = dict[str, str]()  # the name in the file -> its dotted name, also of other packages
        self.texts = dict[str, str]()  # constants
        for node in self.nodes:
            if isinstance(node, ast.Import):
                roots = [(alias.asname, alias.name) for alias in node.names]
                self.imports |= {own or name.split(".")[0]: name if own else name.split(".")[0] for own, name in roots}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                    self.texts[node.targets[0].id] = node.value.value
                elif isinstance(node.value, ast.Attribute) and (name := self.dotted(node.value)) is not None:
                    self.imports.setdefault(node.targets[0].id, name)

    def dotted(self, node: ast.expr) -> str | None:
        """The dotted name of an expression that begins with an imported name."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id)
        if isinstance(node, ast.Attribute) and (name := self.dotted(node.value)) is not None:
            return f"{name}.{node.attr}"
        return None

    def uses(self) -> Iterator[str]:
        """The inner names: dotted ones, and private attributes of objects with a dot in front."""
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom):
                yield from self._of_libraries(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from self._of_libraries(alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute):
                yield from self._attribute(node)
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.Subscript):
                yield from self._private(node.slice)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]\w*(\.\w+)+", str(node.value)):
                yield from (name for name in self._of_libraries([str(node.value)]) if is_module(name))

    def _of_libraries(self, names: Any) -> Iterator[str]:
        return (name for name in names if name.split(".")[0] in DOCUMENTED and is_inner(name))

    def _attribute(self, node: ast.Attribute) -> Iterator[str]:
        name = self.dotted(node)
        if name is not None:
            yield from self._of_libraries([name])
        elif PRIVATE.fullmatch(node.attr) and not self._is_own(node):
            yield f".{node.attr}"

    def _is_own(self, node: ast.Attribute) -> bool:
        """Whether an attribute is tunekit's own: defined in this file or, for `self`, in a class of another file."""
        root = node.value
        if isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super":
            return node.attr in all_own() and node.attr not in OF_MODULES
        if node.attr in self.own or node.attr in private_settings():
            return True
        return isinstance(root, ast.Name) and root.id in ("self", "cls") and node.attr in all_own() - OF_MODULES

    def _call(self, node: ast.Call) -> Iterator[str]:
        function = node.func
        if isinstance(function, ast.Name) and function.id in LOOKUPS and len(node.args) > 1:
            yield from self._private(node.args[1])
        if isinstance(function, ast.Attribute) and function.attr in ("get", "pop") and node.args:
            yield from self._private(node.args[0])
        own = self.dotted(function) if isinstance(function, ast.Name | ast.Attribute) else None
        if not (own or "").startswith("tunekit."):
            yield from (f".{word.arg}" for word in node.keywords if word.arg and PRIVATE.fullmatch(word.arg))
        if isinstance(function, ast.Name) and self.imports.get("replaced", "").endswith(".replaced"):
            yield from self._replaced(node) if function.id == "replaced" else ()

    def _private(self, node: ast.expr) -> Iterator[str]:
        """A private name that is a text, in the place of an attribute or a key."""
        value = self.texts.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", None)
        if isinstance(value, str) and PRIVATE.fullmatch(value) and value not in self.own:
            yield f".{value}"

    def _replaced(self, node: ast.Call) -> Iterator[str]:
        """The names that a call of `replaced` puts into a module; with `**`, the module itself and a star."""
        call = node.args[0]
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "vars"):
            return
        module = self.dotted(call.args[0])
        if module is not None:
            yield from (f"{module}.{word.arg or '*'}" for word in node.keywords)


def defined(tree: ast.AST) -> Iterator[str]:
    """Private names that a file defines: functions, variables, attributes of its classes. Protocols describe others."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases):
            continue
        if not isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        targets: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        for target in (inner for each in targets for inner in ast.walk(each)):
            if isinstance(target, ast.Name):
                yield target.id
            elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") in ("self", "cls"):
                yield target.attr
        yield from defined(node)


@functools.cache
def texts() -> dict[Path, str]:
    paths = {path: path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))}
    return {path: path.read_text("utf-8") for path, name in paths.items() if not name.startswith(LEFT_OUT)}


@functools.cache
def files() -> list[File]:
    """The files that may use an inner name."""
    return [File(path) for path, text in texts().items() if SUSPECT.search(text)]


@functools.cache
def all_own() -> frozenset[str]:
    """Private names that any file defines."""
    return frozenset(name for text in texts().values() for name in OWN.findall(text))


@functools.cache
def private_settings() -> frozenset[str]:
    """Private attributes of recipe sections, which other rooms read."""
    of_recipe = (text for path, text in texts().items() if path.is_relative_to(PACKAGE / "recipe"))
    return frozenset(name for text in of_recipe for name in OWN.findall(text))


def covers(row: Row, name: str) -> bool:
    """Whether a row is about a name of the walk."""
    if name.startswith("."):
        return name[1:] in row.name.split(".") or name[1:] == row.word
    name = name.removesuffix(".*")
    return row.name == name or row.name.startswith(f"{name}.") or name.startswith(f"{row.name}.")


def test_every_inner_name_has_a_row() -> None:
    rows = {file.name: [row for row in ROWS if file.name in row.files.split()] for file in files()}
    lacking = sorted(
        {
            f"{file.name}: {name}"
            for file in files()
            for name in file.uses()
            if not any(covers(row, name) for row in rows[file.name])
        }
    )
    assert not lacking, "add a row for each, or use a documented name: " + "; ".join(lacking)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from transformers.masking_utils import x", ["transformers.masking_utils.x"]),
        ("from transformers import generation as g\ng.f()", ["transformers.generation", "transformers.generation.f"]),
        ("import transformers\ntransformers.LlamaConfig._auto_class", ["transformers.LlamaConfig._auto_class"]),
        ("net._tied_weights_keys", ["._tied_weights_keys"]),
        ("getattr(net, '_no_split_modules', None)", ["._no_split_modules"]),
        ("NAME = '_no_split_modules'\nhasattr(net, NAME)", ["._no_split_modules"]),
        ("config['_commit_hash'], config.pop('_auto_class')", ["._auto_class", "._commit_hash"]),
        ("load(x, _fast_init=True)", ["._fast_init"]),
        ("import torch\ntorch._dynamo.reset()", ["torch._dynamo", "torch._dynamo.reset"]),
        ("sys.modules['transformers.integrations.peft']", ["transformers.integrations.peft"]),
        ("from huggingface_hub.constants import HF_HUB_OFFLINE", ["huggingface_hub.constants.HF_HUB_OFFLINE"]),
        ("class A:\n    def __init__(self):\n        self._own = 1\n    def f(self, other):\n        other._own", []),
        ("from transformers import LlamaConfig\nimport torch\ntorch.nn.functional.relu(LlamaConfig().hidden_size)", []),
    ],
)
def test_the_walk_finds(source: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "file.py").write_text(source)
    assert sorted(set(File(tmp_path / "file.py").uses())) == names
