"""A folder for `ollama create`: GGUF files and a Modelfile with the chat template, the stop texts and the settings.

The adapter is a .gguf file too: Ollama's own conversion of adapters has another order of rows than llama.cpp.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunekit.errors import Problem
from tunekit.exports import gguf
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.go_template import TurnTexts, derive_turns
from tunekit.exports.programs.program import Program
from tunekit.model.storage.source import read_json
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.targets.exportable import Exportable

TAKES, OPTIONS, SUFFIX, PROGRAM = gguf.TAKES, gguf.OPTIONS, "", gguf.PROGRAM
MODEL, BASE, ADAPTER = "model.gguf", "base.gguf", "adapter.gguf"
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json
NAMES = {"repetition_penalty": "repeat_penalty"}
PLAIN = "{{ .Prompt }}"  # of a model without a chat template


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to export: limits of GGUF, or a chat template that writes more than fixed texts around each
    message."""
    wrong = gguf.problems(exportable, options)
    if _has_template(exportable) and _turns(exportable) is None:
        what = (
            "the chat template writes more than fixed texts around each message, which Ollama's TEMPLATE cannot express"
        )
        how = "train with a simpler template (data.chat_template: FILE), or use --to gguf with llama.cpp"
        wrong.append(Problem(what, how, key="--to"))
    return wrong


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the Modelfile, and GGUF files of base and adapter or of the merged model."""
    path.mkdir()
    lines, notes = [f"FROM ./{MODEL}"], tuple[str, ...]()
    if gguf.writes_adapter(exportable, options):
        gguf.write_base(exportable, path / BASE)
        notes = gguf.write(exportable, path / ADAPTER, evidence, options).notes[:-1]
        lines, what = [f"FROM ./{BASE}", f"ADAPTER ./{ADAPTER}"], "adapter"
    else:
        written = gguf.write(exportable, path / MODEL, evidence, options)
        what, notes = written.what, written.notes[:-1]
    (path / "Modelfile").write_text("\n".join([*lines, *_settings(exportable), ""]), "utf-8")
    notes += _template_notes(_turns(exportable))
    return Exported(path, what, (*notes, f"use it with: ollama create {evidence.name} -f {path}/Modelfile"))


def _template_notes(turns: TurnTexts | None) -> tuple[str, ...]:
    """Notes on the differences between Ollama's prompts and the chat template's. Ollama does not report them."""
    notes = []
    if turns is not None and "system" not in turns.before:
        notes.append("the chat template has no system message, so Ollama leaves out SYSTEM and system messages")
    if turns is not None and turns.trims:
        what = "the chat template removes spaces around a message, and Ollama does not"
        notes.append(f"{what}: send messages without such spaces")
    return tuple(notes)


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare llama.cpp's answers with torch's, because Ollama runs llama.cpp. The template was compared when it
    was derived."""
    file = replace(written, path=written.path / (ADAPTER if written.what == "adapter" else MODEL))
    certificate = gguf.certify_files(file, exportable, program, written.path / BASE, questions(), options)
    return replace(certificate, note="llama.cpp was run in place of Ollama, which computes with llama.cpp.")


def _settings(exportable: Exportable) -> list[str]:
    turns = _turns(exportable)
    template = PLAIN if turns is None else turns.as_go()
    lines = [f'TEMPLATE """{template}"""']
    file = exportable.folder / "generation_config.json"
    settings = read_json(file) if exportable.gguf_file is None and file.is_file() else {}
    if settings.get("do_sample"):
        numbers = {name: settings[name] for name in SETTINGS if type(settings.get(name)) in (int, float)}
        lines += [f"PARAMETER {NAMES.get(name, name)} {number}" for name, number in numbers.items()]
    return lines + [
        f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}"
        for text in _stops(exportable, settings.get("eos_token_id"))
    ]


def _stops(exportable: Exportable, ends: object) -> list[str]:
    """The texts of the tokens that end an answer."""
    tokenizer = exportable.processor.tokenizer
    assert isinstance(tokenizer, LoadedTokenizer)
    answering = None if exportable.objective is None else exportable.objective.answering
    changed = None if answering is None else answering.generation.get("eos_token_id")
    named = changed or ends or tokenizer.eos_id
    ids = named if isinstance(named, list | tuple) else [named]
    return list(dict.fromkeys(tokenizer.token_text(each) for each in ids if isinstance(each, int)))


def _has_template(exportable: Exportable) -> bool:
    tokenizer = exportable.processor.tokenizer
    return tokenizer is not None and (exportable.target.chat_template or tokenizer.chat_template) is not None


def _turns(exportable: Exportable) -> TurnTexts | None:
    """The fixed texts of the chat template, without the first token that llama.cpp adds to every text."""
    tokenizer = exportable.processor.tokenizer
    if tokenizer is None or not _has_template(exportable):
        return None
    render = partial(tokenizer.render, template=exportable.target.chat_template)
    turns = derive_turns(lambda messages, answer: render(messages, add_generation_prompt=answer))
    if turns is None or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return turns
    start = tokenizer.token_text(tokenizer.bos_id)
    if "system" in turns.before:
        turns.before["system"] = turns.before["system"].removeprefix(start)
    return replace(turns, opening=turns.opening.removeprefix(start))
