"""What a shell completes: verbs, recipe files, shipped recipes, keys and values; and that it need not be waited for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import HEAVY
from tunekit.commands.completion import complete_recipe_file
from tunekit.commands.offers import complete_override
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.reading.shipped import shipped_folder, shipped_recipes

RECIPE = shlex.quote(str(shipped_recipes()["sft-lora"]))  # as it is typed
PROGRAM = "from tunekit.cli import main; import sys; sys.argv[0] = 'tunekit'; main()"


def completed(*words: str, shell: str = "bash", folder: Path | None = None) -> list[str]:
    """What the shell is told for the last of these words, after `tunekit`."""
    line = ["tunekit", *words]
    asked = {"COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(words)), "_TYPER_COMPLETE_ARGS": " ".join(line)}
    asked |= {"_TUNEKIT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | asked, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], {"train"}),
        (["adapter", "c"], {"combine", "convert"}),
        (["recipes", "sft-qlora-"], {"sft-qlora-loftq", "sft-qlora-streamed"}),
        (["train", RECIPE, "--dry"], {"--dry-run"}),
        (["train", RECIPE, "--device", "c"], {"cpu", "cuda"}),
        (["eval", "run", "--metric", "rou"], {"rouge_l"}),
        (["eval", "run", "--format", "pref"], {"preference"}),
        (["merge", "run", "model.trust"], {"model.trust_remote_code=true", "model.trust_remote_code=false"}),
        (["merge", "run", "training.se"], set()),  # which merge does not take
        (["train", RECIPE, "training.loraplus_ratio"], {"training.loraplus_ratio=null"}),
        (["train", RECIPE, "training.gradient_accumulation_steps"], {"training.gradient_accumulation_steps=8"}),
        (["plan", RECIPE, "memory.streaming", "="], {"auto", "off", "host", "disk"}),  # as bash splits the word
        (["plan", RECIPE, "memory.streaming", "=", "o"], {"off"}),
        (["plan", RECIPE, "adapter.method", "=", "ia3", "adapter.feed"], {"adapter.feedforward_modules=null"}),
        (["plan", RECIPE, "~adapter.tar"], {"~adapter.target_modules", "~adapter.target_parameters"}),
        (["eval", RECIPE, ""], {"model.", "evaluation.", "data."}),
    ],
    ids=lambda texts: " ".join(sorted(texts) if isinstance(texts, set) else texts).replace(RECIPE, "RECIPE"),
)
def test_a_word_is_completed(words: list[str], expected: set[str]) -> None:
    assert set(completed(*words)) == expected


@pytest.mark.drawn
def test_other_shells_get_the_whole_word_and_its_meaning() -> None:
    (first, *_) = completed("train", RECIPE, "training.optimizer=paged", shell="fish")
    assert first == "training.optimizer=paged_adamw"
    (line,) = [line for line in completed("train", RECIPE, "training.", shell="fish") if "seed" in line]
    assert line.split("\t") == ["training.seed=", "seed of every random draw"]
    assert '"training.optimizer=paged_adamw"' in "".join(completed("train", RECIPE, "training.opt", shell="zsh"))


def test_bash_itself_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is absent")
    (tmp_path / "tunekit").write_text(f'#!{bash}\nexec "{sys.executable}" -c "{PROGRAM}"\n')
    (tmp_path / "tunekit").chmod(0o755)
    script = (
        'eval "$(_TUNEKIT_COMPLETE=source_bash tunekit)"\n'
        "COMP_WORDS=(tunekit train one.yaml training.scheduler = co) COMP_CWORD=5\n"
        "_tunekit_completion tunekit\n"
        'echo "${COMPREPLY[*]}"\n'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["constant", "cosine", "cosine_with_min_lr", "cosine_with_restarts"], done.stderr


def test_recipe_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one/deep/a.yaml", "one/deep/b.yml", "one/deep/rows.jsonl", ".hidden/c.yaml", "two.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert complete_recipe_file("") == ["one/", "two.yaml"]
    assert complete_recipe_file("o") == ["one/deep/a.yaml", "one/deep/b.yml"]
    assert complete_recipe_file("one/deep/b") == ["one/deep/b.yml"]
    assert complete_recipe_file(f"{tmp_path}/t") == [f"{tmp_path}/two.yaml"]
    assert complete_recipe_file("absent/") == []


def test_every_key_of_every_method_is_offered_and_no_other(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for method in known_names("adapters"):
        recipe.write_text(json.dumps({"adapter": {"method": method}}))
        given = ["adapter.method=lora"] if method == "dora" else []  # the command line wins
        offered = {text for text, _ in complete_override("~adapter.", str(recipe), given)}
        shown = "lora" if given else method
        keys = json.loads((shipped_folder() / "recipe.schema.json").read_text())["properties"]["adapter"]["anyOf"]
        (choice,) = [each["properties"] for each in keys[1:] if each["properties"]["method"]["const"] == shown]
        assert offered == {f"~adapter.{key}" for key, field in choice.items() if not field.get("deprecated")}


@pytest.mark.parametrize("text", ["", "- a\n", "model: [", "\x00", "adapter: ~\n"])
def test_a_broken_recipe_is_no_reason_to_complain(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert ("training.seed=0", "seed of every random draw") in complete_override(
        "training.se", str(tmp_path / "r.yaml")
    )
    assert complete_override("training.se", str(tmp_path / "absent.yaml"))


def test_a_shell_need_not_be_waited_for() -> None:
    tell = "print(*sys.modules, file=sys.stderr)"
    program = f"import atexit, sys; atexit.register(lambda: {tell}); {PROGRAM}"
    words = {"COMP_WORDS": f"tunekit\ntrain\n{RECIPE}\ntraining.", "COMP_CWORD": "3"}
    asked = os.environ | words | {"_TUNEKIT_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True)
    assert "training.seed=" in done.stdout
    modules = done.stderr.split()
    assert [name for name in modules if name.startswith((*HEAVY, "tunekit.recipe.bases.section"))] == []
