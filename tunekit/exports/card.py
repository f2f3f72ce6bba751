"""The model card of an export for the hub: README.md and .eval_results, made from the files of the run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tunekit import __version__
from tunekit.adapters.folder.config import TEMPLATE_NAME
from tunekit.artifacts.report.markdown import escape, markdown_table
from tunekit.artifacts.report.paired import difference_interval, different_rows
from tunekit.artifacts.report.run_costs import duration_text
from tunekit.artifacts.report.values import RunValues, Values
from tunekit.console.text import cell_text
from tunekit.model.families import make_family
from tunekit.model.storage.inspection import head_labels
from tunekit.model.storage.source import find_source
from tunekit.model.storage.upload import hub_name
from tunekit.recipe.bases.paths import is_like_path, last_name
from tunekit.recipe.model import HeadedModel
from tunekit.recipe.reading.dump import yaml_lines
from tunekit.records import JsonObject, bytes_text
from tunekit.targets.exportable import Exportable

TASKS = {  # transformers' auto class -> the hub's name of the task
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
}
NOT_STATED = "not stated"
ANSWERING = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")  # of models that answer texts
PEFT = ("from peft import PeftModel",)
_LICENCE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.MULTILINE)


def licence_of(folder: Path) -> str | None:
    """The licence that the folder's README.md names; "other" if the folder has only a licence file; None if neither."""
    card = folder / "README.md"
    named = _LICENCE.search(card.read_text("utf-8", "replace")[: 2**16]) if card.is_file() else None
    if named:
        return named[1]
    return "other" if any(folder.glob("LICEN[SC]E*")) else None


def model_card(exportable: Exportable, run: RunValues | None, what: str, name: str) -> str:
    """The text of README.md. `what`: "adapter", "merged" or "model"; `name`: the name of the repository."""
    origin = exportable.target.model.name_or_path
    if what == "model" and run is not None:  # the run trained the whole base, which its recipe names
        origin = str(run.recipe.part("model").get("name_or_path"))
    base, licence = hub_name(origin), licence_of(exportable.folder)
    auto_class = make_family(exportable.family).auto_class().__name__
    library = "peft" if what == "adapter" else "transformers"
    header: JsonObject = {"library_name": library, "tags": ["tunekit"]}
    header |= {"license": licence} if licence else {}
    if base is not None and (what != "model" or run is not None):
        header |= {"base_model": base, "base_model_relation": "adapter" if what == "adapter" else "finetune"}
    header |= {"pipeline_tag": TASKS[auto_class]} if auto_class in TASKS else {}
    if data := sorted({path for path, _ in _sources(run) if not is_like_path(path)}):
        header["datasets"] = data
    shown = base or last_name(origin)
    named = base or f"NAMESPACE/{shown}"
    lines = ["---", *yaml_lines(header), "---", "", f"# {escape(name)}", "", _first_words(shown, what, run is not None)]
    lines += ["", "```python", *_usage(exportable, auto_class, name, named, what), "```"]
    if "NAMESPACE" in "".join(lines):
        lines += ["", "NAMESPACE is the user or organisation of the hub that has the repository."]
    for section in () if run is None else (_training(run), _results(run), _costs(run)):
        lines += section
    lines += ["", "## Licences", "", f"The licence of the base model {escape(shown)}: {licence or NOT_STATED}."]
    for path, place in _sources(run):
        known = licence_of(place) if place.is_absolute() else None
        lines.append(f"The licence of the data {escape(_shown(path))}: {known or NOT_STATED}.")
    return "\n".join([*lines, "", f"Made with tunekit {__version__}.", ""])


def evaluation_results(run: RunValues | None) -> str | None:
    """The text of .eval_results/*.yaml; None unless the run was evaluated on exactly one data set of the hub."""
    sources = [] if run is None else run.recipe.part("data").parts("eval")
    paths = [str(source.get("path")) for source in sources]
    if run is None or len(paths) != 1 or is_like_path(paths[0]):
        return None
    entries = [
        {
            "dataset": {"id": paths[0], "task_id": "default", "revision": sources[0].get("revision")},
            "value": value,
            "notes": f"{name} on the split {sources[0].get('split')}, measured by tunekit {__version__}",
        }
        for name, value in run.exported.numbers("eval").items()
    ]
    lines = yaml_lines({"results": entries})[1:]
    return "\n".join(line.removeprefix("  ") for line in lines) + "\n" if entries else None


def _sources(run: RunValues | None) -> Iterator[tuple[str, Path]]:
    """The path of each training source, as in the recipe, and the folder that contains it."""
    for source in [] if run is None else run.recipe.part("data").parts("train"):
        path = str(source.get("path"))
        yield path, Path(path).parent


def _shown(path: str) -> str:
    return last_name(path) if is_like_path(path) else path


def _first_words(base: str, what: str, trained: bool) -> str:
    kinds = {"adapter": "An adapter for", "merged": "An adapter merged into", "model": "A fine-tuned"}
    return f"{kinds[what]} {escape(base)}." if trained or what != "model" else f"The model {escape(base)}."


def _usage(exportable: Exportable, auto_class: str, name: str, base: str, what: str) -> list[str]:
    """The code that loads the model, and for a language model the code that answers a question. `base`: the
    repository of the base."""
    repository, processor = f'"NAMESPACE/{name}"', exportable.processor.tokenizer
    loading = [f"model = {auto_class}.from_pretrained({repository})"]
    if what == "adapter":
        loading = [*_base_of(exportable, auto_class, base), f"model = PeftModel.from_pretrained(base, {repository})"]
    if auto_class not in ANSWERING or processor is None:
        return [*(PEFT if what == "adapter" else ()), f"from transformers import {auto_class}", "", *loading]
    template = exportable.target.chat_template
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({repository if what != 'adapter' else json.dumps(base)})"]
    imports = [*(PEFT if what == "adapter" else ()), f"from transformers import {auto_class}, AutoTokenizer", ""]
    if what == "adapter" and template is not None:
        imports = ["from pathlib import Path", "", "from huggingface_hub import hf_hub_download", *imports]
        lines += [
            f'template = hf_hub_download({repository}, "{TEMPLATE_NAME}")',
            'tokenizer.chat_template = Path(template).read_text("utf-8")',
        ]
    if (template or processor.chat_template) is None:
        lines += ['inputs = tokenizer("Once", return_tensors="pt")']
    else:
        lines += [
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    answer = ["answer = model.generate(**inputs, max_new_tokens=128)", "print(tokenizer.decode(answer[0]))"]
    return [*imports, *loading, *lines, *answer]


def _base_of(exportable: Exportable, auto_class: str, base: str) -> list[str]:
    """The code that loads the base with a head for the adapter's labels."""
    section = exportable.target.model
    if not isinstance(section, HeadedModel):
        return [f"base = {auto_class}.from_pretrained({json.dumps(base)})"]
    values = {"id2label": "dict(enumerate(labels))", "label2id": "{label: i for i, label in enumerate(labels)}"}
    for key, value in (("problem_type", section.problem_type), ("pad_token_id", section.head_pad_id)):
        values |= {} if value is None else {key: repr(value)}
    stored = head_labels(find_source(section, weights=False), exportable.family)
    if stored and len(stored) != len(section.labels):  # the adapter's head replaces the base's
        values["ignore_mismatched_sizes"] = "True"
    lines = [f"    {key}={value}," for key, value in values.items()]
    loading = [f"base = {auto_class}.from_pretrained(", f'    "{base}",', *lines, ")"]
    return [f"labels = {list(section.labels)!r}", *loading]


def _training(run: RunValues) -> list[str]:
    adapter, training = run.recipe.part("adapter"), run.recipe.part("training")
    counts, names = run.plan.part("rows").part("training"), ", ".join(_shown(path) for path, _ in _sources(run))
    count = run.plan.part("choice").count("micro_batch_size")
    rows = {
        "data": f"{names} ({counts.count('trained'):,} rows)",
        "objective": run.recipe.part("objective").get("method"),
        "method": adapter.get("method"),
        **{name: adapter[name] for name in ("r", "alpha") if name in adapter},
        "learning rate": training.get("learning_rate"),
        "steps": max((record.count("step") for record in run.steps), default=0),
        "rows of a step": count * run.plan.part("choice").count("gradient_accumulation_steps") or None,
        "seed": training.get("seed"),
        "computed in": run.plan.part("model").get("dtype"),
        "quantization of the base": run.plan.part("model").get("quantization"),
    }
    return ["", "## Training", "", markdown_table(["setting", "value"], list(rows.items()))]


def _results(run: RunValues) -> list[str]:
    """The section with the metrics of the exported weights, and a 95 % interval for the change of the loss."""
    after = run.exported.numbers("eval")
    if not after:
        return []
    first = run.evaluations[0]
    before = first.numbers("eval") if first.get("step") == 0 else {}
    table = markdown_table(
        ["metric", "before", "after"], [[name, before.get(name), value] for name, value in after.items()]
    )
    return ["", "## Evaluation", "", table, *_interval(run.row_losses)]


def _interval(rows: Values) -> list[str]:
    columns = (rows.column(name) for name in ("before", "losses", "units"))
    lines = zip(rows.items_of("digests"), *columns, strict=False)
    measured = [line for line in lines if None not in line and line[3]]
    if not measured:
        return []
    digests, *values = zip(*measured, strict=True)
    different = different_rows(digests, np.array(values, np.float64).T)
    if len(different) < 2:
        return []
    low, high = difference_interval(*different.T)
    return [
        "",
        f"Change of the loss on {len(different):,} held-out rows, 95 % interval over rows: {low:+.4g} to {high:+.4g}.",
    ]


def _costs(run: RunValues) -> list[str]:
    """The section with the costs of all steps, as the log printed them."""
    seconds, tokens = (sum(record.number(name) or 0 for record in run.steps) for name in ("seconds", "tokens"))
    peak = max((record.count("peak_bytes") for record in run.steps), default=0)
    machine = run.environment.get("cpu") if run.plan.get("device") == "cpu" else run.environment.get("accelerators")
    rows = {
        "machine": cell_text(machine),
        "peak memory": bytes_text(peak) if peak else None,
        "time of the steps": duration_text(seconds) if seconds else None,
        f"{run.shows.sizes} a second": tokens / seconds if seconds else None,
    }
    return ["", "## Costs", "", markdown_table(["", ""], [item for item in rows.items() if item[1]])]
