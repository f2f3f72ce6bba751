"""The decoder: rows join and leave at any token, and each is as it is alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from tests.architectures.tiny import write_tiny
from tests.model.test_generation import greedy
from tunekit.contracts import Sampling, Tensors
from tunekit.model.call import Call, calling, current_call
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.text.continuation import Adapt, Continuation, NewToken
from tunekit.model.text.decoder import Decoder, decoding
from tunekit.model.text.draws import limited
from tunekit.model.text.generation import generate_texts
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")
LONG = list(range(30, 120))
PROMPTS = [[5, 6, 7], [9], LONG, [20, 21], [5, 6, 7], [10, 11, 12, 13, 14, 15, 16], [22], LONG[3:70]]
LENGTHS = [3, 14, 5, 1, 9, 2, 12, 6]


def load(kind: str, folder: Path) -> LoadedModel:
    """A tiny base whose answers differ from prompt to prompt."""
    return strong(load_model(ModelSection(name_or_path=str(write_tiny(kind, folder)), dtype="float32"), device=CPU))


def strong(model: LoadedModel) -> LoadedModel:
    """The model with larger weights, so that its answers differ."""
    for parameter in model.net.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load("llama", tmp_path_factory.mktemp("model") / "llama")


def run(model: LoadedModel, wanted: list[Continuation], at: dict[int, int] | None = None, **sizes: Any) -> list[Any]:
    """The tokens of each continuation, which is added at the step `at`."""
    results: list[list[NewToken]] = [[] for _ in wanted]
    sizes = {"slots": 3, "tokens": max(each.columns for each in wanted), "piece_tokens": 16} | sizes
    with decoding(model.net):
        decoder, places, step = Decoder(model, 0, **sizes), dict[int, int](), 0
        while decoder.is_busy or len(places) < len(wanted):
            for number, each in enumerate(wanted):
                if (at or {}).get(number, 0) == step:
                    places[decoder.add(each)] = number
            for token in decoder.step():
                results[places[token.handle]].append(token)
            step += 1
    return results


@contextmanager
def counting(model: LoadedModel, sizes: list[torch.Size]) -> Iterator[None]:
    """A block in which the shape of every forward's ids is added to `sizes`."""

    def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
        sizes.append(named["input_ids"].shape)

    hook = model.net.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def ids(tokens: list[NewToken]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind", ["llama", "gemma3_text", "gpt2", "bloom", "gpt_oss", "deepseek_v3", "mamba", "rwkv", "openai-gpt"]
)
@pytest.mark.filterwarnings("ignore")
def test_rows_that_join_and_leave_answer_as_if_they_were_alone(kind: str, tmp_path: Path) -> None:
    """Full attention, windows, positions of several kinds, sinks, latent keys and states; in memory so small that its
    columns are reused."""
    model = load(kind, tmp_path / kind)
    wanted = [Continuation(prompt, count) for prompt, count in zip(PROMPTS, LENGTHS, strict=True)]
    results = run(model, wanted, {1: 2, 4: 3, 6: 9, 7: 9})
    for each, tokens in zip(wanted, results, strict=True):
        assert ids(tokens) == greedy(model, list(each.prompt), each.max_new_tokens, set())
        assert [token.reason for token in tokens] == [None] * (len(tokens) - 1) + ["length"]


FACTORS = {"rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)]}
LENGTH_DEPENDENT: dict[str, dict[str, Any]] = {
    "phi3": {"original_max_position_embeddings": 12, "rope_parameters": {"rope_type": "longrope", **FACTORS}},
    "llama": {"max_position_embeddings": 12, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **FACTORS}},
}


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_rows_whose_positions_depend_on_their_length_answer_as_if_they_were_alone(kind: str, tmp_path: Path) -> None:
    """Rows of up to 12 tokens share forwards, and longer rows do not; some pass this length only in their answer."""
    config = write_tiny(kind, tmp_path / kind) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | LENGTH_DEPENDENT[kind]), "utf-8")
    model = strong(load_model(ModelSection(name_or_path=str(tmp_path / kind), dtype="float32"), device=CPU))
    wanted = [Continuation(prompt, count) for prompt, count in zip(PROMPTS, LENGTHS, strict=True)]
    sizes: list[torch.Size] = []
    with counting(model, sizes):
        results = run(model, wanted, {1: 2, 4: 3, 6: 9, 7: 9})
    assert max(rows for rows, _ in sizes) > 1
    net: Any = model.net
    for each, tokens in zip(wanted, results, strict=True):
        prompt = torch.tensor([each.prompt])
        with decoding(net):
            net(input_ids=prompt[:, :1])  # forgets the length of the row before
            expected = net.generate(prompt, max_new_tokens=each.max_new_tokens, pad_token_id=0)[0, prompt.shape[1] :]
        assert ids(tokens) == expected.tolist()
        if kind == "phi3":
            assert ids(tokens) == greedy(model, list(each.prompt), each.max_new_tokens, set())


def test_a_step_computes_a_piece_of_a_prompt_and_a_token_of_each_running_row(llama: LoadedModel) -> None:
    with decoding(llama.net):
        decoder = Decoder(llama, 0, slots=3, tokens=200, piece_tokens=16)
        first = decoder.add(Continuation([5, 6, 7], 40))
        assert [token.handle for token in decoder.step()] == [first]
        second = decoder.add(Continuation(LONG, 4))
        rows = [[token.handle for token in decoder.step()] for _ in range(7)]
        assert rows == [[first]] * 5 + [[first, second]] * 2  # 90 tokens are six pieces of 16
        waiting = [decoder.add(Continuation([9], 4)) for _ in range(2)]
        assert [token.handle for token in decoder.step()] == [first, second, waiting[0]]
        assert {token.handle for token in decoder.step()} == {first, second, *waiting}  # in the slot of the second
        decoder.cancel(first)
        assert {token.handle for token in decoder.step()} == set(waiting)
        decoder.cancel(waiting[0])
        decoder.cancel(waiting[1])
        assert not decoder.is_busy


def test_a_cancelled_prompt_delays_no_other(llama: LoadedModel) -> None:
    with decoding(llama.net):
        decoder = Decoder(llama, 0, slots=2, tokens=200, piece_tokens=16)
        cancelled = decoder.add(Continuation(LONG, 4))
        assert not decoder.step()
        decoder.cancel(cancelled)
        other = decoder.add(Continuation([5, 6, 7], 4))
        assert [token.handle for token in decoder.step()] == [other]


def test_memory_is_allocated_once_and_its_size_is_known(llama: LoadedModel) -> None:
    with decoding(llama.net):
        decoder = Decoder(llama, 0, slots=2, tokens=30)
        decoder.add(Continuation([5, 6, 7], 20))
        decoder.step()
        assert decoder._slot_batch is not None
        layers = decoder._slot_batch.slots.layers
        places = [memory.data_ptr() for layer in layers for memory in layer.memory]
        assert decoder.nbytes == len(layers) * 2 * layers[0].memory[0][0].numel() * 2 * 4
        for number in range(40):
            decoder.add(Continuation([9] * (1 + number % 7), 3 + number % 20))
        while decoder.is_busy:
            decoder.step()
        assert places == [memory.data_ptr() for layer in layers for memory in layer.memory]
        with pytest.raises(ValueError, match="is empty, or longer than 30"):
            decoder.add(Continuation([5, 6, 7], 29))


def test_each_row_has_its_own_settings(llama: LoadedModel) -> None:
    """Stops, sampling with its own seed, allowed tokens and log-probabilities, beside others and alone."""

    def only_even(tokens: Any) -> Any:
        return torch.arange(267) % 2 == 0 if len(tokens) % 2 else None

    plain = greedy(llama, PROMPTS[0], 9, set())
    wanted = [
        Continuation(PROMPTS[0], 9, stop_ids={plain[3]}),
        Continuation(PROMPTS[0], 9, Sampling(1.5, 0.9, 40, 3)),
        Continuation(PROMPTS[0], 9, Sampling(0.8, seed=3), allowed=only_even, top=2),
        Continuation(PROMPTS[2], 9, Sampling(1.5, seed=4)),
        Continuation(PROMPTS[0], 9, Sampling(1.5, 0.9, 40, 4), top=0),
    ]
    together, alone = run(llama, wanted, slots=5), [run(llama, [each])[0] for each in wanted]
    assert [ids(each) for each in together] == [ids(each) for each in alone]
    assert ids(together[0]) == plain[: plain.index(plain[3]) + 1]
    assert together[0][-1].reason == "stop"
    assert all(token % 2 == 0 for token in ids(together[2])[1::2])
    assert ids(together[1]) != ids(together[4])
    sequence = torch.tensor([[*PROMPTS[0], *ids(together[2])]])
    with torch.no_grad():
        logprobs = llama.net(input_ids=sequence, use_cache=False).logits[0, 2:-1].log_softmax(-1)  # (9, V)
    for token, row in zip(together[2], logprobs, strict=True):
        assert token.score is not None
        assert token.score.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [place for place, _ in token.score.top] == row.topk(2)[1].tolist()
    assert together[4][0].score.top == ()
    assert together[0][0].score is None


def prompt_tuning(model: LoadedModel, count: int) -> Adapt:
    """Puts random vectors before each row, as prompt tuning does."""
    net: Any = model.net
    embed = net.get_input_embeddings()
    vectors = torch.randn(1, count, embed.weight.shape[1], generator=torch.Generator().manual_seed(1))

    def adapt(inputs: Tensors) -> Tensors:
        rows = embed(inputs["input_ids"])
        masks = {name: pad(mask, (count, 0), value=1) for name, mask in inputs.items() if name == "attention_mask"}
        return {"inputs_embeds": torch.cat([vectors.expand(len(rows), -1, -1), rows], dim=1), **masks}

    return adapt


@pytest.mark.parametrize("virtual", [0, 20])
@pytest.mark.parametrize("kind", ["llama", "mamba"])
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_can_be_scored(kind: str, virtual: int, tmp_path: Path) -> None:
    """Also after virtual tokens, which need more than one piece."""
    model = load(kind, tmp_path / kind)
    adapt = prompt_tuning(model, virtual) if virtual else None
    how = {"top": 1, "scores_prompt": True, "adapt": adapt, "virtual_tokens": virtual}
    wanted = [Continuation(LONG, 2, **how), Continuation([9], 2, **how)]  # type: ignore[arg-type]
    (first, second), (only, _) = run(model, wanted)
    inputs = {"input_ids": torch.tensor([LONG])}
    with torch.no_grad():
        logits = model.net(**(inputs if adapt is None else adapt(inputs)), use_cache=False).logits
    logprobs = logits[0, virtual:].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logprobs, LONG[1:], strict=False)]
    assert [score.logprob for score in first.prompt_scores] == pytest.approx(expected, abs=1e-4)
    assert [score.top[0][0] for score in first.prompt_scores] == logprobs[:-1].argmax(-1).tolist()
    assert not second.prompt_scores
    assert not only.prompt_scores


def test_states_of_a_conversation_are_reused(llama: LoadedModel) -> None:
    wanted = Continuation(LONG, 6, keeps_states=True)
    (tokens,) = run(llama, [wanted])
    states = tokens[-1].states
    assert states is not None
    assert states.ids == (*LONG, *ids(tokens)[:-1])
    for prompt, shared in (([*states.ids, 7, 8], 95), ([*LONG[:50], 3, 3], 50), (LONG, 89), ([1, 2], 0)):
        sizes: list[torch.Size] = []
        with counting(llama, sizes):
            (again,) = run(llama, [replace(wanted, prompt=prompt, states=states)], piece_tokens=500, tokens=130)
        assert ids(again) == greedy(llama, prompt, 6, set())
        assert sizes[0] == (1, len(prompt) - shared)


def test_a_prompt_that_several_rows_share_is_computed_once(llama: LoadedModel) -> None:
    """Also where the rows need more than the free slots."""
    sizes: list[torch.Size] = []
    wanted = [Continuation(LONG, 3 + number, Sampling(1.0, seed=number)) for number in range(8)]
    with counting(llama, sizes):
        results = run(llama, wanted, piece_tokens=500)
    assert sizes.count(torch.Size([1, len(LONG)])) == 1
    assert [ids(each) for each in results] == [ids(run(llama, [each])[0]) for each in wanted]


def test_rows_of_several_adapters_share_a_forward(llama: LoadedModel) -> None:
    """Except for an adapter that must be alone: its rows are computed in one forward of their own."""
    shift: dict[str | None, float] = {None: 0.0, "one": 4.0, "two": -3.0, "alone": 2.0}
    forwards: list[list[str | None]] = []

    @contextmanager
    def using(names: Sequence[str | None]) -> Iterator[None]:
        with calling(Call(adapter_of_row=tuple(names))):
            yield

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        names = current_call().adapter_of_row
        assert names is not None
        forwards.append([*names])
        return output + torch.tensor([shift[name] for name in names])[:, None, None]

    names = ["one", "two", "alone", None, "alone", "one", "two", None]
    wanted = [
        Continuation(prompt, count, adapter=name, alone=name == "alone")
        for prompt, count, name in zip(PROMPTS, LENGTHS, names, strict=True)
    ]
    hook = llama.net.get_submodule("model.layers.0.mlp").register_forward_hook(add)
    try:
        alone = [ids(run(llama, [each], using=using)[0]) for each in wanted]
        forwards.clear()
        together = run(llama, wanted, {4: 3, 6: 9, 7: 9}, slots=6, using=using)
    finally:
        hook.remove()
    assert [ids(each) for each in together] == alone
    assert len({tuple(ids(run(llama, [replace(wanted[0], adapter=None)])[0])), tuple(alone[0])}) == 2
    assert {name for names in forwards for name in names} == {*shift}
    assert all({*names} == {"alone"} for names in forwards if "alone" in names)
    assert any({*names} >= {"one", "two"} for names in forwards)


PENALIZED = Sampling(
    repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logit_bias=((7, 2.0), (9, -100.0))
)


def naive_answer(model: LoadedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy answer with these penalties, number by number: Keskar et al. 2019, eq. 1, and OpenAI's formula."""
    answer: list[int] = []
    for _ in range(count):
        logits = model.net(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1].tolist()
        for token in {*prompt, *answer}:
            logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
        for token in set(answer):
            logits[token] -= 0.3 * answer.count(token) + 0.4
        logits[7] += 2.0
        logits[9] -= 100.0
        answer.append(max(range(len(logits)), key=logits.__getitem__))
    return answer


@torch.no_grad()
def test_penalties_are_those_of_their_formulas(llama: LoadedModel) -> None:
    """Beside rows without them, whose answers do not change."""
    plain = [Continuation(prompt, 12) for prompt in PROMPTS[:2]]
    alone = [[token.id for token in tokens] for tokens in run(llama, plain)]
    both = [*plain, *(Continuation(prompt, 12, PENALIZED) for prompt in PROMPTS[:2])]
    answers = [[token.id for token in tokens] for tokens in run(llama, both, slots=4)]
    assert answers[:2] == alone
    assert answers[2:] == [naive_answer(llama, prompt, 12) for prompt in PROMPTS[:2]]
    assert answers[2:] != alone


@pytest.mark.parametrize("min_p", [0.05, 0.4, 1.0])
def test_min_p_is_that_of_transformers(min_p: float) -> None:
    from transformers import MinPLogitsWarper

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    expected = MinPLogitsWarper(min_p)(torch.zeros(3, 1, dtype=torch.int64), logits / 0.7)
    assert torch.equal(limited(logits, 0.7, 1.0, 0, min_p), expected)


def test_a_row_that_leaves_makes_room_for_the_next(llama: LoadedModel) -> None:
    """Long and short answers share slots: no step waits for the longest row of a batch."""
    sizes: list[torch.Size] = []
    lengths = [20 if number % 4 == 0 else 2 for number in range(16)]
    with counting(llama, sizes):
        run(llama, [Continuation([9 + number], length) for number, length in enumerate(lengths)], slots=4)
    assert sum(rows for rows, _ in sizes) == sum(lengths), "each forward computes one token of each row, and no other"
    assert len(sizes) < 50, "of 80 tokens of the long rows"


def test_generate_starts_a_prompt_when_another_one_ends(llama: LoadedModel, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    found = generate_texts(llama, tokenizer, PROMPTS, max_new_tokens=7, batch_size=3, stop_ids=[])
    assert found == [greedy(llama, prompt, 7, set()) for prompt in PROMPTS]
    assert generate_texts(llama, tokenizer, [], max_new_tokens=7, batch_size=3) == []


def test_an_adapter_can_be_forgotten(llama: LoadedModel) -> None:
    """The keys and values of the last prompt, which an equal prompt would use, belong to its old weights."""
    weight: Any = llama.net.get_submodule("model.layers.0.mlp.up_proj").weight
    answers = list[list[int]]()
    before = weight.detach().clone()
    try:
        with decoding(llama.net):
            decoder = Decoder(llama, 0, slots=1, tokens=120)
            for factor in (1.0, 3.0):
                weight.mul_(factor)
                decoder.forget(None)
                decoder.add(Continuation(LONG, 8))
                answers.append([])
                while decoder.is_busy:
                    answers[-1] += ids(decoder.step())
                assert answers[-1] == greedy(llama, LONG, 8, set())
    finally:
        weight.data.copy_(before)
    assert answers[0] != answers[1]
