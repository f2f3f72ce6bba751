"""Attention within each document of a packed row, without a T x T mask.

transformers passes the result of its mask function to every layer. tunekit's mask function returns a DocumentMask if
rows are packed. tunekit's attention functions then call the model's attention function once per document. The model's
function still applies scaling, grouped heads, soft caps and sinks. A layer that does not use transformers' mask
function keeps its own mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tunekit.machine.devices import capability
from tunekit.machine.placing import to_device
from tunekit.model.attention.cpu_kernel import MAX_TOKENS, attend_causally
from tunekit.model.attention.segments import Segments
from tunekit.model.call import Call, calling, current_call
from tunekit.model.native.attention import attend_natively
from tunekit.model.parts import is_composite, parts_apart
from tunekit.model.pretrained import as_pretrained, config_of, text_config
from tunekit.model.transformers_guard import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUFFIX = "_per_document"
LOOPED = ("sdpa", "eager")  # attention functions that can be called once per document
PRODUCTS = "products" + SUFFIX  # matrix products, which replace sdpa on a CPU
NATIVE = "native" + SUFFIX  # the same products by a compiled kernel
VARLEN = "varlen" + SUFFIX  # torch's kernel for documents of several lengths, for half precision on CUDA
CAPABILITY = (8, 0)  # minimum compute capability of the GPU
HEAD_SIZES = range(8, 257, 8)  # supported by the kernel

# Families for which tests prove that documents in a packed row equal the same documents alone.
PROVEN = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "phi3"),
        *("olmo2", "smollm3", "starcoder2", "mixtral", "gpt_neox", "gpt2", "phi", "opt", "gpt_oss"),
    ]
)


def keeps_documents_apart(net: nn.Module) -> bool:
    """Whether documents in a packed row never attend to each other: attention runs per document, in a tested family."""
    return str(config_of(net)._attn_implementation).endswith(SUFFIX) and text_config(net).model_type in PROVEN


def shares_prefixes(net: nn.Module, longest: int) -> bool:
    """Whether several documents of a row can use one copy of their common prefix. This needs attention per document
    (not eager), and no sliding window that is shorter than `longest` tokens."""
    plain = not str(config_of(net)._attn_implementation).startswith(LOOPED[1])
    return plain and keeps_documents_apart(net) and within_windows(net, longest)


def within_windows(net: nn.Module, longest: int) -> bool:
    """Whether every document of up to `longest` tokens fits into the net's attention window."""
    window = getattr(text_config(net), "sliding_window", None)
    return window is None or longest <= int(window)


class DocumentMask:
    """Replaces a layer's mask when rows are packed. `allowed`: transformers' mask function for use inside a document;
    None: causal attention."""

    def __init__(self, segments: Segments, allowed: Callable[..., Tensor] | None, device: torch.device) -> None:
        self.segments, self.allowed, self.device = segments, allowed, device
        self._blocks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._boundaries: tuple[Tensor, Tensor] | None = None
        self._key_indices: dict[int, Tensor] = {}

    def block(self, row: int, start: int, length: int, keys: int, dtype: torch.dtype = torch.bool) -> Tensor | None:
        """Mask (1, 1, L, L) of one document: True (or 0 in a floating `dtype`) where a key is visible. A
        document with a shared prefix has K > L keys, and its mask is (1, 1, L, K).

        None for causal attention without a shared prefix, which needs no mask.
        """
        if self.allowed is None and keys == length:
            return None
        mask = self._blocks.get((row, start, dtype))
        if mask is None:
            if self.allowed is None:
                mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=self.device).tril(keys - length)
            else:
                assert not self.segments.shared, "documents that share a prefix need a plain causal mask"
                index = torch.arange(start, start + length, device=self.device)
                fixed = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self.device)
                mask = self.allowed(fixed + row, fixed, index[None, None, :, None], index[None, None, None, :])
                mask = mask.expand(1, 1, length, length)
            mask = mask if dtype == torch.bool else as_bias(mask, dtype)
            self._blocks[row, start, dtype] = mask
        return mask

    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Two tensors (documents + 1,), int32 on the device: the starts of documents in the flattened tokens, and in
        the flattened keys."""
        if self._boundaries is None:
            ends = (self.segments.boundaries(), self.segments.key_boundaries())
            first, second = (to_device(torch.tensor(offsets, dtype=torch.int32), self.device) for offsets in ends)
            self._boundaries = first, second
        return self._boundaries

    def keys_of(self, row: int, tensor: Tensor) -> Tensor:
        """Gather the keys or values that each document of a row reads, document by document: (G, T, D) -> (G, U, D)."""
        if not self.segments.shared:
            return tensor
        if row not in self._key_indices:
            self._key_indices[row] = to_device(self.segments.key_indices(row), self.device)
        return tensor.index_select(1, self._key_indices[row])


LayerMask = DocumentMask | Tensor | None
AttentionOutput = tuple[Tensor, Tensor | None]  # (B, T, H, D), and the attention weights if the function returns them


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a bias that is added to the scores: 0 where a key is visible."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def attend_per_document(net: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make the net attend document by document, if its layers use transformers' table of attention functions."""
    config = config_of(net)
    plain = str(config._attn_implementation)
    if plain not in LOOPED or not getattr(net, "_supports_attention_backend", False):
        return
    _register()
    kernel = plain == "sdpa" and dtype != torch.float32 and takes_documents(device, config)
    products = plain == "sdpa" and device.type == "cpu"
    _set_implementation(net, VARLEN if kernel else PRODUCTS if products else plain + SUFFIX)
    if not (text_config(net).model_type in PROVEN or _runs(net)):
        _set_implementation(net, plain)


def _set_implementation(net: nn.Module, name: str) -> None:
    """Set the attention function of the net's layers. Loaded parts outside a language model keep theirs."""
    apart = parts_apart(net, loaded=True)
    config_of(net)._attn_implementation = {"": name, "text_config": name} if apart else name


def takes_documents(device: torch.device, config: PreTrainedConfig) -> bool:
    """Whether torch's variable-length attention kernel supports `device` and the size of this model's heads. A GPU that
    is not on this machine is assumed to be new enough."""
    if capability(device) < CAPABILITY or _varlen() is None:
        return False
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size in HEAD_SIZES


def may_be_packed(net: nn.Module) -> bool:
    """False if the net surely mixes the documents of a packed row. True if it attends document by document, if it makes
    its mask from positions, or if a trial on the meta device is impossible."""
    from transformers import masking_utils

    name, searches = "find_packed_sequence_indices", list[bool]()
    if str(config_of(net)._attn_implementation).endswith(SUFFIX) or not hasattr(masking_utils, name):
        return True
    try:
        trial = _trial_of(net)
    except Exception:  # the model's own code
        return True
    with suppress(Exception), replaced(vars(masking_utils), **{name: lambda positions: searches.append(True)}):
        trial()
    return bool(searches)


_accepts_documents: dict[type, bool] = {}


def _runs(net: nn.Module) -> bool:
    """Whether nets of this class accept a DocumentMask; tried once per class, on the meta device."""
    if type(net) not in _accepts_documents:
        _accepts_documents[type(net)] = False
        with suppress(Exception), calling(Call(segments=Segments(((3, 2),)))), known_documents():
            _trial_of(net)()
            _accepts_documents[type(net)] = True
    return _accepts_documents[type(net)]


def _trial_of(net: nn.Module) -> Callable[[], object]:
    """A function that runs 5 tokens through a meta copy of the net, or of a composite model's decoder (the forward of
    Llama 4's composite class fails in transformers 5.24). Raises the errors of the model's own code."""
    part = as_pretrained(net).get_decoder() if is_composite(net) else net
    with torch.device("meta"):
        # The dtype in which experts' kernels run on the meta device.
        trial = as_pretrained(part)._from_config(config_of(part), dtype=torch.bfloat16).eval()

    def run() -> None:
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 5, dtype=torch.int64)
            trial(input_ids=ids, position_ids=ids, use_cache=False)

    return run


@cache
def _register() -> None:
    """Register our attention functions with transformers, once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in _functions().items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _mask_function("eager" if function is _eager else "sdpa"))


def _functions() -> dict[str, Callable[..., AttentionOutput]]:
    """Our attention functions by their names in transformers' table."""
    functions = {LOOPED[0] + SUFFIX: attend_by_sdpa, LOOPED[1] + SUFFIX: _eager, VARLEN: _kernel, PRODUCTS: _products}
    return {**functions, NATIVE: partial(_products, attend=attend_natively)}


def known_documents() -> AbstractContextManager[None]:
    """Context manager: transformers takes the boundaries of packed documents from the current Call.

    transformers itself would read positions from the device. This would delay every forward, and fail on meta devices.
    """
    from transformers import masking_utils

    segments, name = current_call().segments, "find_packed_sequence_indices"
    if segments is None or not hasattr(masking_utils, name):
        return nullcontext()
    return replaced(vars(masking_utils), **{name: partial(_documents_of_tokens, segments)})


def _documents_of_tokens(segments: Segments, position_ids: Tensor) -> Tensor | None:
    """The index of each token's document, (B, T); None if every row is a single document."""
    if segments.single:
        return None
    before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids != before + 1).cumsum(-1)


def _mask_function(plain: str) -> Callable[..., object]:
    """Make a mask function for transformers. It returns a DocumentMask if rows are packed, otherwise the mask of the
    attention implementation `plain`, such as sdpa."""

    def make_mask(*, mask_function: Callable[..., Tensor], device: torch.device | str, **named: object) -> object:
        from transformers import AttentionMaskInterface

        segments = current_call().segments
        padded, scripted = named.get("attention_mask") is not None, named.get("use_vmap", False)
        if segments is None or segments.single or segments.masked or padded or scripted:
            return AttentionMaskInterface()[plain](mask_function=mask_function, device=device, **named)
        local = cast("int | None", named.get("local_size"))  # a window or a chunk
        causal = plain == "sdpa" and (local is None or segments.longest <= local)
        return DocumentMask(segments, None if causal else mask_function, torch.device(device))

    return make_mask


def attend_by_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """Attention by torch's kernel, per document of a DocumentMask. Shapes: (B, H, T, D) -> (B, T, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _each_document(sdpa_attention_forward, torch.bool, module, (query, key, value), attention_mask, named)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """Call the eager attention function in the model's own source file, which applies the soft cap and the sinks."""
    from importlib import import_module

    plain = import_module(type(module).__module__).eager_attention_forward
    return _each_document(plain, query.dtype, module, (query, key, value), attention_mask, named)


def _kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """Attention over all documents in one call of torch's kernel. Calls with unsupported arguments go to sdpa, document
    by document."""
    fits = query.shape[-1] == key.shape[-1] == value.shape[-1] in HEAD_SIZES and query.shape[2] == key.shape[2]
    other = not fits or named.get("dropout") or named.get("position_bias") is not None
    if not isinstance(attention_mask, DocumentMask) or attention_mask.allowed is not None or other:
        return attend_by_sdpa(module, query, key, value, attention_mask, **named)
    tokens = [query.transpose(1, 2).flatten(0, 1)]  # (B * T, H, D)
    for tensor in (key, value):
        rows = (attention_mask.keys_of(row, states).transpose(0, 1) for row, states in enumerate(tensor.unbind(0)))
        tokens.append(torch.cat([*rows]) if attention_mask.segments.shared else tensor.transpose(1, 2).flatten(0, 1))
    (ends, key_ends), longest = attention_mask.boundaries(), attention_mask.segments.longest
    attend = _varlen()
    assert attend is not None  # see takes_documents
    output = attend(
        *tokens, ends, key_ends, longest, longest, scale=named.get("scaling"), window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None  # (B, T, H, D)


def _products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayerMask,
    *,
    attend: Callable[..., Tensor] | None = None,
    **named: object,
) -> AttentionOutput:
    """Causal attention of documents by matrix products. Calls with other masks or long documents go to sdpa."""
    is_causal = named.get("is_causal")
    unpacked = attention_mask is None and query.shape[2] == key.shape[2]
    rows: tuple[tuple[int, ...], ...] = ((query.shape[2],),) * query.shape[0] if unpacked else ()
    shared = None
    if isinstance(attention_mask, DocumentMask) and attention_mask.allowed is None:
        rows, shared = attention_mask.segments.rows, attention_mask if attention_mask.segments.shared else None
    longest = max(map(max, rows), default=0)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    beyond = any(named.get(name) is not None for name in ("softcap", "position_bias")) or named.get("dropout")
    if not rows or not causal or beyond or query.shape[1] % key.shape[1] or (longest > MAX_TOKENS and unpacked):
        return attend_by_sdpa(module, query, key, value, attention_mask, **named)
    if longest > MAX_TOKENS and shared is None:
        products = partial(_products, attend=attend)
        return _each_document(products, torch.bool, module, (query, key, value), attention_mask, named)
    scaling = cast("float | None", named.get("scaling"))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    outputs = []
    for row, (q, k, v, lengths) in enumerate(zip(query.unbind(0), key.unbind(0), value.unbind(0), rows, strict=True)):
        key_lengths = []
        if shared is not None:
            k, v, key_lengths = shared.keys_of(row, k), shared.keys_of(row, v), [shared.segments.key_lengths(row)]
        outputs.append((attend or attend_causally)(q, k, v, lengths, scale, *key_lengths))  # (T, H, D)
    return torch.stack(outputs) if len(outputs) > 1 else outputs[0][None], None  # (B, T, H, D)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's variable-length attention function. None if this torch lacks the function or its arguments `scale` and
    `window_size`."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(names):
        return None
    attend = cast("Callable[..., Tensor]", varlen_attn)
    return attend if "enable_gqa" in names else partial(_with_all_heads, attend)


def _with_all_heads(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: object,
    enable_gqa: bool,
    **named: object,
) -> Tensor:
    """Repeat key and value heads, then call `attend`: older torch versions need as many key heads as query heads.
    Shapes: query (T, H, D), key and value (T, G, D)."""
    groups = query.shape[1] // key.shape[1]
    repeated = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return attend(query, *repeated, *others, **named)


def _each_document(
    attend: Callable[..., AttentionOutput],
    block_dtype: torch.dtype,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: LayerMask,
    named: dict[str, object],
) -> AttentionOutput:
    """Call `attend` for each document. Shapes: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    Rows are split by unbind and split, whose backward passes assemble gradients in one step; slices would allocate a
    whole row of zeros per document.
    """
    if not isinstance(mask, DocumentMask):
        return attend(module, *tensors, mask, **named)
    bias = cast("Tensor | None", named.pop("position_bias", None))  # (1 or B, H, T, T)
    rows = []
    for row, parts in enumerate(zip(*(tensor.unbind(0) for tensor in tensors), strict=True)):
        lengths, start, outputs = mask.segments.rows[row], 0, []
        keys = [torch.split(mask.keys_of(row, part), list(mask.segments.key_lengths(row)), dim=1) for part in parts[1:]]
        for pieces in zip(parts[0].split(lengths, dim=1), *keys, strict=True):
            length, key_count = (piece.shape[1] for piece in pieces[:2])
            if bias is not None:
                assert not mask.segments.shared, "documents with a position bias cannot share a prefix"
                place = slice(start, start + length)
                named["position_bias"] = bias[row if bias.shape[0] > 1 else 0, :, place, place][None]
            block = mask.block(row, start, length, key_count, block_dtype)
            outputs.append(attend(module, *(piece[None] for piece in pieces), block, **named)[0])  # (1, L, H, D)
            start += length
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows) if len(rows) > 1 else rows[0], None
