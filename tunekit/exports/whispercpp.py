"""A GGML file for whisper.cpp: the whole Whisper model in an older layout that whisper.cpp still reads."""

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tunekit.errors import InputError, Problem
from tunekit.exports.compare import difference
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.programs.program import Program
from tunekit.exports.programs.whisper_cpp import NAME, answers
from tunekit.exports.recordings import make_recordings
from tunekit.exports.whole_model import packed_problems, whole_model
from tunekit.files.tensors import tensor_bytes
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.model.storage.shards import ShardReader
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS: frozenset[str] = frozenset()
SUFFIX = ".bin"
PROGRAM = NAME
MAGIC, WIDENING = 0x67676D6C, 4  # WIDENING: of whisper.cpp's feed-forward layers
F32, F16 = 0, 1  # ggml's numbers of types; whisper.cpp aborts on matrices in F32
FREQUENCIES = 201  # of a window of 400 samples, the only one that whisper.cpp computes
SIZES = (  # of config.json, in the order of the file
    *("vocab_size", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers"),
    *("max_target_positions", "d_model", "decoder_attention_heads", "decoder_layers", "num_mel_bins"),
)
HEAD, EMBEDDING = "proj_out.weight", "model.decoder.embed_tokens.weight"
RENAMED = (  # transformers' names -> whisper.cpp's
    (r"^model\.(encoder|decoder)\.layers\.", r"\1.blocks."),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
    (r"\.embed_positions\.weight$", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
)
POSITIONS, CONVOLUTION_BIAS = ".positional_embedding", r"^encoder\.conv\d\.bias$"
LENGTH = struct.Struct("<i")
NOTE = "whisper.cpp keeps matrices and its cache in float16; its inputs were torch's log-mel features"


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to export: not a Whisper model, or layers or audio features whose sizes whisper.cpp does not
    support."""
    processor = exportable.processor
    if exportable.config.get("model_type") != "whisper" or not isinstance(processor, SpeechProcessor):
        kind = exportable.config.get("model_type", exportable.family)
        return [Problem(f"whisper.cpp reads Whisper models, and this is {kind}", "choose another --to")]
    config, frequencies = exportable.config, len(processor.extractor.mel_filters)
    wrong, widths = packed_problems(exportable), {config["encoder_ffn_dim"], config["decoder_ffn_dim"]}
    if widths != {WIDENING * config["d_model"]}:
        what = f"the model's feed-forward layers have {' and '.join(map(str, sorted(widths)))} units"
        wrong.append(Problem(f"{what}, and whisper.cpp has {WIDENING * config['d_model']}", "choose another --to"))
    if frequencies != FREQUENCIES:
        what = f"the features have {frequencies} frequencies, and whisper.cpp computes {FREQUENCIES}"
        wrong.append(Problem(what, "choose another --to"))
    return wrong


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the whole model, one tensor after the other."""
    assert isinstance(exportable.processor, SpeechProcessor)  # a problem otherwise
    with whole_model(exportable, path) as folder, path.open("wb") as file:
        sizes = [int(exportable.config[name]) for name in SIZES]
        file.write(struct.pack(f"<{len(sizes) + 2}i", MAGIC, *sizes, F16))
        _write_filters(file, exportable.processor)
        _write_vocabulary(file, exportable.processor)
        for name, tensor in _tensors(ShardReader(folder)):
            _write_tensor(file, name, tensor)
    return Exported(path, exportable.whole, (f"run it with: whisper-cli -m {path} -f RECORDING.wav",))


def _write_filters(file: BinaryIO, processor: SpeechProcessor) -> None:
    """Write the mel filters: their two sizes, then the values (bands, frequencies) in float32."""
    filters = np.ascontiguousarray(processor.extractor.mel_filters.T, np.float32)
    file.write(struct.pack("<2i", *filters.shape) + filters.tobytes())


def _write_vocabulary(file: BinaryIO, processor: SpeechProcessor) -> None:
    """Write the bytes of each token, up to the last token that is not special. whisper.cpp itself names the tokens
    after it."""
    backend = processor.tokenizer.backend
    special = {number: token.content.encode() for number, token in backend.get_added_tokens_decoder().items()}
    vocabulary = {number: token for token, number in backend.get_vocab().items() if number not in special}
    file.write(LENGTH.pack(max(vocabulary) + 1))
    for number in range(max(vocabulary) + 1):
        spelled = special.get(number) or bytes(BYTES[character] for character in vocabulary[number])
        file.write(LENGTH.pack(len(spelled)) + spelled)


def _byte_of_character() -> dict[str, int]:
    """The byte of each character in GPT-2's spelling. A printable byte is spelled as the character with its number;
    other bytes are spelled as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [number for number in range(256) if number not in printable]
    return {chr(number): number for number in printable} | {chr(256 + i): number for i, number in enumerate(others)}


BYTES = _byte_of_character()


def _tensors(reader: ShardReader) -> Iterator[tuple[str, Tensor]]:
    """(whisper.cpp's name, tensor) of each tensor for the file. Raises: InputError for a tensor that whisper.cpp
    cannot hold."""
    for stored in sorted(reader):
        name, tensor = stored, reader.read(stored)
        if stored == HEAD:
            if not torch.equal(tensor, reader.read(EMBEDDING)):
                what = "whisper.cpp uses the embedding as head, but the adapter changes only one of the two"
                raise InputError(what, "choose another --to")
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name.startswith("model.") or name.endswith(".key.bias"):
            raise InputError(f"whisper.cpp has no tensor for {stored}", "choose another --to")
        yield name, tensor[:, None] if re.match(CONVOLUTION_BIAS, name) else tensor


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor) -> None:
    """Write one tensor: matrices in float16; vectors, positions and biases of convolutions in float32.

    Layout: number of dimensions, length of the name, type, sizes from the last to the first, name, values.
    """
    exact = tensor.dim() < 2 or name.endswith(POSITIONS) or tensor.shape[-1] == 1
    encoded = name.encode()
    header = (tensor.dim(), len(encoded), F32 if exact else F16, *reversed(tensor.shape))
    file.write(struct.pack(f"<{len(header)}i", *header) + encoded)
    file.write(tensor_bytes(tensor.to(torch.float32 if exact else torch.float16).contiguous()))


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare all log-probabilities of transcripts. whisper.cpp gets the same audio features as torch."""
    recordings = make_recordings(exportable)
    compared = recordings.questions
    answered = answers(program, written.path, compared.rows, recordings.prompts, recordings.features)
    parts = {"F16": difference(compared.rows, compared.expected, answered)}
    return Certificate("whisper.cpp", program.version, compared.described, parts, NOTE)
