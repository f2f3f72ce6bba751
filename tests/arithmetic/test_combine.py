"""`tunekit adapter combine`: every kind against PEFT's add_weighted_adapter, and what may not go together."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tunekit.arithmetic.pruning
from tests.architectures.tiny import make_tiny
from tests.contract.test_layer_contract import METHODS, attach, make_base, make_input
from tests.support.peft_case import BASES, HARMLESS_WARNINGS, logits_of, move_from_start
from tests.test_cli import run
from tunekit.adapter import combine_verb, convert_verb
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.arithmetic.combine import KINDS, Mixture, combine
from tunekit.arithmetic.lora_folder import read_lora_folder
from tunekit.arithmetic.low_rank import LowRank, decompose, reduce_rank, weighted_sum
from tunekit.arithmetic.pruning import weighted
from tunekit.errors import TunekitError
from tunekit.recipe.adapters.bitfit import BitfitSettings
from tunekit.recipe.adapters.lora import LoraSettings

peft = pytest.importorskip("peft")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS = (0.7, -0.4)
PRUNED = {
    kind: 0.6 for kind in KINDS if kind.removesuffix("_svd") in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
}


def write(folder: Path, seed: int, family: str = "llama", fingerprint: str | None = "f", **values: Any) -> Path:
    base = BASES[family]
    settings = LoraSettings(**{"r": 4, "alpha": 6, "target_modules": base.attention, **values})
    attached = attach_adapter(base.make(), settings, seed=seed, head_name=base.head_name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter_folder(
        attached, folder, base_name="org/base", base_fingerprint=fingerprint, revision=None, task_type=base.task_type
    )
    return folder


def call(
    output: Path,
    folders: list[Path],
    kind: str,
    weights: str | None = "0.7,-0.4",
    density: float | None = None,
    rank: int | None = None,
    sign: str | None = None,
    base: str | None = None,
    seed: int | None = None,
) -> Path:
    combine_verb([str(f) for f in folders], weights, kind, density, rank, sign, seed, base, str(output))
    return output


def logits_here(folder: Path, family: str = "llama") -> Tensor:
    base = BASES[family]
    return logits_of(attach_adapter_folder(base.make(), folder, head_name=base.head_name).net, base).detach()


def logits_by_peft(folder: Path, family: str = "llama") -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        theirs = peft.PeftModel.from_pretrained(BASES[family].make(), str(folder)).eval()
    return logits_of(theirs, BASES[family]).detach()


def combined_by_peft(folders: list[Path], family: str = "llama", **values: Any) -> Tensor:
    """Logits with what add_weighted_adapter makes."""
    theirs = peft.PeftModel.from_pretrained(BASES[family].make(), str(folders[0]), adapter_name="a")
    theirs.load_adapter(str(folders[1]), adapter_name="b")
    theirs.base_model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "new", **values)
    theirs.set_adapter("new")
    return logits_of(theirs.eval(), BASES[family]).detach()


@pytest.fixture
def same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random choice of both sides follows from each number alone."""

    def theirs(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        return tensor * ((tensor.abs() * 37) % 1 < density) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", theirs)
    monkeypatch.setattr(
        tunekit.arithmetic.pruning, "keep_random", lambda tensor, density, _: theirs(tensor, density, True)
    )


@pytest.mark.sampled(10)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("same_choice")
def test_every_kind_is_pefts(kind: str, family: str, tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1, family), write(tmp_path / "b", 2, family, alpha=3, use_rslora=True)]
    new = call(tmp_path / "new", folders, kind, density=PRUNED.get(kind), sign="frequency" if "ties" in kind else None)
    sign = {"majority_sign_method": "frequency"} if "ties" in kind else {}
    expected = combined_by_peft(folders, family, combination_type=kind, density=PRUNED.get(kind), **sign)
    plain = logits_of(BASES[family].make(), BASES[family]).detach()
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits_here(new, family), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_by_peft(new, family), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_linear_svd"])
@pytest.mark.usefixtures("same_choice")
def test_ranks_and_layers_may_differ(kind: str, tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", 1, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 3}),
        write(
            tmp_path / "b", 2, r=2, target_modules=("q_proj", "down_proj"), alpha_pattern={"layers.1.mlp.down_proj": 9}
        ),
    ]
    new = call(tmp_path / "new", folders, kind, density=PRUNED.get(kind))
    expected = combined_by_peft(folders, combination_type=kind, density=PRUNED.get(kind))
    torch.testing.assert_close(logits_here(new), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_by_peft(new), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_embeddings_are_combined_too(kind: str, tmp_path: Path) -> None:
    folders = [write(tmp_path / n, s, target_modules=("embed_tokens", "v_proj")) for n, s in (("a", 1), ("b", 2))]
    new = call(tmp_path / "new", folders, kind)
    expected = combined_by_peft(folders, combination_type=kind)
    torch.testing.assert_close(logits_here(new), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_by_peft(new), expected, rtol=0, atol=2e-5)


def test_a_lower_rank_is_the_nearest(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1), write(tmp_path / "b", 2)]
    new = call(tmp_path / "new", folders, "svd", rank=3)
    expected = combined_by_peft(folders, combination_type="svd", svd_rank=3)
    torch.testing.assert_close(logits_here(new), expected, rtol=0, atol=2e-5)
    assert json.loads((new / CONFIG).read_text())["r"] == 3


def test_cat_stays_within_the_size_of_a_layer(tmp_path: Path) -> None:
    """A rank above a layer's size cannot be trained (adapter.init_from), and the sum does not need it."""
    folders = [write(tmp_path / name, seed, r=12) for seed, name in enumerate(("one", "two"))]
    loras = [read_lora_folder(folder) for folder in folders]
    combined = combine(loras, Mixture("cat", (0.5, 0.5)))
    assert any(min(update.shape) < 24 for update in combined.updates.values())
    for name, update in combined.updates.items():
        assert update.rank == min(24, *update.shape)
        exact = weighted_sum([lora.updates[name] for lora in loras], [0.5, 0.5])
        torch.testing.assert_close(update.dense(), exact.dense(), rtol=1e-5, atol=1e-6)


def test_layers_of_few_adapters_do_not_bring_patterns(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1, target_modules=("q_proj",)), write(tmp_path / "b", 2, r=2)]
    config = json.loads((call(tmp_path / "new", folders, "cat") / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})


def test_targets_stay_as_they_were_named(tmp_path: Path) -> None:
    folders = [write(tmp_path / n, s, layers_to_transform=(1,)) for n, s in (("a", 1), ("b", 2))]
    old, new = (json.loads((f / CONFIG).read_text()) for f in (folders[0], call(tmp_path / "new", folders, "cat")))
    assert new.keys() == old.keys()
    assert new["target_modules"] == old["target_modules"]
    assert (new["base_model_name_or_path"], new["task_type"]) == ("org/base", "CAUSAL_LM")


def test_what_it_says_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    words = ["adapter", "combine", str(a), str(b), "--weights", "0.5,0.5", "--method", "linear"]
    assert run(monkeypatch, *words, "--output", str(tmp_path / "new")) == 0
    out = capsys.readouterr().out
    left, right, new = (read_lora_folder(folder).updates for folder in (a, b, tmp_path / "new"))
    errors = [new[n].dense() - 0.5 * (left[n].dense() + right[n].dense()) for n in new]
    sums = [0.5 * (left[n].dense() + right[n].dense()) for n in new]
    distance = torch.cat([e.flatten() for e in errors]).norm() / torch.cat([s.flatten() for s in sums]).norm()
    assert f"by {float(distance):.2%} of its norm" in out
    assert out.splitlines()[-1] == f"written to {tmp_path / 'new'}"
    assert combine([read_lora_folder(a), read_lora_folder(b)], Mixture("cat", (0.5, 0.5))).distance < 1e-6


def test_random_choices_depend_on_the_seed_alone(tmp_path: Path) -> None:
    adapters = [read_lora_folder(write(tmp_path / n, s)) for n, s in (("a", 1), ("b", 2))]
    made = [combine(adapters, Mixture("dare_ties", WEIGHTS, 0.5, seed=seed)).updates for seed in (3, 3, 4)]
    name = next(iter(made[0]))
    assert torch.equal(made[0][name].a, made[1][name].a)
    assert not torch.equal(made[0][name].a, made[2][name].a)
    kept = torch.cat([update.a.flatten() for update in made[0].values()]).ne(0).float().mean()
    assert 0.65 < kept < 0.85  # of two tensors, either keeps half


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_sums_are_pefts_number_by_number(kind: str, density: float) -> None:
    from peft.utils import merge_utils

    tensors = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    theirs = {"linear": merge_utils.task_arithmetic, "ties": merge_utils.ties}.get(kind, merge_utils.magnitude_prune)
    more = () if kind == "linear" else (density,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(tensors, torch.tensor([1.0, -0.5, 0.2]), *more)
    assert torch.equal(weighted(kind, tensors, [1.0, -0.5, 0.2], density=density), expected)


def test_low_rank_numbers_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    first, second = (LowRank(torch.randn(3, 20), torch.randn(11, 3), 0.7) for _ in range(2))
    one, two = first.dense(), second.dense()
    assert first.norm() == pytest.approx(float(one.norm()), rel=1e-5)
    assert first.inner(second) == pytest.approx(float((one * two).sum()), rel=1e-4)
    total = weighted_sum([first, second], [2.0, -3.0])
    torch.testing.assert_close(total.dense(), 2 * one - 3 * two, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(total.dense())
    for made in (reduce_rank(total, 4), decompose(total.dense(), 4)):
        error = weighted_sum([made, total], [1.0, -1.0]).norm()
        assert error == pytest.approx(float(values[4:].norm()), rel=1e-4)
    torch.testing.assert_close(first.padded(5).dense(), one)


LINEAR = ("fourierft", "c3a", "shira", "miss", "ia3")


@pytest.mark.parametrize("method", LINEAR)
def test_linear_methods_add_their_updates(method: str, tmp_path: Path) -> None:
    x, changes = make_input("dense"), []
    base = make_base("dense")
    plain = base(x).detach()
    for name in ("a", "b"):
        attached = attach(make_base("dense"), method)
        move_from_start(attached.trained().values(), 0.2, seed=6)
        if name == "b":
            with torch.no_grad():
                for parameter in attached.trained().values():
                    parameter.mul_(-0.7).add_(0.1)
        save_adapter_folder(attached, tmp_path / name, base_name="org/base", base_fingerprint="f", revision=None)
        changes.append(attached.net(x).detach() - plain)
    new = call(tmp_path / "new", [tmp_path / "a", tmp_path / "b"], "linear")
    got = attach_adapter_folder(base, new, head_name=None).net(x).detach() - plain
    expected = 0.7 * changes[0] - 0.4 * changes[1]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


OTHERS = [name for name, make in METHODS.items() if make().method not in (*LINEAR, "lora", "lora_fa")]


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        attached = attach(make_base("dense"), method)
        save_adapter_folder(attached, tmp_path / name, base_name="org/base", base_fingerprint="f", revision=None)
    with pytest.raises(TunekitError, match=r"adapter convert|weights sum to"):
        call(tmp_path / "new", [tmp_path / "a", tmp_path / "b"], "linear")
    assert not (tmp_path / "new").exists()


def test_biases_are_averaged_where_weights_sum_to_one(tmp_path: Path) -> None:
    base, folders = BASES["gpt2"], list[Path]()
    for number, name in enumerate(("a", "b")):
        attached = attach_adapter(base.make(), BitfitSettings(), seed=0, head_name=base.head_name)
        with torch.no_grad():
            for parameter in attached.trained().values():
                parameter.fill_(number + 1)
        save_adapter_folder(attached, tmp_path / name, base_name="org/base", base_fingerprint="f", revision=None)
        folders.append(tmp_path / name)
    with pytest.raises(
        TunekitError, match=r"bitfit trains whole tensors, so the weights must sum to 1, .* sum to 0\.3"
    ):
        call(tmp_path / "new", folders, "linear")
    new = call(tmp_path / "new", folders, "linear", "0.25,0.75")
    biases = list(attach_adapter_folder(base.make(), new, head_name=base.head_name).trained().values())
    assert biases
    assert all(torch.equal(bias, torch.full_like(bias, 1.75)) for bias in biases)


def test_copies_are_averaged_where_weights_sum_to_one(tmp_path: Path) -> None:
    folders = [write(tmp_path / n, s, modules_to_save=("lm_head",)) for n, s in (("a", 1), ("b", 2))]
    with pytest.raises(TunekitError, match=r"sum to 0\.3"):
        call(tmp_path / "new", folders, "cat")
    with pytest.raises(TunekitError, match="ties cannot combine"):
        call(tmp_path / "new", folders, "ties", "0.7,0.3", density=0.5)
    new = call(tmp_path / "new", folders, "cat", "0.7,0.3")
    key = "base_model.model.lm_head.weight"
    a, b, got = (load_file(folder / TENSORS)[key] for folder in (*folders, new))
    torch.testing.assert_close(got, 0.7 * a + 0.3 * b)
    torch.testing.assert_close(logits_here(new), logits_by_peft(new), rtol=0, atol=2e-5)
    write(tmp_path / "c", 3)
    with pytest.raises(TunekitError, match="by only 1 of the 2 adapters"):
        call(tmp_path / "other", [folders[0], tmp_path / "c"], "cat", "0.7,0.3")


def test_rows_of_tokens_are_averaged_where_they_are_the_same_tokens(tmp_path: Path) -> None:
    folders = [write(tmp_path / n, s, trainable_token_indices=(9, 5)) for n, s in (("a", 1), ("b", 2))]
    new = call(tmp_path / "new", folders, "svd", "0.7,0.3")
    key = next(key for key in load_file(new / TENSORS) if "trainable_tokens" in key)
    a, b, got = (load_file(folder / TENSORS)[key] for folder in (*folders, new))
    torch.testing.assert_close(got, 0.7 * a + 0.3 * b)
    assert json.loads((new / CONFIG).read_text())["trainable_token_indices"] == [9, 5]  # the order of the rows
    torch.testing.assert_close(logits_here(new), logits_by_peft(new), rtol=0, atol=2e-5)
    write(tmp_path / "c", 3, trainable_token_indices=(9, 8))
    with pytest.raises(TunekitError, match="rows of different tokens"):
        call(tmp_path / "other", [folders[0], tmp_path / "c"], "cat", "0.7,0.3")


def edit(folder: Path, **fields: Any) -> Path:
    (folder / "tunekit.json").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("there is no combination method 'sum'", {"kind": "sum"}),
        ("1 weights for 2 adapters", {"weights": "1"}),
        ("is not a list of numbers", {"weights": "a,b"}),
        ("a number other than 0", {"weights": "nan,1"}),
        ("a number other than 0", {"weights": "0,1"}),
        ("needs a density", {"kind": "ties"}),
        ("needs a density", {"kind": "dare_linear_svd", "density": 0.0}),
        ("a density has no effect", {"density": 0.5}),
        ("follows from the adapters' ranks", {"rank": 4}),
        ("rank must be at least 1", {"kind": "svd", "rank": 0}),
        ("is not a majority sign", {"sign": "most"}),
        ("a majority sign has no effect with the method cat", {"sign": "frequency"}),
        ("a seed has no effect with the method ties", {"kind": "ties", "density": 0.5, "seed": 3}),
    ],
)
def test_options_that_mean_nothing_are_refused(words: str, options: dict[str, Any], tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1), write(tmp_path / "b", 2)]
    with pytest.raises(TunekitError, match=words):
        call(tmp_path / "new", folders, **{"kind": "cat", **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1)
    cases = {
        "different base": write(tmp_path / "b", 2, fingerprint="g"),
        "linear needs adapters of equal rank": write(tmp_path / "c", 2, r=3),
        "different tasks": edit(write(tmp_path / "d", 2), task_type="SEQ_CLS"),
        r"org/other \(revision None\), but": edit(write(tmp_path / "e", 2), base_model_name_or_path="org/other"),
    }
    for words, other in cases.items():
        with pytest.raises(TunekitError, match=words):
            call(tmp_path / "new", [a, other], "linear")
    named = call(tmp_path / "new", [a, tmp_path / "e"], "linear", base="org/base")
    assert json.loads((named / CONFIG).read_text())["base_model_name_or_path"] == "org/base"
    wide = write(tmp_path / "g", 2, "gpt2", target_modules=("c_attn",))
    edit(wide, task_type="CAUSAL_LM")
    tensors = {
        key.replace("transformer.h.0.attn.c_attn", "model.layers.0.self_attn.q_proj"): t
        for key, t in load_file(wide / TENSORS).items()
    }
    save_file(tensors, wide / TENSORS)
    with pytest.raises(
        TunekitError, match=r"'model.layers.0.self_attn.q_proj' has the shape \[96, 32\], but \[32, 32\]"
    ):
        call(tmp_path / "other", [a, wide], "cat")
    ia3 = attach_adapter(make_base("dense"), METHODS["ia3"](), seed=0, head_name=None)
    save_adapter_folder(ia3, tmp_path / "ia3", base_name="org/base", base_fingerprint="f", revision=None)
    with pytest.raises(TunekitError, match="different methods: ia3, lora"):
        call(tmp_path / "other", [a, tmp_path / "ia3"], "linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(32)}, "is not a tensor of this adapter"),
        (
            lambda t: {key: value for key, value in t.items() if "layers.0.self_attn.q_proj.lora_B" not in key},
            "exactly one pair",
        ),
        (lambda t: {key: value[:3] if "lora_A" in key else value for key, value in t.items()}, "do not have rank 4"),
        (lambda t: {key: value.to(torch.int8) for key, value in t.items()}, "have type I8"),
        (lambda t: {key: value * float("nan") for key, value in t.items()}, "contains NaN or infinity"),
        (lambda t: {key.replace("base_model.model.", ""): value for key, value in t.items()}, "is not a tensor"),
    ],
)
def test_a_malformed_folder_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1), edit(write(tmp_path / "b", 2))
    save_file(change(load_file(b / TENSORS)), b / TENSORS)
    with pytest.raises(TunekitError, match=words):
        call(tmp_path / "new", [a, b], "cat")
    assert not (tmp_path / "new").exists()


def test_the_output_is_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    before = (a / TENSORS).read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    cases = [(a, "overlaps"), (tmp_path, "overlaps"), (a / "new", "overlaps")]
    for output, words in [*cases, (tmp_path / "full", "not an empty folder"), (tmp_path / "full/mine", "not an empty")]:
        assert run(monkeypatch, "adapter", "combine", str(a), str(b), "--output", str(output)) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, "adapter", "combine", str(a), str(b), "--output", str(tmp_path / "empty")) == 0
    assert (a / TENSORS).read_bytes() == before
    assert "0.5 x" in capsys.readouterr().out


def test_a_local_base_is_named_from_the_new_place(tmp_path: Path) -> None:
    for folder in ("base", "runs", "made/of"):
        (tmp_path / folder).mkdir(parents=True)
    folders = [
        edit(write(tmp_path / "runs" / n, s), base_model_name_or_path="../../base") for n, s in (("a", 1), ("b", 2))
    ]
    new = call(tmp_path / "made" / "of" / "both", folders, "cat")
    assert json.loads((new / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert json.loads((new / "tunekit.json").read_text())["base"]["path"] == "../../../base"


def test_adapters_of_experts_are_refused_as_by_peft(tmp_path: Path) -> None:
    experts = {"target_modules": ("q_proj",), "target_parameters": ("gate_up_proj",)}
    folders = [write(tmp_path / n, s, "mixtral", **experts) for n, s in (("a", 1), ("b", 2))]
    with pytest.raises(TunekitError, match="adapts fused expert parameters"):
        call(tmp_path / "new", folders, "cat")


@pytest.mark.parametrize("targets", [("all-linear",) * 2, (("q_b_proj", "up_proj"), ("down_proj",))])
def test_layers_that_peft_reads_as_parameters_are_combined_and_converted(tmp_path: Path, targets: Any) -> None:
    """The dense MLP and the shared experts of a DeepSeek, which the files name as parameters."""
    head: dict[str, Any] = {"head_name": "lm_head"}
    sources = []
    for seed, layers in enumerate(targets):
        patterns = {"down_proj": 3} if seed else {}
        settings = LoraSettings(r=2, target_modules=layers, rank_pattern=patterns)
        attached = attach_adapter(make_tiny("deepseek_v3"), settings, seed=seed, **head)
        move_from_start(attached.trained().values(), 0.2, seed=6)
        sources.append(tmp_path / f"{seed}")
        save_adapter_folder(
            attached, sources[-1], base_name="b", base_fingerprint="f", revision=None, task_type="CAUSAL_LM"
        )
    new = call(tmp_path / "new", sources, "cat")
    loras = [read_lora_folder(folder) for folder in sources]
    assert all(lora.parameters for lora in loras)
    names = {name for lora in loras for name in lora.updates}
    made = attach_adapter_folder(make_tiny("deepseek_v3"), new, **head)
    assert set(made.layers) == names
    for name in names:
        expected: Any = sum(
            lora.updates[name].dense() * weight
            for lora, weight in zip(loras, WEIGHTS, strict=True)
            if name in lora.updates
        )
        found = read_lora_folder(new).updates[name].dense()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    peft.PeftModel.from_pretrained(make_tiny("deepseek_v3"), str(new))
    convert_verb(str(new), 2, None, None, str(tmp_path / "smaller"))
    assert {update.rank for update in read_lora_folder(tmp_path / "smaller").updates.values()} <= {1, 2}


def test_a_start_that_moved_weights_is_converted_first(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1), edit(write(tmp_path / "b", 2), init_lora_weights="pissa")]
    with pytest.raises(TunekitError, match=r"init_lora_weights: .* to plain LoRA with: tunekit adapter convert"):
        call(tmp_path / "new", folders, "cat")


def test_whole_modules_beside_a_linear_method_are_refused_by_name(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"])
    peft.get_peft_model(BASES["llama"].make(), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(TunekitError, match="modules_to_save: ia3 adapters that also train whole modules cannot be"):
        call(tmp_path / "new", [tmp_path / "a"] * 2, "linear")


def test_one_folder_can_be_named_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1, modules_to_save=("lm_head",))
    new = call(tmp_path / "new", [folder, folder], "cat", "0.5,0.5")
    torch.testing.assert_close(logits_here(new), logits_here(folder), rtol=0, atol=2e-5)


def test_a_rank_above_the_sides_is_reduced_to_them() -> None:
    update = LowRank(torch.randn(9, 7), torch.randn(5, 9), 2.0)
    reduced = reduce_rank(update, 9)
    assert reduced.rank == 5
    torch.testing.assert_close(reduced.dense(), update.dense())


@pytest.mark.parametrize("base", ["./none", "/nowhere/model", "a/b/c", "none.gguf"])
def test_a_base_that_can_only_be_a_path_must_exist(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, new = write(tmp_path / "a", 1), tmp_path / "new"
    assert run(monkeypatch, "adapter", "convert", str(a), "--base", base, "--output", str(new)) == 2
    assert f"--base: there is no folder or file {base}" in capsys.readouterr().err
    assert not new.exists()
