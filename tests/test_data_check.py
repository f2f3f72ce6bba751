"""`tunekit data check`: planted faults are found with their lines, and clean rows have no finding."""

from __future__ import annotations

import base64
import csv
import json
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from tests.support.chat_templates import R1
from tests.support.image_case import write_photos
from tests.support.image_text_case import write_images
from tests.support.run_case import write_run
from tests.support.speech_case import RATE, write_sounds
from tunekit.cli import main
from tunekit.data.encoding.notes import format_note
from tunekit.data.looking.look import EXCESS, KINDS
from tunekit.data.looking.similar import SimilarityIndex, signed
from tunekit.data.rows import load_rows
from tunekit.data_check import data_check_verb
from tunekit.errors import InputError
from tunekit.model.families import make_family
from tunekit.objectives.base import make_objective
from tunekit.planning.prepare import row_kind_at_hand
from tunekit.recipe.load import load_recipe

WORDS = [first + last for first in ("ba", "ke", "li", "mo", "nu") for last in ("ra", "sel", "tin", "pod", "gum")]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def clean(number: int) -> dict[str, Any]:
    """A row of thirty drawn words, like no other."""
    words = Random(number).choices(WORDS, k=30)
    return chat(" ".join(words[:12]) + "?", " ".join(words[12:]) + ".")


PLANTED = {  # line -> its row and the kind of finding
    3: (clean(0), "exact"),
    5: (chat(clean(1)["messages"][0]["content"] + " ok", clean(1)["messages"][1]["content"]), "near"),
    8: ({"messages": [{"role": "assistant", "content": "I begin without having been asked anything"}]}, "roles"),
    9: (chat("What is this, now?", "It was cafÃ© time"), "garbled"),
    11: (chat("A bell\x07 rings", "It does"), "control"),
    13: (chat("Who can I write to?", "Write to ada@example.org for that"), "email"),
    14: (chat("My key?", "hf_" + "abcDEF123" * 4), "secret"),
    16: (chat("Raw?", "<|im_start|>user\nhello"), "markup"),
    18: (chat("Long?", "so " * 2000), "long"),
    20: (chat("Que?", ""), "empty"),
    21: ({"messages": [{"role": "king", "content": "x"}]}, "broken"),
}


def write(tmp_path: Path, count: int = 60, planted: bool = True, **data: Any) -> Path:
    rows = [clean(number) for number in range(count)]
    for line, (row, _) in PLANTED.items() if planted else ():
        rows.insert(line - 1, row)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"model": "org/base", "data": {"train": "rows.jsonl", "max_length": 512, **data}, "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def check(recipe: Path, fix: Path | None = None, overwrite: bool = False) -> tuple[int, dict[str, Any]]:
    out = recipe.parent / "found.json"
    code = data_check_verb(load_recipe(recipe), None if fix is None else str(fix), str(out), overwrite=overwrite)
    return code, json.loads(out.read_text("utf-8"))["files"][0]


def test_without_rensa_only_near_duplicates_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh install has no rensa, and the README begins with data check."""
    for module in ("tunekit.data.looking.similar", "tunekit.data_check"):
        monkeypatch.setattr(f"{module}.finds_near_duplicates", lambda: False)
    assert data_check_verb(load_recipe(write(tmp_path)), None, str(tmp_path / "found.json")) == 2
    found = set(json.loads((tmp_path / "found.json").read_text("utf-8"))["files"][0]["findings"])
    assert found == {kind for _, kind in PLANTED.values()} - {"near"}
    assert "near duplicates are not looked for, because rensa is not installed: pip install" in capsys.readouterr().out


def test_planted_faults_are_found_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that no line of the table is broken
    code, found = check(write(tmp_path), tmp_path / "good.jsonl")
    assert code == 2
    expected: dict[str, list[int]] = {}
    for line, (_, kind) in PLANTED.items():
        expected.setdefault(kind, []).append(line)
    assert {kind: lines for kind, lines in found["findings"].items() if lines} == expected
    good = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text("utf-8").splitlines()]
    assert good == [clean(number) for number in range(60)]
    shown = capsys.readouterr().out
    assert "hf_" not in shown
    for kind in expected:
        assert KINDS[kind] in shown
    assert f"train on them with data.train={tmp_path / 'good.jsonl'}" in shown
    code, found = check(write(tmp_path, planted=False))
    assert (code, found["findings"]) == (0, {})


def test_findings_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(write(tmp_path, count=5))
    assert "--fix FILE writes the training rows without findings" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"--fix .*good: the rows are written as JSONL, CSV or TSV; name a file such as .*good\.jsonl"
    ):
        check(write(tmp_path, count=5), tmp_path / "good")
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_fix_replaces_no_file_of_the_recipe(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps(clean(99)) + "\n", encoding="utf-8")
    recipe = write(tmp_path, eval="eval.jsonl")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "run").mkdir()
    before = {name: (tmp_path / name).read_bytes() for name in ("rows.jsonl", "eval.jsonl")}
    named = {"rows": "data.train.0.path", "link": "data.train.0.path", "hard": "data.train.0.path"}
    for name, key in {**named, "eval": "data.eval.0.path"}.items():
        with pytest.raises(InputError, match=rf"would replace {key} of the recipe"):
            check(recipe, tmp_path / f"{name}.jsonl", overwrite)
    with pytest.raises(InputError, match=r"is inside output\.dir"):
        check(recipe, tmp_path / "run" / "metrics.jsonl", overwrite)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fix_replaces_no_table_of_a_folder(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2)
    values = {"model": "org/base", "data": {"train": "photos"}, "objective": "dreambooth", "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match=r"would replace data\.train\.0\.path"):
        check(tmp_path / "recipe.yaml", tmp_path / "photos" / "metadata.jsonl", overwrite=True)


def test_json_replaces_no_file_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe = write(tmp_path)
    rows, text = (tmp_path / "rows.jsonl").read_bytes(), recipe.read_bytes()
    for command in (["validate"], ["plan"], ["train"], ["data", "check"], ["eval"]):
        for file in (tmp_path / "rows.jsonl", recipe):
            words = [*command, str(recipe), "--json", str(file)]
            words += ["--data", str(tmp_path / "rows.jsonl")] if command == ["eval"] else []
            monkeypatch.setattr(sys, "argv", ["tunekit", *words])
            with pytest.raises(SystemExit) as left:
                main()
            assert left.value.code == 2, words
            assert "; name a new file" in capsys.readouterr().err, words
            assert (rows, text) == ((tmp_path / "rows.jsonl").read_bytes(), recipe.read_bytes()), words


def test_no_output_replaces_a_file_that_is_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe, rows, wrong = write(tmp_path), tmp_path / "rows.jsonl", tmp_path / "wrong.yaml"
    wrong.write_text(recipe.read_text("utf-8") + "\nunknown: 1\n", encoding="utf-8")
    before = {file: file.read_bytes() for file in (recipe, rows, wrong)}
    for words in (
        ["validate", str(wrong), "--json", str(rows)],
        ["validate", str(wrong), "--json", str(wrong)],
        ["preview", str(recipe), "--html", str(rows)],
        ["preview", str(recipe), "--html", str(recipe)],
        ["schema", "--output", str(recipe)],
        ["schema", "--reference", "--output", str(rows)],
    ):
        monkeypatch.setattr(sys, "argv", ["tunekit", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2, words
        assert "; name a new file" in capsys.readouterr().err, words
        assert {file: file.read_bytes() for file in before} == before, words
    for words in (["validate", str(wrong), "--json", str(tmp_path / "result.json")], ["schema", "--output", "s.json"]):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):  # its own earlier output is replaced
            monkeypatch.setattr(sys, "argv", ["tunekit", *words])
            with pytest.raises(SystemExit):
                main()
            assert "name a new file" not in capsys.readouterr().err, words


def test_fix_replaces_another_file_only_where_told(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text("mine", encoding="utf-8")
    recipe = write(tmp_path, count=5)
    with pytest.raises(InputError, match=r"good\.jsonl: the file exists; .*--overwrite"):
        check(recipe, tmp_path / "good.jsonl")
    assert (tmp_path / "good.jsonl").read_text("utf-8") == "mine"
    check(recipe, tmp_path / "good.jsonl", overwrite=True)
    assert len((tmp_path / "good.jsonl").read_text("utf-8").splitlines()) == 5
    with pytest.raises(InputError, match="there is no folder"):
        check(recipe, tmp_path / "absent" / "good.jsonl")


def test_fix_replaces_no_file_of_another_run(tmp_path: Path) -> None:
    write_run(tmp_path / "other")
    recipe = write(tmp_path, count=5)
    with pytest.raises(InputError, match=r"--fix: .*metrics\.jsonl is in the run .*other; name a place outside of"):
        check(recipe, tmp_path / "other" / "metrics.jsonl", overwrite=True)


def test_fix_prints_the_keys_that_train_on_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, planted=False, train={"path": "rows.jsonl", "format": "chat", "weight": 2})
    check(recipe, tmp_path / "good rows.jsonl")
    said = " ".join(capsys.readouterr().out.split())
    assert f"train on them with 'data.train={tmp_path / 'good rows.jsonl'}' data.train.0.format=chat" in said
    assert "rows.jsonl: weight (2) is not in" in said
    with pytest.raises(InputError, match="--overwrite replaces the file of --fix, but --fix is missing"):
        check(recipe, overwrite=True)


def test_fix_writes_no_file_of_two_formats(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "How far is it?", "completion": "A mile."}\n', encoding="utf-8")
    recipe = write(tmp_path, planted=False, train=["rows.jsonl", "pairs.jsonl"])
    with pytest.raises(InputError, match=r"the formats chat and prompt_completion; .* ~data\.train\.1"):
        check(recipe, tmp_path / "good.jsonl")
    assert not (tmp_path / "good.jsonl").exists()
    data_check_verb(load_recipe(recipe, ["~data.train.1"]), str(tmp_path / "good.jsonl"), None)
    assert len((tmp_path / "good.jsonl").read_text("utf-8").splitlines()) == 60


def test_fix_writes_values_that_json_lacks(tmp_path: Path) -> None:
    """Dates and decimals of a Parquet file as text, NaN as null. Bytes are refused."""
    columns = {"prompt": ["How far?", "How long?"], "completion": ["A mile.", "A day."], "score": [0.5, float("nan")]}
    table = pa.table({**columns, "day": [date(2026, 1, 2)] * 2, "price": [Decimal("1.50")] * 2, "tags": [["a"], []]})
    pq.write_table(table, tmp_path / "rows.parquet")
    recipe = write(tmp_path, planted=False, train="rows.parquet")
    check(recipe, tmp_path / "good.jsonl")
    first, second = (json.loads(line) for line in (tmp_path / "good.jsonl").read_text("utf-8").splitlines())
    assert first == {
        "prompt": "How far?",
        "completion": "A mile.",
        "score": 0.5,
        "day": "2026-01-02",
        "price": "1.50",
        "tags": ["a"],
    }
    assert second["score"] is None
    pq.write_table(table.append_column("raw", [[b"x", b"y"]]), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"the column 'raw' of .*rows\.parquet contains bytes"):
        check(recipe, tmp_path / "other.jsonl")


def test_fix_keeps_the_paths_of_pictures(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    values = {"model": "org/base", "data": {"train": "photos"}, "objective": "dreambooth", "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    for fixed in (tmp_path / "good.jsonl", tmp_path / "photos" / "good.jsonl"):
        check(tmp_path / "recipe.yaml", fixed)
        named = [json.loads(line)["image"] for line in fixed.read_text("utf-8").splitlines()]
        assert len(named) == 3
        assert all((fixed.parent / name).is_file() for name in named)


def test_fix_states_that_unread_rows_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, planted=False, train={"path": "rows.jsonl", "max_rows": 7})
    check(recipe, tmp_path / "good.jsonl")
    assert len((tmp_path / "good.jsonl").read_text("utf-8").splitlines()) == 7
    said = " ".join(capsys.readouterr().out.split())
    assert "rows.jsonl: max_rows (7) left some rows unread; these are not in" in said


@pytest.mark.parametrize("excess", ["drop", "truncate", "split", "error"])
def test_lengths_are_those_of_the_tokenizer_and_the_template(
    excess: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [len(row["messages"][n]["content"].encode()) for row in map(clean, range(60)) for n in (0, 1)]
    template = 2 * (1 + 1 + 1 + 1) + len("user") + len("assistant")  # markers and line ends of two turns
    lengths = [one + two + template for one, two in zip(tokens[::2], tokens[1::2], strict=True)]
    limit = sorted(lengths)[40]
    path = write(tmp_path, planted=False, max_length=limit, excess_length=excess)
    path.write_text(path.read_text("utf-8").replace("org/base", str(tiny_llama)), encoding="utf-8")
    code, found = check(path)
    longer = [line for line, length in enumerate(lengths, 1) if length > limit]
    assert 0 < len(longer) < 60
    assert found["findings"] == {"long": longer}
    assert code == (2 if excess == "error" else 0)  # rows that training can use, or drops, do not fail CI
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens are counted with the tokenizer" in said
    assert f"{lengths[longer[0] - 1]} tokens: {EXCESS[excess]}" in said
    loaded = load_recipe(path, ["data.excess_length=drop"]).recipe
    kind = row_kind_at_hand(loaded)
    assert kind is not None
    objective = make_objective(loaded.objective, make_family("causal").processor(loaded.model))
    assert load_rows(loaded.data, objective, seed=0).counts.dropped == len(longer)


def test_warnings_exit_with_0_unless_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, planted=False)
    rows = (tmp_path / "rows.jsonl").read_text("utf-8")
    (tmp_path / "rows.jsonl").write_text(rows + rows.splitlines()[0] + "\n", encoding="utf-8")
    assert check(path)[0] == 0
    assert "these findings are warnings; with --strict, the exit code is 2" in capsys.readouterr().out
    assert data_check_verb(load_recipe(path), None, None, strict=True) == 2
    (tmp_path / "rows.jsonl").write_text(rows + "{\n", encoding="utf-8")
    assert check(path)[0] == 2


def test_reasoning_that_the_template_leaves_out_is_listed(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r1.jinja").write_text(R1, encoding="utf-8")
    path = write(tmp_path, planted=False, chat_template="r1.jinja", max_length=600)
    path.write_text(path.read_text("utf-8").replace("org/base", str(tiny_llama)), encoding="utf-8")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat("A question with a thought?", "<think>Hm, so</think>This answer.")) + "\n")
    assert check(path, tmp_path / "good.jsonl")[1]["findings"] == {"reasoning": [61]}
    assert len((tmp_path / "good.jsonl").read_text("utf-8").splitlines()) == 61  # it can be trained on


def test_rows_that_training_drops_are_foreseen(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path, planted=False, excess_length="truncate", max_length=600)
    path.write_text(path.read_text("utf-8").replace("org/base", str(tiny_llama)), encoding="utf-8")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        words = " ".join(Random(99).choices(WORDS, k=200))
        file.write(json.dumps(chat(words, "No target is left of this one.")) + "\n")
    _, found = check(path)
    assert found["findings"] == {"long": [61], "dropped": [61]}


def test_without_a_tokenizer_lengths_are_bounded_by_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"en": "tea with milk " * 25, "ar": "شاي مع حليب " * 25, "th": "ชากับนม" * 50, "zh": "加牛奶的茶" * 70}
    rows = [chat("Tea?", text) for text in texts.values()]
    path = write(tmp_path, planted=False, max_length=256)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, found = check(path)
    assert found["findings"]["long"] == [2, 3, 4]
    assert "the tokenizer of org/base is not on this machine yet; the number of tokens" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rows_that_are_evaluated_on_are_leaks(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps(clean(7)) + "\n", encoding="utf-8")
    _, found = check(write(tmp_path, planted=False, eval="eval.jsonl"))
    assert found["findings"] == {"leak": [8]}


def test_another_writing_is_remarked_on(tmp_path: Path) -> None:
    recipe = write(tmp_path, planted=False)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat("Что это такое?", "Это ответ на вопрос")) + "\n")
    _, found = check(recipe)
    assert found["findings"] == {"script": [61]}


def test_nearness_follows_the_similarity_of_word_pairs() -> None:
    """Of texts of 100 words: two changed words are near, thirty are not."""
    words = [f"word{number}" for number in range(100)]
    seen = SimilarityIndex()
    seen.add(signed(" ".join(words)), "f", 1)
    near, far = list(words), list(words)
    near[10], near[50] = "x", "y"
    far[::3] = ["z"] * len(far[::3])
    assert seen.like(signed(" ".join(near))) == ("near", "f", 1, None)
    assert seen.like(signed(" ".join(far))) is None
    assert seen.like(signed(" ".join(words).upper() + "!")) == ("exact", "f", 1, None)


def like(earlier: str, later: str) -> str | None:
    """What the later text is to the earlier one."""
    seen = SimilarityIndex()
    seen.add(signed(earlier), "f", 1)
    found = seen.like(signed(later))
    return found[0] if found else None


@pytest.mark.parametrize(
    "pair", [("2 + 2 =", "2 * 2 ="), ("😀 yes", "😡 yes"), ("C++", "C#"), ("की", "का"), ("!", "?")]
)
def test_signs_and_accents_tell_short_texts_apart(pair: tuple[str, str]) -> None:
    assert like(*pair) is None
    assert like(pair[0], f" {pair[0].upper()} ") == "exact"


def test_writings_without_spaces_have_near_rows_too() -> None:
    text = "".join(map(chr, Random(0).sample(range(0x4E00, 0x9F00), 100)))
    assert like(text, text[:50] + "我" + text[51:]) == "near"
    assert like(text, text[:50]) is None


def test_every_line_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    recipe = write(tmp_path, planted=False)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join('{"a": ' + "[" * number + "\n" for number in range(30)) + "{\n" * 3)
    _, found = check(recipe)
    assert (found["rows"], sorted(found["findings"]["broken"])) == (93, list(range(61, 94)))


@pytest.mark.parametrize(
    ("objective", "row", "label"),
    [
        ("classify", {"text": "the soup was cold and the waiter slow all evening long"}, ["bad", "good"]),
        ("classify", {"text": "the soup was cold and the waiter slow all evening long"}, [0, 1]),
        ("classify", {"text": "cold soup"}, ["bad", "good"]),
        (
            "kto",
            {"prompt": "what is two and two", "completion": "it is four, as everyone who counts knows"},
            [True, False],
        ),
    ],
)
def test_one_text_with_two_labels_is_no_plain_repeat(
    tmp_path: Path, objective: str, row: dict[str, Any], label: list[Any]
) -> None:
    rows = [row | {"label": each} for each in (label[0], label[1], label[0])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    recipe = {"model": "org/base", "data": {"train": "rows.jsonl"}, "objective": objective, "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    code, found = check(tmp_path / "recipe.yaml")
    assert code == 2
    assert found["findings"] == {"contrary": [2], "exact": [3]}


def test_the_length_of_a_pair_is_that_of_its_longer_answer(tmp_path: Path) -> None:
    """Each answer is a sequence of its own with the prompt before it."""
    pairs = [("so " * 400, "no " * 500), ("go " * 700, "we " * 500)]
    rows = [{"prompt": "why?", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    data = {"train": "rows.jsonl", "max_length": 512}
    recipe = {"model": "org/base", "data": data, "objective": "dpo", "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert check(tmp_path / "recipe.yaml")[1]["findings"] == {"long": [2]}


def test_recordings_and_images_are_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [(name, "one") for name in ("good.wav", "absent.wav", "damaged.wav", "silent.wav")] + [("good.wav", "")]
    write_sounds(tmp_path / "sounds", ["one"]).joinpath("0.wav").rename(tmp_path / "sounds" / "good.wav")
    (tmp_path / "sounds" / "damaged.wav").write_bytes(b"RIFF, and nothing else")
    soundfile.write(tmp_path / "sounds" / "silent.wav", np.zeros(RATE), RATE)
    lines = (json.dumps({"file_name": name, "text": text}) for name, text in table)
    (tmp_path / "sounds" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = {"model": "org/base", "data": {"train": "sounds"}, "objective": "speech", "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    code, found = check(tmp_path / "recipe.yaml")
    assert (code, found["findings"]) == (2, {"broken": [2, 3], "empty": [4, 5]})
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "9.jpg").write_bytes(b"no image")
    recipe |= {"data": {"train": "photos"}, "objective": {"method": "dreambooth", "instance_prompt": "a sks dog"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert check(tmp_path / "recipe.yaml")[1]["findings"] == {"broken": [3]}
    assert "tokens" not in capsys.readouterr().out


def test_recordings_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    names = [f"{'one of the many words of a long path/' * 3}{number}.wav" for number in range(4)]
    for name, value in zip(names, (0.1, 0.2, 0.3, 0.1), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.full(RATE // 10, value), RATE)
    labels = ("up", "up", "down", "up")
    paths = [{"audio": name, "label": label} for name, label in zip(names, labels, strict=True)]
    held = [
        {"audio": {"bytes": (tmp_path / row["audio"]).read_bytes(), "path": None}, "label": row["label"]}
        for row in paths
    ]
    lines = "".join(json.dumps(row) + "\n" for row in [*paths, {"audio": names[1], "label": "down"}])
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(held), tmp_path / "rows.parquet")
    for table, findings in (("rows.jsonl", {"exact": [4], "contrary": [5]}), ("rows.parquet", {"exact": [4]})):
        recipe = {"model": "org/base", "data": {"train": table}, "objective": "audio_classify"}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output": {"dir": "run"}}), encoding="utf-8")
        assert check(tmp_path / "recipe.yaml")[1]["findings"] == findings


def test_another_name_of_a_field_is_read() -> None:
    note = format_note("rows", "transcript", "as said", ["file_name", "transcription", "speaker"])
    assert note.endswith("which does not read 'speaker'")
    assert "'sentence'" in format_note("rows", "transcript", "as said", ["audio", "text", "sentence"])


def test_training_images_that_dreambooth_measures_are_no_leak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos")
    recipe: dict[str, Any] = {
        "model": "org/base",
        "data": {"train": "photos", "eval": ["photos"]},
        "objective": {"method": "dreambooth", "instance_prompt": "a sks dog"},
        "output": {"dir": "run"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert data_check_verb(load_recipe(tmp_path / "recipe.yaml"), None, None) == 0
    assert "no findings" in capsys.readouterr().out


def check_rows(tmp_path: Path, rows: list[dict[str, Any]], objective: Any, **data: Any) -> Any:
    """The findings in rows, and the rows that --fix writes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"model": "org/base", "data": {"train": "rows.jsonl", **data}, "objective": objective}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values | {"output": {"dir": "run"}}), encoding="utf-8")
    found = check(tmp_path / "recipe.yaml", tmp_path / "good.jsonl", overwrite=True)[1]
    return found["findings"], [json.loads(line) for line in (tmp_path / "good.jsonl").read_text("utf-8").splitlines()]


def test_rows_of_an_array_on_one_line_are_rows_of_their_own(tmp_path: Path) -> None:
    """A row with two secrets is one row."""
    secrets = [chat("My key?", "hf_" + "abcDEF123" * 4 + " AKIA" + "A1B2" * 4), chat("Yours?", "hf_" + "xyzABC456" * 4)]
    rows = [*map(clean, range(3)), *secrets, *map(clean, (0, 1))]
    recipe = write(tmp_path, planted=False, train="rows.json")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert check(recipe, tmp_path / "good.jsonl")[1]["findings"] == {"secret": [1, 1], "exact": [1, 1]}
    good = (tmp_path / "good.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in good] == [clean(number) for number in range(3)]


def test_the_answers_of_a_pair_are_rows_of_their_own(tmp_path: Path) -> None:
    prompts = [" ".join(Random(number).choices(WORDS, k=60)) for number in range(5)]  # long, and equal for both answers
    rows = [{"prompt": prompt, "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n, prompt in enumerate(prompts)]
    rows[4]["rejected"] = "Write to ada@example.org."
    findings, good = check_rows(tmp_path, [*rows, rows[0]], "kto")
    assert findings == {"email": [5], "exact": [6, 6]}
    expected = [{"prompt": row["prompt"], "completion": row[side]} for row in rows for side in ("chosen", "rejected")]
    assert [row | {"label": number % 2 == 0} for number, row in enumerate(expected[:-1])] == good


def test_a_row_that_cannot_be_read_makes_no_other_row_wrong(tmp_path: Path) -> None:
    rows = [{"text": "great film", "label": label} for label in (None, "pos")]
    findings, good = check_rows(tmp_path, [*rows, {"text": "poor film", "label": "neg"}], "classify")
    assert (findings, good[:1]) == ({"broken": [1]}, rows[1:])


@pytest.mark.parametrize(
    ("problem_type", "labels", "kind"),
    [
        ("multi_label_classification", [["a", "b"], ["b", "a"]], "exact"),
        ("multi_label_classification", [["a", "b"], '["b", "a"]'], "exact"),
        ("multi_label_classification", [["a", "b"], ["b"]], "contrary"),
        ("regression", [[1.5, 2], [2, 1.5]], "contrary"),
        ("regression", [[1, 2], [2, 1]], "contrary"),
    ],
)
def test_the_order_of_several_names_has_no_meaning(
    problem_type: str, labels: list[Any], kind: str, tmp_path: Path
) -> None:
    rows = [{"text": "great film", "label": label} for label in labels]
    assert check_rows(tmp_path, rows, {"method": "classify", "problem_type": problem_type})[0] == {kind: [2]}


@pytest.mark.parametrize(("excess", "count"), [("split", 1), ("truncate", 1), ("drop", 0), ("error", 0)])
def test_long_rows_that_training_cuts_are_kept(
    excess: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"text": "It was a dark and stormy night. " * 100}
    findings, good = check_rows(tmp_path, [row], "sft", max_length=256, excess_length=excess)
    assert (findings, len(good)) == ({"long": [1]}, count)
    output = " ".join(capsys.readouterr().out.split())
    assert "next:" not in output  # the written file says what to do
    assert (f"are in it too, because they are {EXCESS[excess]}" in output) == (count == 1)
    check(tmp_path / "recipe.yaml")
    output = " ".join(capsys.readouterr().out.split())
    assert ("set data.excess_length" in output) == ("--fix FILE writes" in output) == (count == 0)
    assert ("shows what the model is trained on" in output) == (count == 1)


def test_files_of_one_name_are_named_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    recipe = write(tmp_path, planted=False, train=["en/rows.jsonl", "de/rows.jsonl"])
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(clean(0)) + "\n", encoding="utf-8")
    assert check(recipe)[1]["file"] == str(tmp_path / "en" / "rows.jsonl")
    assert f"as line 1 of {tmp_path / 'en' / 'rows.jsonl'}" in capsys.readouterr().out


def test_rows_of_a_table_are_written_as_a_table(tmp_path: Path) -> None:
    """As they were: quotes, commas, line ends and columns that no format reads."""
    rows = [["text", "label", "id"], ['a "b", c', "x", "1"], ["d\ne", "y", "2"], ['a "b", c', "x", "1"]]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    recipe = {"model": "org/base", "data": {"train": "rows.csv"}, "objective": "classify", "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for name in ("good.csv", "good.tsv"):
        check(tmp_path / "recipe.yaml", tmp_path / name)
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            assert list(csv.reader(file, delimiter="\t" if name.endswith("tsv") else ",")) == rows[:3]
    (tmp_path / "rows.jsonl").write_text(json.dumps(clean(1)) + "\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"data": {"train": "rows.jsonl"}, "objective": "sft"}))
    with pytest.raises(InputError, match=r"'messages' contains lists .*; name a \.jsonl file"):
        check(tmp_path / "recipe.yaml", tmp_path / "bad.csv")


def test_headers_of_images_in_conversations_are_read(tmp_path: Path) -> None:
    """Also without the base. The same question about two images is no repetition; one image in two files is."""
    first, second = write_images(tmp_path, 2)
    (tmp_path / "same.png").write_bytes(first.read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (5000, 1)).save(tmp_path / "thin.png")
    inside = "data:image/png;base64," + base64.b64encode(second.read_bytes()).decode()
    names = [first.name, second.name, "same.png", "empty.png", "thin.png", "absent.png", inside]
    rows = [{**chat("What is in this image?", "Noise."), "images": [name]} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"model": "org/base", "data": {"train": "rows.jsonl"}, "output": {"dir": "run"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert check(tmp_path / "recipe.yaml")[1]["findings"] == {"exact": [3, 7], "broken": [4, 6], "dropped": [5]}
