"""Full fine-tuning: against transformers and torch by hand, resumed, in 16 bits, exported, and used by every verb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    get_scheduler,
)

from tests.conftest import write_tiny_llama
from tests.memory.test_streaming_seq2seq import VOCABULARY, make_net
from tests.objectives.test_classify import STEPS, losses, texts
from tests.objectives.test_classify import write_recipe as write_classify
from tests.parity.test_loop_peft import big_batch_loss
from tests.planning.test_estimate import real_step
from tests.runs.test_seq2seq import _parted, _random_row
from tests.support.loop_case import Case, ListedRows, make_case, make_rows
from tests.support.peft_case import BASES
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.adapters.attach import attach_adapter
from tunekit.contracts import StepBatches
from tunekit.data.batching.steps import collate
from tunekit.errors import AdapterError, InputError, RecipeError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.generate import generate_verb
from tunekit.memory.tiling import tile_layers
from tunekit.merge import merge_verb
from tunekit.model.families.heads import TextHead
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.storage.rewrite import Rewriter
from tunekit.objectives.losses.logprobs import summed_loss
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.adapters.full import FullSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.validate import validate

CPU = torch.device("cpu")


def training(**changes: Any) -> TrainingSection:
    values = {"learning_rate": 2e-3, "weight_decay": 0.1, "micro_batch_size": 3, "gradient_accumulation_steps": 2}
    return TrainingSection(**{**values, "epochs": None, "max_steps": STEPS, "warmup_ratio": 0.2, **changes})


def by_hand(
    model: Any, steps: Iterator[Any], loss_of: Callable[[Any], Tensor], settings: TrainingSection, warmup: int
) -> list[float]:
    """torch's AdamW over transformers' own model: matrices decay, norms and biases do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)
    schedule, found = get_scheduler(settings.scheduler, optimizer, warmup, STEPS), []
    for step in steps:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def assert_as_by_hand(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Every trained tensor, and the whole way from the start. A key's bias has no gradient but rounding: softmax does
    not see it, and AdamW makes steps of full length of nothing."""
    assert set(ours) == set(theirs) == set(start)
    names = [name for name in start if not name.endswith(("k_proj.bias", "key.bias"))]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    way = [torch.cat([(side[name] - start[name]).flatten() for name in names]) for side in (ours, theirs)]
    assert (way[0] - way[1]).norm() < 1e-3 * way[1].norm()


def trained(case: Case) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in case.adapter.trained().items()}


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tied"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_of_a_causal_model(tied: bool, tiny_llama: Path, tied_llama: Path) -> None:
    folder = tied_llama if tied else tiny_llama
    case = make_case(folder, make_rows(37), training=training(), adapter=FullSettings(), end_to_end=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = plain(model)
    assert ("lm_head.weight" in start) != tied
    steps, warmup = case.steps.after(0), case.parts.plan.warmup_steps
    expected = by_hand(model, steps, lambda step: big_batch_loss(model, step, case), training(), warmup)
    case.run()
    assert case.losses == pytest.approx(expected, rel=1e-5)
    assert_as_by_hand(trained(case), plain(model), start)


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_twenty_steps_of_an_encoder_decoder(kind: str, tmp_path: Path) -> None:
    quiet = {"dropout_rate": 0.0} if kind == "t5" else {"dropout": 0.0}
    make_net(kind, decoder_start_token_id=0, **quiet).save_pretrained(tmp_path)  # type: ignore[operator]
    generator = np.random.default_rng(0)
    rows = ListedRows([_random_row(generator, VOCABULARY) for _ in range(37)])
    case = make_case(tmp_path, rows, training=training(), adapter=FullSettings(), objective=Seq2seqSettings())
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    start = plain(model)

    def loss_of(step: StepBatches) -> Tensor:
        parts = [_parted(row) for batch in step.batches for row in batch.rows]
        total = sum(model(input_ids=source, labels=answer).loss * answer.numel() for source, answer in parts)
        return total / sum(answer.numel() for _, answer in parts)

    expected = by_hand(model, case.steps.after(0), loss_of, training(), case.parts.plan.warmup_steps)
    case.run()
    assert case.losses == pytest.approx(expected, rel=1e-5)
    assert_as_by_hand(trained(case), plain(model), start)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_twenty_steps_of_a_classifier(base: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The head is drawn by the run; one step, whose rate is 0, shows what it was. The folder then is a classifier."""
    settings = training(learning_rate=2e-3, micro_batch_size=6, gradient_accumulation_steps=1).model_dump(mode="json")
    folder = request.getfixturevalue(f"classify_{base}")
    given = {"data": {"shuffle": False}, "adapter": "full", "training": settings}
    recipe = write_classify(tmp_path / "recipe", folder, **given)
    train_verb(load_recipe(recipe, ["training.max_steps=1", f"output.dir={tmp_path / 'start'}"]), False, False)
    train_verb(load_recipe(recipe, [f"output.dir={tmp_path / 'run'}"]), False, False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start" / "model")
    start, rows, labels = plain(model), texts(42), ["no", "perhaps", "yes"]
    assert model.config.id2label == dict(enumerate(labels))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start" / "model")

    def loss_of(step: int) -> Tensor:
        total = torch.zeros(())
        for text, label in rows[step % 7 * 6 : step % 7 * 6 + 6]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([labels.index(label)]))
        return total / 6

    assert losses(tmp_path / "run") == pytest.approx(
        by_hand(model, iter(range(STEPS)), loss_of, training(), 4), rel=1e-5
    )
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert_as_by_hand(plain(ours), plain(model), start)
    for target in (tmp_path / "run", tmp_path / "run" / "model"):
        given = None if target.name == "run" else str(tmp_path / "recipe" / "test.jsonl")
        evaluate_verb(str(target), None, given, None, [], str(tmp_path / "eval.json"), [])
        assert json.loads((tmp_path / "eval.json").read_text("utf-8"))["accuracy"] > 0.3


@pytest.fixture(scope="module")
def classify_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def classify_bert(classify_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder, tokenizer = tmp_path_factory.mktemp("encoder"), AutoTokenizer.from_pretrained(classify_llama)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sixteen_bits(folder: Path, **changes: Any) -> Case:
    section = ModelSection(name_or_path=str(folder), dtype="bfloat16")
    return make_case(folder, make_rows(37), training=training(**changes), adapter=FullSettings(), model=section)


@pytest.mark.drawn
def test_masters_in_float32_keep_what_16_bits_would_round_away(tied_llama: Path) -> None:
    """Twenty updates far below a bfloat16's last place add up as those of a float32 loop over the same forwards."""
    changes = {"learning_rate": 1e-6, "weight_decay": 0.0, "scheduler": "constant", "max_grad_norm": None}
    case = sixteen_bits(tied_llama, **changes)
    net: Any = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.bfloat16)
    own = dict(net.named_parameters())
    masters = {name: nn.Parameter(value.detach().float()) for name, value in own.items()}
    start = {name: value.detach().clone() for name, value in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-6, weight_decay=0.0)
    schedule = get_scheduler("constant_with_warmup", optimizer, case.parts.plan.warmup_steps, STEPS)
    expected = []
    for step in case.steps.after(0):
        loss = big_batch_loss(net, step, case)
        loss.backward()
        for name, master in masters.items():
            master.grad, own[name].grad = own[name].grad.float(), None
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, master in masters.items():
                own[name].copy_(master)
        expected.append(float(loss.detach()))
    case.run()
    assert case.losses == pytest.approx(expected, rel=1e-2)
    ours = trained(case)
    assert all(value.dtype == torch.float32 for value in ours.values())
    for name, value in case.model.base.net.named_parameters():
        assert torch.equal(value.detach(), ours[name].bfloat16()), name
    way = [torch.cat([(side[name] - start[name]).flatten() for name in start]) for side in (ours, masters)]
    assert way[1].norm() > 0
    assert (way[0] - way[1]).norm() < 0.15 * way[1].norm()
    rounded = torch.cat([(ours[name].bfloat16().float() - start[name]).flatten() for name in start])
    assert (rounded - way[1]).norm() > 0.5 * way[1].norm(), "an update is smaller than what 16 bits can hold"


@pytest.mark.drawn
def test_gradients_of_16_bits_are_summed_in_float32(tied_llama: Path) -> None:
    """Over chunks of logits and tiles of an MLP, one token each: a sum in bfloat16 would stall."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 8, generator=generator).abs().bfloat16()
    net = nn.ModuleDict({"head": nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)})
    weight, targets = net["head"].weight, torch.zeros(1000, dtype=torch.int64)
    whole, chunked = (
        torch.autograd.grad(summed_loss(hidden, targets, TextHead(net, "head"), size, [weight]), weight)[0]
        for size in (1000, 1)
    )
    assert (whole - chunked).float().norm() < 0.01 * whole.float().norm()

    gradients = []
    for tokens in (10_000, 1):
        case = sixteen_bits(tied_llama, micro_batch_size=12)
        base = case.model.base
        tile_layers(base.family.layers(base.net), tokens, torch.empty(0, base.facts.hidden_size, dtype=base.dtype))
        step = next(case.steps.after(0))
        case.step(step, torch.ones(1, dtype=torch.float64))
        gradients.append({name: value.grad.clone() for name, value in case.adapter.trained().items() if "mlp" in name})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() < 0.01 * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype: Any, tied_llama: Path) -> None:
    def make() -> Case:
        section = ModelSection(name_or_path=str(tied_llama), dtype=dtype)
        return make_case(
            tied_llama, make_rows(37), training=training(max_steps=6), adapter=FullSettings(), model=section
        )

    whole, stopped, resumed = make(), make(), make()
    whole.run()
    resumed.run_after_a_stop(stopped, 3)
    assert stopped.losses + resumed.losses == whole.losses
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(resumed).items())
    left, right = (case.model.base.net.state_dict() for case in (whole, resumed))
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.drawn
def test_the_micro_batch_is_a_memory_knob(tied_llama: Path) -> None:
    cases = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        changes = {"micro_batch_size": size, "gradient_accumulation_steps": steps}
        cases.append(make_case(tied_llama, make_rows(37), training=training(**changes), adapter=FullSettings()))
        cases[-1].run()
    for other in cases[1:]:
        assert other.losses == pytest.approx(cases[0].losses, rel=1e-5)
        for name, value in trained(other).items():
            torch.testing.assert_close(value, trained(cases[0])[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "mixtral"])
def test_the_written_model_is_the_trained_one(name: str, tmp_path: Path) -> None:
    """Tied weights once, transposed and fused ones as the base's files have them, in the files' dtype."""
    base = BASES[name].make().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    section = ModelSection(name_or_path=str(tmp_path / "base"), dtype="float32")
    loaded = load_model(section, device=CPU)
    attached = attach_adapter(loaded.net, FullSettings(), seed=0, head_name=BASES[name].head_name)
    with torch.no_grad():
        for value in attached.trained().values():
            value.copy_(value + torch.randn_like(value) * 0.1)
    rewriter = Rewriter(section, "full", loaded=loaded)
    (tmp_path / "new").mkdir()
    rewriter.write(tmp_path / "new", rewriter.as_changes(attached.trained()))
    again, info = type(base).from_pretrained(tmp_path / "new", output_loading_info=True, dtype="auto")  # type: ignore[attr-defined]
    assert not any(info.values())
    before, after = plain(base), plain(again)
    assert set(after) == set(before) == set(attached.trained())
    for key, value in attached.trained().items():
        assert torch.equal(after[key], value.detach().bfloat16()), key
        assert not torch.equal(after[key], before[key]), key
    old, new = (
        set(Rewriter(ModelSection(name_or_path=str(tmp_path / each)), "full").names) for each in ("base", "new")
    )
    assert new == old


def test_chosen_modules_alone_are_trained(tied_llama: Path) -> None:
    net = load_model(ModelSection(name_or_path=str(tied_llama), dtype="float32"), device=CPU).net
    settings = FullSettings(target_modules=("layers.1", "norm"), modules_to_save=("lm_head",))
    names = set(attach_adapter(net, settings, seed=0, head_name="lm_head").trained())
    assert names == {name for name, value in net.named_parameters() if value.requires_grad}
    assert "model.embed_tokens.weight" in names, "it is the head's"
    assert "model.norm.weight" in names
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.0." in name for name in names)
    with pytest.raises(AdapterError, match=r"'layers\.9' matches no module with weights"):
        attach_adapter(net, FullSettings(target_modules=("layers.9",)), seed=0, head_name="lm_head")


def test_what_a_model_computes_once_is_not_trained() -> None:
    """Pegasus' positions are a frozen table of sines."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40}
    net = PegasusForConditionalGeneration(PegasusConfig(**sizes, **heads, max_position_embeddings=20))
    attached = attach_adapter(net, FullSettings(), seed=0, head_name="lm_head")
    positions = {name for name, _ in net.named_parameters() if "embed_positions" in name}
    assert len(positions) == 2
    assert set(attached.trained()) == {name for name, _ in net.named_parameters()} - positions


@pytest.mark.parametrize(("dtype", "checkpointed"), [("float32", 0), ("float32", 2), ("bfloat16", 0)])
def test_a_simulated_step_needs_what_a_real_one_needs(dtype: Any, checkpointed: int, tmp_path: Path) -> None:
    """Weights, gradients and moments of four bytes each, and two more for weights of 16 bits."""
    folder = write_tiny_llama(tmp_path, layers=3, hidden=128)
    choice = ExecutionSettings(checkpointed_layers=checkpointed)
    objective = make_case(folder, make_rows(2), training=training()).parts.objective
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    meta = make_meta_model(section, device=CPU)
    run = SimulatedRun(meta, FullSettings(), objective, TrainingSection(), choice, CPU)
    batch = collate(make_rows(8, shortest=100, longest=120), [(0,), (1,), (2,)], objective.rows)
    simulated, real = run.training_step(batch), real_step(run, section, batch)
    assert abs(simulated.total - real.total) <= 3 * batch.padded * 8
    count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert simulated.peak["optimizer"] == pytest.approx(12 * count, rel=1e-3)
    assert simulated.peak["weights"] == pytest.approx((4 if dtype == "float32" else 6) * count, rel=0.01)
    assert simulated.peak.get("adapter", 0) == 0


# A whole run.


def full_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    path = write_recipe(folder, model, **sections)
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**values, "adapter": {"method": "full"}}, indent=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tied_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = full_recipe(folder, tied_llama, training={"learning_rate": 1e-3})
    train_verb(load_recipe(recipe, [f"output.dir={folder / 'run'}"]), False, False)
    return folder / "run"


@pytest.mark.drawn
def test_the_run_is_a_target_of_every_verb(
    run: Path, tied_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (run / "adapter").exists()
    plan = json.loads((run / "plan.json").read_text("utf-8"))
    assert plan["trainable_parameters"] == plan["total_parameters"]
    for target, data in ((run, None), (run / "model", str(run.parent / "train.jsonl"))):
        evaluate_verb(str(target), None, data, None, [], str(tmp_path / "eval.json"), [])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "eval.json"), [])
    measured = json.loads((tmp_path / "eval.json").read_text("utf-8"))["loss"]
    assert measured == pytest.approx(records[-1]["eval"]["loss"], rel=1e-6)
    answers = []
    for target in (run, run / "model"):
        capsys.readouterr()
        generate_verb(str(target), None, ["say 1"], None, ["evaluation.max_new_tokens=4"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    with pytest.raises(InputError, match="nothing to merge: the run trained the base itself, and its result is"):
        merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    with pytest.raises(InputError, match="so there is no base to choose; leave --base out"):
        find_target(str(run), str(tied_llama), [])
    last = find_target(f"{run}@last", None, [])
    weights = "model.safetensors"
    assert (Path(last.model.name_or_path) / weights).read_bytes() == (run / "model" / weights).read_bytes()
    page = (run / "report.md").read_text("utf-8")
    assert "merge" not in page
    assert "modules were trained" not in page


def test_the_card_of_the_exported_model_has_the_run_s_data_and_metrics(run: Path, tmp_path: Path) -> None:
    export_verb(str(run), "hub", str(tmp_path / "hub"))
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert "train.jsonl" in card
    assert "| loss | 5." in card


def test_transformers_loads_the_folder(run: Path, tied_llama: Path) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([[5, 9, 11, 4]])
    net = load_target(find_target(str(run), None, []), CPU).model.base.net
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, net(ids).logits)
        before = AutoModelForCausalLM.from_pretrained(tied_llama)(ids).logits
    assert (theirs(ids).logits - before).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tied_llama).chat_template
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


def test_the_recipe_s_template_goes_with_the_model(run: Path, tied_llama: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tied_llama).chat_template + "{# of the recipe #}"
    (tmp_path / "own.jinja").write_text(own, encoding="utf-8")
    changes = [f"data.chat_template={tmp_path / 'own.jinja'}", f"output.dir={tmp_path / 'run'}"]
    train_verb(load_recipe(run.parent / "recipe.yaml", changes), False, False)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == own


def test_a_run_that_died_in_its_export_writes_it_again(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "status.json").unlink()
    half = copy / ".model.part-1"
    shutil.move(copy / "model", half)
    (half / "model.safetensors").write_bytes(b"half")
    (copy / "model").mkdir()
    (copy / "model" / "config.json").write_text("{}", encoding="utf-8")
    train_verb(load_recipe(run.parent / "recipe.yaml", [f"output.dir={copy}"]), True, False)
    assert not half.exists()
    names = {path.name for path in (run / "model").iterdir()}
    assert names == {path.name for path in (copy / "model").iterdir()}
    for name in names:
        assert (copy / "model" / name).read_bytes() == (run / "model" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.quantization=nf4", "full trains the base's own weights, and nf4 weights have no gradient"),
        ("memory.streaming=disk", "full trains the base's own weights, and a streamed base is read-only"),
        ("training.loraplus_ratio=4", "there are no LoRA matrices A and B"),
        ("adapter.init_from=old", "there is no adapter to continue; name the model in model.name_or_path"),
    ],
)
def test_what_cannot_be_had_is_refused_by_key_and_line(
    override: str, said: str, tied_llama: Path, tmp_path: Path
) -> None:
    recipe = full_recipe(tmp_path, tied_llama)
    with pytest.raises(RecipeError, match=f"command line: {override.partition('=')[0]}: .*{said}"):
        validate(str(recipe), [override])
    values, (key, _, value) = json.loads(recipe.read_text("utf-8")), override.partition("=")
    section, _, name = key.partition(".")
    values.setdefault(section, {})[name] = 4 if value == "4" else value
    recipe.write_text(json.dumps(values, indent=1), encoding="utf-8")
    line = 1 + next(n for n, text in enumerate(recipe.read_text("utf-8").splitlines()) if f'"{name}"' in text)
    with pytest.raises(RecipeError, match=f"recipe.yaml:{line}: {key}: .*{said}"):
        validate(str(recipe))


def test_plan_streams_nothing_by_itself_and_says_what_saves_memory(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: 2**20)
    plan, _ = make_plan(load_recipe(full_recipe(tmp_path, tied_llama)), device=CPU)
    assert plan.choice.streaming == "off"
    (refusal,) = plan.refusals
    assert refusal.message.endswith("or train an adapter, such as lora")


def test_a_recipe_without_its_adapter_section_says_what_that_means(tied_llama: Path, tmp_path: Path) -> None:
    loaded = validate(str(full_recipe(tmp_path, tied_llama)), ["~adapter"])
    assert loaded.recipe.adapter.method == "lora"
    said = (
        "adapter: the recipe has no such section, so lora is used with its defaults; adapter=full trains the "
        "base's own weights"
    )
    assert said in loaded.defaults
