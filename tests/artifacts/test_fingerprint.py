"""What forbids a resume, and in which words."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tunekit.artifacts.fingerprint import (
    RESULT_VERSIONS,
    compare_fingerprints,
    make_fingerprint,
    require_same,
    resume_notes,
)
from tunekit.errors import RunFolderError

RECIPE: dict[str, Any] = {
    "model": {"name_or_path": "/models/a", "quantization": "none", "revision": None},
    "data": {"train": [{"path": "/data/train.jsonl", "columns": {}, "weight": 1.0}], "eval": 0.05, "max_length": 2048},
    "adapter": {"method": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]},
    "training": {"learning_rate": 2e-4, "optimizer": "adamw", "save_steps": 100, "keep_checkpoints": 2},
    "output": {"dir": "/runs/first", "report_to": []},
}
WITHOUT_SHARE = {**RECIPE, "data": {**RECIPE["data"], "eval": None}}
VERSIONS = {"tunekit": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "bitsandbytes": "0.50.2", "numpy": "2.0"}


def facts(recipe: dict[str, Any] = RECIPE, **changes: Any) -> dict[str, Any]:
    values = {
        "data": "d",
        "base": "b",
        "versions": VERSIONS,
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        **changes,
    }
    return make_fingerprint(recipe, **values)


def changed(key: str, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(RECIPE)
    place: Any = recipe
    *way, last = key.split(".")
    for part in way:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    return recipe


def test_the_same_is_the_same_also_through_json() -> None:
    assert compare_fingerprints(facts(), facts()) == []
    assert compare_fingerprints(json.loads(json.dumps(facts(), allow_nan=False)), facts()) == []


def test_another_dtype_of_auto_is_refused() -> None:
    """A resume on a processor with bfloat16, or ranks with different GPUs. Runs of older versions do not state it."""
    ((key, text),) = compare_fingerprints(facts(), facts(dtype="bfloat16"))
    assert (key, text) == ("model.dtype", "auto is float32 on one processor or GPU, but bfloat16 on the other")
    older = {name: value for name, value in facts().items() if name != "dtype"}
    assert compare_fingerprints(older, facts(dtype="bfloat16")) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output.report_to", ["tensorboard"]),
        ("output.dir", "/elsewhere"),
        ("training.save_steps", 1),
        ("training.keep_checkpoints", 9),
        ("model.name_or_path", "/moved/models/a"),
        ("data.train.0.path", "/moved/train.jsonl"),
    ],
)
def test_what_may_change(key: str, value: Any) -> None:
    assert compare_fingerprints(facts(), facts(changed(key, value))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 1e-4),
        ("adapter.r", 8),
        ("adapter.target_modules", ["q_proj"]),
        ("adapter.target_modules", "all-linear"),
        ("model.name_or_path", "hub/name"),
        ("model.quantization", "nf4"),
        ("data.train.0.weight", 2.0),
        ("data.train.0.columns", {"a": "b"}),
        ("data.eval", None),
        ("model.revision", "main"),
    ],
)
def test_what_may_not_change_is_named(key: str, value: Any) -> None:
    found = compare_fingerprints(facts(), facts(changed(key, value)))
    assert any(name == key or name.startswith(f"{key}.") for name, _ in found), found


def test_a_permission_may_change() -> None:
    """A reward model needs it now, which runs of older versions did not write."""
    old, new = copy.deepcopy(RECIPE), copy.deepcopy(RECIPE)
    for recipe, allowed in ((old, False), (new, True)):
        recipe["objective"] = {"method": "grpo", "reward": [{"model": "/runs/reward", "allow_code": allowed}]}
    assert compare_fingerprints(facts(old), facts(new)) == []


def test_a_removed_key_is_no_difference() -> None:
    assert compare_fingerprints(facts(changed("training.compile", False)), facts()) == []


def test_data_base_versions_and_device_are_told_apart() -> None:
    assert [name for name, _ in compare_fingerprints(facts(), facts(data="other"))] == ["data"]
    assert [name for name, _ in compare_fingerprints(facts(), facts(base="other"))] == ["model"]
    assert [name for name, _ in compare_fingerprints(facts(), facts(device="cuda"))] == ["device"]
    found = compare_fingerprints(facts(), facts(versions={**VERSIONS, "torch": "2.14.0"}))
    assert found == [("torch", "was version 2.13.0, is 2.14.0")]
    assert compare_fingerprints(facts(), facts(versions={**VERSIONS, "numpy": "3"})) == []


def test_bitsandbytes_counts_only_where_it_computes() -> None:
    other = {**VERSIONS, "bitsandbytes": "0.51.0"}
    assert compare_fingerprints(facts(), facts(versions=other)) == []
    int8, nf4 = (changed("model.quantization", name) for name in ("int8", "nf4"))
    paged = changed("training.optimizer", "paged_adamw_8bit")
    for recipe, device in ((int8, "cpu"), (paged, "cpu"), (nf4, "cuda")):
        old, new = (facts(recipe, versions=versions, device=device) for versions in (VERSIONS, other))
        assert [name for name, _ in compare_fingerprints(old, new)] == ["bitsandbytes"]
    assert compare_fingerprints(facts(nf4), facts(nf4, versions=other)) == []  # our own code on a CPU


def test_kernels_of_other_packages_count_on_a_gpu() -> None:
    """Another version rounds differently. Those of liger and flash attention count if the recipe uses them."""
    other = {**VERSIONS, "mamba-ssm": "2.2.4", "liger-kernel": "0.5"}
    recurrent: dict[str, Any] = {"device": "cuda", "packages": ("mamba-ssm", "causal-conv1d")}
    on_gpu = facts(**recurrent)
    found = compare_fingerprints(on_gpu, facts(**recurrent, versions=other))
    assert found == [("mamba-ssm", "was version not installed, is 2.2.4")]
    liger = changed("training.kernels", "liger")
    old, new = (facts(liger, **recurrent, versions=versions) for versions in (VERSIONS, other))
    assert [name for name, _ in compare_fingerprints(old, new)] == ["liger-kernel", "mamba-ssm"]
    older = {**on_gpu, "versions": {name: VERSIONS[name] for name in RESULT_VERSIONS}}
    assert compare_fingerprints(older, facts(**recurrent, versions=other)) == []
    assert compare_fingerprints(facts(packages=("mamba-ssm",)), facts(packages=("mamba-ssm",), versions=other)) == []
    assert compare_fingerprints(on_gpu, facts(device="cuda", versions=other)) == []  # a base without such layers


def test_remote_code_that_an_older_run_does_not_state_has_not_changed() -> None:
    stated = {"model.trust_remote_code": "a", "objective.reward.0.function": "b"}
    assert compare_fingerprints(facts(), facts(code={"model.trust_remote_code": "a"})) == []
    found = compare_fingerprints(facts(code=stated), facts(code={**stated, "model.trust_remote_code": "c"}))
    assert found == [("model.trust_remote_code", "its content is different")]
    assert [name for name, _ in compare_fingerprints(facts(), facts(code=stated))] == ["objective.reward.0.function"]


def test_runs_of_an_older_tunekit_are_told_of_numbers_that_change() -> None:
    def notes(recipe: dict[str, Any] = WITHOUT_SHARE, **changes: Any) -> list[str]:
        new = facts(recipe, **changes)
        assert resume_notes(new, new) == []
        older = {name: value for name, value in new.items() if name != "numerics"}
        assert compare_fingerprints(older, new) == []
        return resume_notes(older, new)

    assert notes() == []
    assert notes(device="cuda", dtype="bfloat16") == []
    (note,) = notes({**WITHOUT_SHARE, "model": {**RECIPE["model"], "quantization": "nf4"}})
    assert "T5" in note
    (note,) = notes(device="cuda")
    assert "convolutions" in note


def test_a_run_of_an_earlier_version_with_a_share_is_refused_in_one_line() -> None:
    """Its evaluation rows were others. Every other difference follows from this one, so none is named."""
    older = {**facts(), "numerics": 1, "data": "other", "versions": {**VERSIONS, "tunekit": "0.0.9"}}
    with pytest.raises(RunFolderError) as caught:
        require_same(older, facts(), lines={"data.eval": 4}, file="recipe.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "recipe.yaml:4: data.eval: an earlier version of tunekit trained the run, and drew other evaluation rows; "
        "start a new run in another output.dir (adapter.init_from starts it from an existing adapter)"
    ]
    assert compare_fingerprints({**facts(WITHOUT_SHARE), "numerics": 1}, facts(WITHOUT_SHARE)) == []
    assert compare_fingerprints(older, {**older}) == []


def test_threads_are_kept_but_never_refused() -> None:
    assert facts(threads=3)["threads"] == 3
    assert compare_fingerprints(facts(), facts(threads=3)) == []


def test_another_accelerator_is_a_note() -> None:
    old, new = facts(accelerator="A100"), facts(accelerator="H100")
    assert compare_fingerprints(old, new) == []
    assert "A100" in resume_notes(old, new)[0]
    assert resume_notes(old, old) == []


def test_a_refusal_names_all_differences_with_their_lines() -> None:
    new = facts(changed("training.learning_rate", 1e-4), data="other")
    with pytest.raises(RunFolderError) as caught:
        require_same(facts(), new, lines={"training.learning_rate": 7}, file="recipe.yaml")
    assert caught.value.exit_code == 2
    lines = [str(problem) for problem in caught.value.problems]
    assert lines[0].startswith("recipe.yaml:7: training.learning_rate: changed since the run: was 0.0002, is 0.0001")
    assert lines[1].startswith("data: changed since the run")
    assert "or start a new run in another output.dir" in str(caught.value)
    require_same(facts(), facts(), lines={}, file="recipe.yaml")


def test_values_are_shown_as_the_recipe_writes_them() -> None:
    recipe = {"training.max_grad_norm": 1.0, "data.streaming": False, "model.dtype": "auto"}
    changed = {"training.max_grad_norm": None, "data.streaming": True, "model.dtype": "float32"}
    with pytest.raises(RunFolderError) as caught:
        require_same(facts() | {"recipe": recipe}, facts() | {"recipe": changed}, lines={}, file="recipe.yaml")
    for text in ("was 1.0, is null; ", "was false, is true; ", 'was "auto", is "float32"; '):
        assert text in str(caught.value)


def test_code_that_is_known_on_one_side_only_is_not_the_same() -> None:
    known, unknown = {"code": {"objective.reward.0.function": "1"}}, {"code": {}}
    expected = [("objective.reward.0.function", "its content is different")]
    assert compare_fingerprints(known, unknown) == compare_fingerprints(unknown, known) == expected
    assert compare_fingerprints({}, {"files": {"objective.class_data_dir": "1"}}) == [], "it was not read yet"
