"""Random recipes whose verdict is known by construction, for tests that load or plan many of them.

The tables below say, without asking tunekit, which YAML texts each key takes and which it must refuse. A valid case
draws keys, values, spellings and layouts; a bad case is a valid one with one thing made wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

MODEL, TRAIN, EVAL, OUTPUT = "org/model", "train.jsonl", "eval.jsonl", "runs/first"
NOT_BOOLEANS = ["no", "yes", "on", "1", "0", "null", '"true"', "[true]", "y"]
NOT_TEXT = ["5", "true", "null", "[a]", "{a: b}", "1e-4", '""']
NOT_COUNTS = [
    "0",
    "-1",
    "1.5",
    "true",
    '"5"',
    "abc",
    "1_000",
    ".inf",
    ".nan",
    "1e400",
    "9" * 5000,
    "[1]",
    "12:30",
    "0b1",
]
NOT_POSITIVE = ["0", "-1e-4", "true", '"1e-4"', "abc", ".inf", "-.inf", ".nan", "1e400", "{a: 1}", "1 000", "12:30"]
NOT_NEGATIVE = ["-1", "-1e-9", "true", '"0.1"', "no", ".inf", ".NaN", "[0]", "~"]
NOT_FRACTIONS = ["1", "1.0", "-0.1", "true", '"0.1"', ".nan", "ten", "[0.1]", "null"]
COUNTS = ["1", "7", "100", "1e2", "+3", "010", "0x10"]
POSITIVE = ["1e-4", "2E-4", "1e+1", "0.5", ".5", "3", "1.", "+2.5e-05"]
BOOLEANS = ["true", "false", "True", "FALSE"]

# dotted key -> (texts that are taken, texts that are refused)
VALUES: dict[str, tuple[list[str], list[str]]] = {
    "model.name_or_path": ([MODEL], NOT_TEXT),
    "model.revision": (["main", "no", '"1234567"', "v1.0", "2024-01-01"], NOT_TEXT),
    "model.family": (["auto", "causal"], ["gpt", "true", "null", "[causal]", "Causal"]),
    "model.dtype": (["auto", "float32", "bfloat16", "float16"], ["bf16", "32", "null", "Float32"]),
    "model.quantization": (
        ["none", "nf4", "fp4", "int8", '"int8_weight_only"', "fp8"],  # kept needs a GGUF file
        ["int4", "4", "null", "true"],
    ),
    "model.double_quantization": (BOOLEANS, NOT_BOOLEANS),
    "model.attention": (["auto", "eager", "sdpa", "flash_attention_2"], ["flash", "true", "null"]),
    "model.trust_remote_code": (["false"], NOT_BOOLEANS),
    "data.train.0.path": ([TRAIN], NOT_TEXT),
    "data.train.0.format": (
        ["auto", "chat", "alpaca", "sharegpt", "prompt_completion", "text"],
        ["chatml", "5", "null"],
    ),
    "data.train.0.weight": (POSITIVE, NOT_POSITIVE),
    "data.train.0.columns": (
        ["{}", "{question: messages}", "{no: messages}"],
        ["[a]", "{a: 5}", "{a: nofield}", "text"],
    ),
    "data.train.0.split": (["train", "no", "train_sft"], NOT_TEXT),
    "data.train.0.revision": (["main", "off"], NOT_TEXT),
    "data.train.0.max_rows": ([*COUNTS, "null", "~"], [each for each in NOT_COUNTS if each != "null"]),
    "data.train.0.draw_seed": (["0"], ["-1", "1.5", "true", "text", "[1]"]),  # another one needs max_rows
    "data.train.0.streaming": (["false"], NOT_BOOLEANS),
    "data.eval": (
        ["0.05", "5e-2", "null", "0", "0.0", EVAL, f"[{EVAL}]", f"{{path: {EVAL}}}", f"[{EVAL}, {{path: b.jsonl}}]"],
        ["1", "1.5", "-0.1", "true", "false", '"0"', "[]", "[5]", "{format: chat}", ".nan", '"0.1"'],
    ),
    "data.train_on": (["assistant", "last", "all"], ["user", "true", "null", "[all]"]),
    "data.rewritten_answers": (["last", "each"], ["all", "true", "null"]),
    "data.reasoning": (["template", "drop"], ["keep", "true", "null"]),
    "data.chat_template": (["null", "template.jinja", "~/template.jinja"], ["5", "[a]", '""', '"a\\0b"', "x" * 300]),
    "data.max_length": (["2", "2048", "2e3"], ["1", *NOT_COUNTS]),
    "data.excess_length": (["drop", "truncate", "split", "shrink", "error"], ["cut", "null", "false"]),
    "data.image_tokens": (["auto", "256", "1e3"], ["0", "many", "null", "true"]),
    "data.image_cache": (["20GiB", "null", "500MB"], ["20", "big", "-1GiB", "true"]),
    "data.packing": (["true", "false"], ["off", "null", "1", "auto", '"true"']),
    "data.shuffle": (BOOLEANS, NOT_BOOLEANS),
    "adapter.method": (["lora"], ["loar", "5", "null", "[lora]", "__init__"]),
    "adapter.r": (["1", "8", "64"], NOT_COUNTS),
    "adapter.alpha": (["0", "16", "32.5", "1e1"], NOT_NEGATIVE),
    "adapter.dropout": (["0", "0.0", "0.1", "5e-2"], NOT_FRACTIONS),
    "adapter.target_modules": (
        ["all-linear", "[q_proj, v_proj]", "[q_proj]", "'.*(q|v)_proj'"],
        ["[]", "5", "null", "[q_proj, 5]", '""', "{a: b}"],
    ),
    "adapter.target_parameters": (["[]"], ["experts.down_proj", "5", "true", "[5]", "{a: b}"]),
    "adapter.parts": (["[language]", "[ language ]"], ["[]", "language", "[head]", "5"]),
    "adapter.exclude_modules": (["null", "[k_proj]", "'.*down_proj'"], ["[]", "5", "[5]", "true"]),
    "adapter.rank_pattern": (
        ["{}", "{q_proj: 4}", "{layers.0.q_proj: 4}"],
        ["[q_proj]", "{q_proj: 0}", "{q_proj: x}", "5"],
    ),
    "adapter.alpha_pattern": (["{}", "{q_proj: 4.5}"], ["[q_proj]", "{q_proj: -1}", "{q_proj: x}", "5"]),
    "adapter.use_rslora": (BOOLEANS, NOT_BOOLEANS),
    "adapter.start": (
        ["default", "gaussian", "{method: pissa, iterations: 4}", "{method: eva, rho: 2, batches: 1}", "corda"],
        ["pisa", "true", "null", "{iterations: 4}", "{method: pissa, iterations: 0}", "{method: eva, iterations: 4}"],
    ),
    "adapter.lora_bias": (["false"], ["some", "null", "5"]),
    "adapter.bias": (["none", "all", "lora_only"], ["some", "true", "null", "5"]),
    "adapter.modules_to_save": (["[]", "[lm_head]"], ["lm_head", "5", "true", "[5]", "{a: b}"]),
    "adapter.trainable_token_indices": (
        ["[]", "[3, 4]", "{lm_head: [5]}", "{embed_tokens: [0, 1], lm_head: [7]}"],
        ["5", "true", "[x]", "[-1]", "[1.5]", "[3, 3]", "{lm_head: 3}", "{lm_head: [x]}", "embed_tokens"],
    ),
    "adapter.layers_to_transform": (["[]", "[0]", "1", "[0, 1]"], ["[-1]", "[x]", "true", "1.5"]),
    "adapter.layers_pattern": (["null"], ["{a: b}", "5", "true", "[]"]),
    "adapter.init_from": (["null", "~"], ["5", "true", "[a]", '"a\\0b"']),
    "objective.method": (["sft"], ["sftt", "5", "null"]),
    "training.learning_rate": ([*POSITIVE, "0"], NOT_NEGATIVE),
    "training.scheduler": (
        ["constant", "linear", "cosine", "warmup_stable_decay", "constant_with_warmup"],
        ["cosin", "null", "true"],
    ),
    "training.scheduler_settings": (["{}"], ["{x: 1}", "{num_cycles: -1}", "{decay_type: x}", "null", "[1]", "5"]),
    "training.warmup_ratio": (["0", "0.03", "1", "1e-1"], ["1.5", "-0.1", "true", '"0.1"', ".inf"]),
    "training.warmup_steps": (["0", "5", "1e2"], ["-1", "0.5", "true", '"5"', ".nan"]),
    "training.optimizer": (["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"], ["adam", "null", "8"]),
    "training.weight_decay": (["0", "0.0", "1e-2"], NOT_NEGATIVE),
    "training.max_grad_norm": (["1", "0.5", "null"], NOT_POSITIVE),
    "training.epochs": (["1", "3", "0.5"], NOT_POSITIVE),
    "training.max_steps": (["1", "10", "1e3"], NOT_COUNTS),
    "training.max_minutes": (["null", "0.5", "30", "1e4"], NOT_POSITIVE),
    "training.micro_batch_size": (["1", "4"], NOT_COUNTS),
    "training.micro_batch_tokens": (["64", "4096"], NOT_COUNTS),
    "training.gradient_accumulation_steps": (["1", "5"], NOT_COUNTS),
    "training.router_loss": (["auto", "off", "0.01", "1"], ["0", "-1", "on", "null", "[1]", ".inf"]),
    "training.rank_speeds": (["null", "[2, 1]", "[0.5, 1, 3.5]", "[1]"], ["[]", "[1, 0]", "2", "[1, x]", "true"]),
    "training.head_learning_rate": (["null"], [each for each in NOT_NEGATIVE if each != "~"]),
    "training.loraplus_ratio": (["null", "16", "1.5"], NOT_POSITIVE),
    "training.deterministic": (["true", "false"], ["1", "null", "auto"]),
    "training.kernels": (["none"], ["ligers", "null", "true"]),
    "training.threads": (["null", "1", "8", "adaptive"], ["0", "-1", "1.5", "1025", "true", "auto", "[1]", "9" * 5000]),
    "training.seed": (["0", "42", "4294967295"], ["-1", "4294967296", "0.5", "true", '"0"', "null", "9" * 5000]),
    "training.save_steps": (COUNTS, NOT_COUNTS),
    "training.keep_checkpoints": (COUNTS, NOT_COUNTS),
    "training.eval_steps": (COUNTS, NOT_COUNTS),
    "memory.gradient_checkpointing": (["auto", "true", "false", "2", "0"], ["-1", "1.5", "no", "null", "unsloth"]),
    "memory.activation_offload": (["auto", "false"], ["on", "no", "null", "1", "2MiB"]),
    "memory.mlp_tile_tokens": (["null"], [each for each in NOT_COUNTS if each != "null"]),
    "memory.streamed_head": (["true", "false"], ["1", "null", "auto"]),
    "memory.streaming": (["auto", '"off"', "off"], ["on", "false", "null", "ssd"]),
    "memory.sharding": (["auto", '"off"', "off"], ["on", "false", "null", "fsdp"]),
    "memory.budget": (["null"], ["[8GiB, 8]", "[]", "8", "8G", "-1GiB", "8gib", "true", "[8GiB]"]),
    "evaluation.choices": (
        ["null", "from_data", "[a, b]", "[1, no]"],
        ["[a]", "[a, 'a ']", "5", "text", "[]", "[a, true]", "[a, 1.5]", "[a, '']"],
    ),
    "evaluation.choice_score": (["sum", "mean_per_token", "mean_per_byte"], ["mean", "null", "[sum]"]),
    "evaluation.content_free_prompt": (["null"], ["text", "3", "['{}']", "'{} {}'"]),
    "evaluation.metrics": (
        ["[loss]", "[loss, perplexity]", "[token_accuracy]", "[loss, exact_match]", "[rouge_l, token_f1, contains]"],
        ["loss", "[los]", "[5]", "{a: b}", "null", "[loss, loss]"],
    ),
    "evaluation.tasks": (["[]"], ["3", "true", "null"]),
    "evaluation.task_documents": (["null", "3"], [each for each in NOT_COUNTS if each != "null"]),
    "evaluation.task_lengths": (["[]", "[512]"], ["[0]", "[1.5]", "null"]),
    "evaluation.task_chat_template": (["true", "false"], NOT_BOOLEANS),
    "evaluation.corpus": (["null"], [each for each in NOT_TEXT if each != "null"]),
    "evaluation.cutoffs": (["[1]", "[1, 10]"], ["[]", "[0]", "[1.5]", "null", "true", "[a]"]),
    "evaluation.before_training": (["true", "false"], NOT_BOOLEANS),
    "evaluation.generate": (["true"], NOT_BOOLEANS),
    "evaluation.samples": (["0", "4"], ["-1", "1.5", "true", "null"]),
    "evaluation.max_new_tokens": (COUNTS, NOT_COUNTS),
    "evaluation.batch_size": (COUNTS, NOT_COUNTS),
    "evaluation.best": (["null", "eval.loss"], ["loss", "eval.bleu", "true", "5", "eval."]),
    "evaluation.patience": (["null", "3"], [each for each in NOT_COUNTS if each != "null"]),
    "output.dir": ([OUTPUT, "no", "2024-01-01", "~/runs/x", "'runs/ä b'"], [*NOT_TEXT, "x" * 300, '"a\\0b"']),
    "output.report_to": (["[]", "[tensorboard]", "tensorboard", "none"], ["neptune", "[neptune]", "null", "[5]"]),
    "sweep.keys": (["{}", "{adapter.r: [4, 8]}"], ["[]", "5", "text", "{adapter.r: 4}", "{adapter.r: []}"]),
    "sweep.strategy": (["grid", "halving"], ["best", "random", "null", "5"]),
    "sweep.trials": (["null"], ["3", *(each for each in NOT_COUNTS if each != "null")]),
    "sweep.by": (["eval.loss"], ["loss", "eval.bleu", "true", "5", "null"]),
    "sweep.seeds": (["1", "3"], NOT_COUNTS),
    "sweep.folds": (["null"], ["1", "0", "-3", "1.5", "true", "text", "[2]"]),
    "sweep.fold_group": (["null"], ["speaker", "5", "true", "[speaker]"]),  # needs folds
    "sweep.leave_out": (["null"], ["fold", "true", "5", "[source]"]),
}
REQUIRED = ("model.name_or_path", "data.train.0.path", "output.dir")
EXCLUSIVE = (
    ("training.epochs", "training.max_steps"),
    ("training.warmup_ratio", "training.warmup_steps"),
    ("training.micro_batch_size", "training.micro_batch_tokens"),
)
NO_EVAL = ("null", "0", "0.0")
NEED_EVAL = ("evaluation.best", "evaluation.patience", "sweep.keys", "sweep.seeds")
# keys as Axolotl, LLaMA-Factory and TRL write them at top level
ALIASES = {
    "model.name_or_path": ["base_model", "model_name_or_path"],
    "model.trust_remote_code": ["trust_remote_code"],
    "data.max_length": ["sequence_len", "cutoff_len", "max_seq_length"],
    "adapter.r": ["lora_r", "lora_rank"],
    "adapter.alpha": ["lora_alpha"],
    "adapter.dropout": ["lora_dropout"],
    "training.learning_rate": ["learning_rate"],
    "training.epochs": ["num_epochs", "num_train_epochs"],
    "training.micro_batch_size": ["micro_batch_size", "per_device_train_batch_size"],
    "training.gradient_accumulation_steps": ["gradient_accumulation_steps"],
    "training.weight_decay": ["weight_decay"],
    "training.seed": ["seed"],
    "training.save_steps": ["save_steps"],
    "output.dir": ["output_dir"],
}


@dataclass
class Case:
    """A recipe text with overrides; `valid` is the verdict it must get, `what` says how it was made."""

    text: str
    overrides: list[str]
    valid: bool
    what: str
    keys: set[str] = field(default_factory=set)
    culprit: str = ""  # a bad case whose message must name this key

    def __str__(self) -> str:
        return f"{self.what}\noverrides: {self.overrides}\n{self.text[:3000]}"


def make_cases(count: int, seed: int) -> Iterator[Case]:
    """`count` cases, two valid ones for each bad one; every key is written in both kinds over a full round."""
    keys = list(VALUES)
    for index in range(count):
        draw = random.Random(f"{seed}-{index}")
        focus = keys[index // 3 % len(keys)]
        yield make_valid_case(draw, focus) if index % 3 else make_bad_case(draw, focus)


def make_valid_case(draw: random.Random, focus: str | None = None, only: dict[str, list[str]] | None = None) -> Case:
    """A valid recipe that writes `focus`; `only` replaces the texts of some keys (an empty list: never written)."""
    chosen = choose(draw, focus, only or {})
    overrides = []
    for key in [key for key in chosen if key not in REQUIRED and not key.startswith("data.train")]:
        if draw.random() < 0.1:
            overrides.append(f"{key}={chosen.pop(key)}")
    keys = {*chosen, *(text.split("=")[0] for text in overrides)}
    return Case(write(draw, chosen), overrides, True, "valid", keys)


def make_bad_case(draw: random.Random, focus: str) -> Case:
    """A valid recipe with one thing made wrong, mostly at `focus`."""
    chosen = choose(draw, focus, {})
    kind = draw.choice(
        ["value", "value", "value", "override", "typo", "repeat", "both", "missing", "structure", "syntax"]
    )
    keys = set(chosen)
    if kind in ("value", "override"):
        text = draw.choice(VALUES[focus][1])
        if kind == "override" and "\n" not in text:
            return Case(write(draw, chosen), [f"{focus}={text}"], False, f"{focus}={text[:40]}", keys, focus)
        return make_bad_value_case(draw, focus, text)
    if kind == "typo":
        section, _, leaf = focus.rpartition(".")
        wrong = f"{section}.{misspell(draw, leaf)}"
        chosen[wrong] = chosen[focus]
        return Case(write(draw, chosen, plain=True), [], False, f"a misspelt {focus}", keys, wrong)
    if kind == "both":
        first, second = draw.choice(EXCLUSIVE)
        chosen |= {first: VALUES[first][0][0], second: VALUES[second][0][0]}
        return Case(write(draw, chosen), [], False, f"{first} and {second}", keys)
    if kind == "missing":
        gone = draw.choice(REQUIRED)
        del chosen[gone]
        if gone == "data.train.0.path":
            chosen = {key: text for key, text in chosen.items() if not key.startswith("data.train.0")}
        return Case(write(draw, chosen, plain=True), [], False, f"no {gone}", keys)
    text = write(draw, chosen, plain=True)
    damage = repeat if kind == "repeat" else draw.choice(STRUCTURE) if kind == "structure" else draw.choice(SYNTAX)
    return Case(damage(text, draw), [], False, f"{kind}: {damage.__name__}", keys)


def make_bad_value_case(draw: random.Random, focus: str, text: str) -> Case:
    """A valid recipe but for one value."""
    chosen = choose(draw, focus, {})
    keys = set(chosen)
    chosen[focus] = text
    return Case(write(draw, chosen, plain=True), [], False, f"{focus}: {text[:40]}", keys, focus)


def choose(draw: random.Random, focus: str | None, only: dict[str, list[str]]) -> dict[str, str]:
    """Keys and texts that fit together."""
    density = draw.random()
    texts = {key: only.get(key, taken) for key, (taken, _) in VALUES.items()}
    keys = [key for key in VALUES if texts[key] and (key in REQUIRED or key == focus or draw.random() < density)]
    for first, second in EXCLUSIVE:
        if first in keys and second in keys:
            keys.remove(first if focus == second or (focus != first and draw.random() < 0.5) else second)
    chosen = {key: draw.choice(texts[key]) for key in keys}
    if any(chosen.get(key, "null") != "null" for key in NEED_EVAL) and chosen.get("data.eval", "null") in NO_EVAL:
        fitting = [text for text in texts["data.eval"] if text not in NO_EVAL]
        chosen = {key: text for key, text in chosen.items() if fitting or key not in NEED_EVAL}
        chosen |= {"data.eval": draw.choice(fitting)} if fitting else {}
    if chosen.get("data.rewritten_answers") == "each":
        chosen.pop("data.train_on" if focus != "data.train_on" else "data.rewritten_answers", None)
    if chosen.get("data.train.0.columns", "{}") != "{}":
        chosen["data.train.0.format"] = "chat"
    return chosen


def write(draw: random.Random, chosen: dict[str, str], *, plain: bool = False) -> str:
    """The YAML text, in one of several layouts; `plain` has no shorthand, alias or odd line ending."""
    chosen = dict(chosen)
    lines: list[str] = []
    if not plain:
        for key in [key for key in chosen if key in ALIASES and draw.random() < 0.15]:
            lines.append(f"{draw.choice(ALIASES[key])}: {chosen.pop(key)}")
    sections: dict[str, dict[str, str]] = {}
    for key, text in chosen.items():
        section, _, rest = key.partition(".")
        sections.setdefault(section, {})[rest] = text
    for section, entries in sections.items():
        lines += write_section(draw, section, entries, plain=plain)
    if plain:
        return "\n".join(lines) + "\n"
    blocks = "\n".join(lines)
    if draw.random() < 0.3:
        blocks = "# a comment\n---\n" + blocks if draw.random() < 0.5 else "# ünïcode\n\n" + blocks
    ending = draw.choice(["\n", "\n\n", "", "\n# the end"])
    text = blocks + ending
    if draw.random() < 0.15:
        text = text.replace("\n", "\r\n")
    return "\ufeff" + text if draw.random() < 0.1 else text


def write_section(draw: random.Random, section: str, entries: dict[str, str], *, plain: bool) -> list[str]:
    """The lines of one section."""
    shorthand = {"model": "name_or_path", "adapter": "method", "objective": "method"}.get(section)
    if not plain and list(entries) == [shorthand]:
        return [f"{section}: {entries[shorthand]}"]
    source = {key.removeprefix("train.0."): text for key, text in entries.items() if key.startswith("train.0")}
    flat = [(key, text) for key, text in entries.items() if not key.startswith("train.0")]
    draw.shuffle(flat)
    if not plain and not source and draw.random() < 0.2:
        return [f"{section}: {{{', '.join(f'{key}: {text}' for key, text in flat)}}}"]
    indent = draw.choice(["  ", "    "])
    lines = [f"{section}:"]
    if source:
        lines += write_source(draw, source, indent, plain=plain)
    for key, text in flat:
        name = f'"{key}"' if not plain and draw.random() < 0.1 else key
        lines.append(f"{indent}{name}: {text}{'  # why' if not plain and draw.random() < 0.1 else ''}")
    return lines


def write_source(draw: random.Random, source: dict[str, str], indent: str, *, plain: bool) -> list[str]:
    """data.train in one of its forms."""
    if not plain and list(source) == ["path"]:
        return [f"{indent}train: {draw.choice([source['path'], '[' + source['path'] + ']'])}"]
    inner = ", ".join(f"{key}: {text}" for key, text in source.items())
    forms = [f"[{{{inner}}}]"] if plain else [f"[{{{inner}}}]", f"{{{inner}}}"]
    return [f"{indent}train: {draw.choice(forms)}"]


def misspell(draw: random.Random, name: str) -> str:
    """A name that no key has."""
    at = draw.randrange(len(name))
    return draw.choice([name[:at] + name[at] * 2 + name[at:], f"{name}_", f"{name[:at]}q{name[at:]}", f"x{name}"])


def repeat(text: str, draw: random.Random) -> str:
    """One line of a section, or a whole section, twice."""
    lines = text.splitlines()
    places = [at for at, line in enumerate(lines) if line.startswith(" ")]
    at = draw.choice(places)
    return "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]) + "\n"


def as_list(text: str, draw: random.Random) -> str:
    return "\n".join(f"- {line}" if not line.startswith(" ") else f"  {line}" for line in text.splitlines()) + "\n"


def nothing(text: str, draw: random.Random) -> str:
    return draw.choice(["", "\n", "# only a comment\n", "---\n", "null\n", "5\n", "[]\n", "text\n"])


def two_documents(text: str, draw: random.Random) -> str:
    return f"{text}---\n{text}"


def unknown_section(text: str, draw: random.Random) -> str:
    return f"{text}{draw.choice(['modell', 'trainer', 'args', '1', 'true', 'null', 'extra.key'])}: {{a: 1}}\n"


def empty_section(text: str, draw: random.Random) -> str:
    return f"{text}\n".replace("output:\n", "output:\nmemory_:\n")


def anchor(text: str, draw: random.Random) -> str:
    return text.replace("output:", "output: &here", 1)


def alias_bomb(text: str, draw: random.Random) -> str:
    rows = ["x0: &x0 [a, a]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30)]
    return text + "\n".join(rows) + "\n"


def merge_key(text: str, draw: random.Random) -> str:
    return text.replace("output:\n", "output:\n  <<: {report_to: []}\n", 1) + "<<: {a: 1}\n"


def python_tag(text: str, draw: random.Random) -> str:
    return f"{text}x: !!python/object/apply:os.system [id]\n"


def deep(text: str, draw: random.Random) -> str:
    return f"{text}x: {'[' * draw.choice([30, 3000])}\n"


def tab(text: str, draw: random.Random) -> str:
    return f"{text}x:\n\ty: 1\n"


def unclosed(text: str, draw: random.Random) -> str:
    return text + draw.choice(['x: "abc\n', "x: [1, 2\n", "x: {a: 1\n", "x: 'abc\n"])


def no_colon(text: str, draw: random.Random) -> str:
    return f"{text}memory streaming auto\n"


def control(text: str, draw: random.Random) -> str:
    return text + draw.choice(["x: a\0b\n", "x: a\x07b\n", "\x1bx: 1\n"])


STRUCTURE = [as_list, nothing, two_documents, unknown_section, empty_section]
SYNTAX = [anchor, alias_bomb, merge_key, python_tag, deep, tab, unclosed, no_colon, control]
