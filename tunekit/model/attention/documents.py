"""Attention within each document of a packed row, without a mask of T x T.

transformers gives every layer what its mask function returns. Ours returns a DocumentMask where the forward has
segments; the attention functions take that apart and hand each document to the function they replace. So scaling,
grouped heads, soft caps and sinks stay that function's business, and a layer whose mask is not made by transformers'
mask function keeps the mask it has.
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
from tunekit.machine.placing import placed
from tunekit.model.attention.cpu_kernel import LONGEST_TOKENS, attend_causally
from tunekit.model.attention.segments import Segments
from tunekit.model.call import Call, calling, current_call
from tunekit.model.pretrained import as_pretrained, config_of, text_config
from tunekit.model.transformers_guard import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUFFIX = "_per_document"
LOOPED = ("sdpa", "eager")  # attention functions that the loop can call
PRODUCTS = "products" + SUFFIX  # matrix products, on a CPU in place of sdpa
VARLEN = "varlen" + SUFFIX  # torch's own kernel over documents, for half precision on CUDA
CAPABILITY = (8, 0)  # of a GPU that has this kernel
HEAD_SIZES = range(8, 257, 8)  # that it takes

# Families on which tests compare documents in a packed row with the same documents alone.
PROVEN = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "phi3"),
        *("olmo2", "smollm3", "starcoder2", "mixtral", "gpt_neox", "gpt2", "phi", "opt", "gpt_oss"),
    ]
)


def keeps_documents_apart(net: nn.Module) -> bool:
    """Whether documents of a row surely do not see each other: attended one by one, in a family that tests prove."""
    return str(config_of(net)._attn_implementation).endswith(SUFFIX) and text_config(net).model_type in PROVEN


def shares_prefixes(net: nn.Module, longest: int) -> bool:
    """Whether a document of a row may begin with tokens of another one that are computed there: attention of plain
    documents of up to `longest` tokens, which no window cuts short."""
    plain = not str(config_of(net)._attn_implementation).startswith(LOOPED[1])
    return plain and keeps_documents_apart(net) and within_windows(net, longest)


def within_windows(net: nn.Module, longest: int) -> bool:
    """Whether no token of a document so long is beyond a window of the net's attention."""
    window = getattr(text_config(net), "sliding_window", None)
    return window is None or longest <= int(window)


class DocumentMask:
    """Stands where a layer gets its mask: the documents, and what is masked inside one beyond what is to come."""

    def __init__(self, segments: Segments, allowed: Callable[..., Tensor] | None, device: torch.device) -> None:
        self.segments, self.allowed, self.device = segments, allowed, device
        self._blocks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._boundaries: tuple[Tensor, Tensor] | None = None
        self._places: dict[int, Tensor] = {}

    def block(self, row: int, start: int, length: int, seen: int, dtype: torch.dtype = torch.bool) -> Tensor | None:
        """(1, 1, L, L) of one document: True, or 0 in a floating `dtype`, where a token is seen; None: all before.
        (1, 1, L, S) of one that sees S keys, because it begins with tokens of another one."""
        if self.allowed is None and seen == length:
            return None
        found = self._blocks.get((row, start, dtype))
        if found is None:
            if self.allowed is None:
                found = torch.ones(1, 1, length, seen, dtype=torch.bool, device=self.device).tril(seen - length)
            else:
                assert not self.segments.shared, "shares_prefixes tells where a mask has more to say"
                index = torch.arange(start, start + length, device=self.device)
                fixed = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self.device)
                found = self.allowed(fixed + row, fixed, index[None, None, :, None], index[None, None, None, :])
                found = found.expand(1, 1, length, length)
            found = found if dtype == torch.bool else as_added(found, dtype)
            self._blocks[row, start, dtype] = found
        return found

    def boundaries(self) -> tuple[Tensor, Tensor]:
        """(documents + 1,) int32 on the device: where documents begin in the flattened tokens, and in their keys."""
        if self._boundaries is None:
            ends = (self.segments.boundaries(), self.segments.key_boundaries())
            first, second = (placed(torch.tensor(each, dtype=torch.int32), self.device) for each in ends)
            self._boundaries = first, second
        return self._boundaries

    def keys_of(self, row: int, tensor: Tensor) -> Tensor:
        """Keys or values of a row's documents, one after the other. Shapes: (G, T, D) -> (G, U, D)."""
        if not self.segments.shared:
            return tensor
        if row not in self._places:
            self._places[row] = placed(self.segments.places(row), self.device)
        return tensor.index_select(1, self._places[row])


LayerMask = DocumentMask | Tensor | None
AttentionOutput = tuple[Tensor, Tensor | None]  # (B, T, H, D), and the weights where a function gives them


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores: 0 where a key is seen."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def attend_per_document(net: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let the net attend document by document, where its layers take their attention from transformers' table."""
    config = config_of(net)
    plain = str(config._attn_implementation)
    if plain not in LOOPED or not getattr(net, "_supports_attention_backend", False):
        return
    _register()
    kernel = plain == "sdpa" and dtype != torch.float32 and takes_documents(device, config)
    products = plain == "sdpa" and device.type == "cpu"
    config._attn_implementation = VARLEN if kernel else PRODUCTS if products else plain + SUFFIX
    if not (text_config(net).model_type in PROVEN or _runs(net)):
        config._attn_implementation = plain


def takes_documents(device: torch.device, config: PreTrainedConfig) -> bool:
    """Whether torch's kernel over documents runs on `device` with this model's heads; a GPU that is planned for and is
    not here is taken to have it."""
    if capability(device) < CAPABILITY or _varlen() is None:
        return False
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size in HEAD_SIZES


def uncompiled_attention() -> None:
    """Let compiled layers call attention over documents as it is: a kernel, or a loop whose length differs from batch
    to batch."""
    from transformers import AttentionInterface

    _register()
    for name, function in _functions().items():
        AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def may_be_packed(net: nn.Module) -> bool:
    """Whether the net may keep the rows of a sequence apart: it attends document by document, or its mask is made from
    the positions, or nothing can be told without values."""
    from transformers import masking_utils

    name, asked = "find_packed_sequence_indices", list[bool]()
    if str(config_of(net)._attn_implementation).endswith(SUFFIX) or not hasattr(masking_utils, name):
        return True
    try:
        trial = _trial_of(net)
    except Exception:  # the model's own code
        return True
    with suppress(Exception), replaced(vars(masking_utils), **{name: lambda positions: asked.append(True)}):
        trial()
    return bool(asked)


_tried: dict[type, bool] = {}


def _runs(net: nn.Module) -> bool:
    """Whether the layers of this class take a DocumentMask at all; found out once, without values."""
    if type(net) not in _tried:
        _tried[type(net)] = False
        with suppress(Exception), calling(Call(segments=Segments(((3, 2),)))), known_documents():
            _trial_of(net)()
            _tried[type(net)] = True
    return _tried[type(net)]


def _trial_of(net: nn.Module) -> Callable[[], object]:
    """A forward of 5 tokens through a net of this kind without values; it raises whatever the model's code raises."""
    with torch.device("meta"):
        # The dtype is the one in which experts' kernels run there.
        trial = as_pretrained(net)._from_config(config_of(net), dtype=torch.bfloat16)

    def run() -> None:
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 5, dtype=torch.int64)
            trial(input_ids=ids, position_ids=ids, use_cache=False)

    return run


@cache
def _register() -> None:
    """Make our names known to transformers, once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in _functions().items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _mask_function("eager" if function is _eager else "sdpa"))


def _functions() -> dict[str, Callable[..., AttentionOutput]]:
    """Our attention functions by the names under which transformers knows them."""
    return {LOOPED[0] + SUFFIX: _sdpa, LOOPED[1] + SUFFIX: _eager, VARLEN: _kernel, PRODUCTS: _products}


def known_documents() -> AbstractContextManager[None]:
    """A block in which transformers is told whether rows are packed, where the Call knows.

    Its own search asks the device: a wait in every forward, and impossible without values.
    """
    from transformers import masking_utils

    segments, name = current_call().segments, "find_packed_sequence_indices"
    if segments is None or not hasattr(masking_utils, name):
        return nullcontext()
    return replaced(vars(masking_utils), **{name: partial(_documents_of_tokens, segments)})


def _documents_of_tokens(segments: Segments, position_ids: Tensor) -> Tensor | None:
    """The document of each token (B, T); None where every row is a single document."""
    if segments.single:
        return None
    before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids != before + 1).cumsum(-1)


def _mask_function(plain: str) -> Callable[..., object]:
    """transformers' mask function of `plain`, but a DocumentMask where the forward has segments."""

    def make_mask(*, mask_function: Callable[..., Tensor], device: torch.device | str, **named: object) -> object:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        segments = current_call().segments
        padded, scripted = named.get("attention_mask") is not None, named.get("use_vmap", False)
        if segments is None or segments.single or segments.masked or padded or scripted:
            return ALL_MASK_ATTENTION_FUNCTIONS[plain](mask_function=mask_function, device=device, **named)
        local = cast("int | None", named.get("local_size"))  # a window or a chunk
        causal = plain == "sdpa" and (local is None or segments.longest <= local)
        return DocumentMask(segments, None if causal else mask_function, torch.device(device))

    return make_mask


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _each_document(sdpa_attention_forward, torch.bool, module, (query, key, value), attention_mask, named)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """The plain attention of the module's own file, which knows its soft cap and its sinks."""
    from importlib import import_module

    plain = import_module(type(module).__module__).eager_attention_forward
    return _each_document(plain, query.dtype, module, (query, key, value), attention_mask, named)


def _kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """All documents in one call of torch's kernel; what it does not know goes document by document."""
    fits = query.shape[-1] == key.shape[-1] == value.shape[-1] in HEAD_SIZES and query.shape[2] == key.shape[2]
    other = not fits or named.get("dropout") or named.get("position_bias") is not None
    if not isinstance(attention_mask, DocumentMask) or attention_mask.allowed is not None or other:
        return _sdpa(module, query, key, value, attention_mask, **named)
    tokens = [query.transpose(1, 2).flatten(0, 1)]  # (B * T, H, D)
    for tensor in (key, value):
        rows = (attention_mask.keys_of(row, each).transpose(0, 1) for row, each in enumerate(tensor.unbind(0)))
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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerMask, **named: object
) -> AttentionOutput:
    """Causal attention of whole documents by matrix products; what is otherwise, or a long document, goes to sdpa."""
    asked = named.get("is_causal")
    whole = attention_mask is None and query.shape[2] == key.shape[2]
    rows: tuple[tuple[int, ...], ...] = ((query.shape[2],),) * query.shape[0] if whole else ()
    shared = None
    if isinstance(attention_mask, DocumentMask) and attention_mask.allowed is None:
        rows, shared = attention_mask.segments.rows, attention_mask if attention_mask.segments.shared else None
    longest = max(map(max, rows), default=0)
    causal = getattr(module, "is_causal", True) if asked is None else asked
    beyond = any(named.get(name) is not None for name in ("softcap", "position_bias")) or named.get("dropout")
    if not rows or not causal or beyond or query.shape[1] % key.shape[1] or (longest > LONGEST_TOKENS and whole):
        return _sdpa(module, query, key, value, attention_mask, **named)
    if longest > LONGEST_TOKENS and shared is None:
        return _each_document(_products, torch.bool, module, (query, key, value), attention_mask, named)
    scaling = cast("float | None", named.get("scaling"))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    found = []
    for row, (q, k, v, lengths) in enumerate(zip(query.unbind(0), key.unbind(0), value.unbind(0), rows, strict=True)):
        seen = []
        if shared is not None:
            k, v, seen = shared.keys_of(row, k), shared.keys_of(row, v), [shared.segments.seen(row)]
        found.append(attend_causally(q, k, v, lengths, scale, *seen))  # (T, H, D)
    return torch.stack(found) if len(found) > 1 else found[0][None], None  # (B, T, H, D)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's attention over documents of different lengths, where this torch has it; the first one took no scale."""
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
    *rest: object,
    enable_gqa: bool,
    **named: object,
) -> Tensor:
    """For a torch whose function wants as many heads of keys as of queries. Shapes: (T, H, D), (T, G, D) twice."""
    groups = query.shape[1] // key.shape[1]
    whole = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return attend(query, *whole, *rest, **named)


def _each_document(
    attend: Callable[..., AttentionOutput],
    block_dtype: torch.dtype,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: LayerMask,
    named: dict[str, object],
) -> AttentionOutput:
    """`attend` over each document. Shapes: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    Rows are taken apart by unbind and split, whose backward passes put gradients together in one go: a slice for each
    document would make a whole row of zeros for each.
    """
    if not isinstance(mask, DocumentMask):
        return attend(module, *tensors, mask, **named)
    bias = cast("Tensor | None", named.pop("position_bias", None))  # (1 or B, H, T, T)
    rows = []
    for row, parts in enumerate(zip(*(tensor.unbind(0) for tensor in tensors), strict=True)):
        lengths, start, outputs = mask.segments.rows[row], 0, []
        keys = [torch.split(mask.keys_of(row, part), list(mask.segments.seen(row)), dim=1) for part in parts[1:]]
        for pieces in zip(parts[0].split(lengths, dim=1), *keys, strict=True):
            length, seen = (piece.shape[1] for piece in pieces[:2])
            if bias is not None:
                assert not mask.segments.shared, "no objective of an encoder-decoder lays pairs end to end"
                place = slice(start, start + length)
                named["position_bias"] = bias[row if bias.shape[0] > 1 else 0, :, place, place][None]
            block = mask.block(row, start, length, seen, block_dtype)
            outputs.append(attend(module, *(piece[None] for piece in pieces), block, **named)[0])  # (1, L, H, D)
            start += length
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows) if len(rows) > 1 else rows[0], None
