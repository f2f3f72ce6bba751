"""Generation: batches, stops, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.architectures.tiny import write_tiny
from tunekit.contracts import Sampling
from tunekit.errors import DataError
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.text.draws import draw
from tunekit.model.text.generation import end_of_turn_ids, find_stop_ids, generate_texts
from tunekit.model.text.slots import has_recurrent_state
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16], [20, 21]]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> tuple[LoadedModel, LoadedTokenizer]:
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32")
    return load_model(section, device=CPU), load_tokenizer(section)


def greedy(model: LoadedModel, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    """The plain loop, one prompt, no cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            best = int(model.net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in stops:
            break
        ids.append(best)
    return ids[len(prompt) :]


def generate(loaded: tuple[LoadedModel, LoadedTokenizer], **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 4, "stop_ids": []} | changes
    return generate_texts(*loaded, PROMPTS, **settings)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_equal_the_plain_loop(loaded: tuple[LoadedModel, LoadedTokenizer], batch_size: int) -> None:
    expected = [greedy(loaded[0], prompt, 6, set()) for prompt in PROMPTS]
    assert generate(loaded, batch_size=batch_size) == expected
    stops = {expected[0][2], expected[2][4]}
    with_stops = generate(loaded, batch_size=batch_size, stop_ids=sorted(stops))
    assert with_stops == [greedy(loaded[0], prompt, 6, stops) for prompt in PROMPTS]
    assert len(with_stops[0]) == 2


@pytest.mark.parametrize("kind", ["xlstm", "rwkv", "recurrent_gemma", "mamba"])
@pytest.mark.filterwarnings("ignore")
def test_rows_that_disturb_each_other_are_answered_alone(kind: str, tmp_path: Path) -> None:
    section = ModelSection(name_or_path=str(write_tiny(kind, tmp_path / "model")), dtype="float32")
    model, tokenizer = load_model(section, device=CPU), load_tokenizer(section)
    for parameter in model.net.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1  # so that the answers differ from prompt to prompt
    prompts = [*PROMPTS, [9, 8, 7], [22]]
    found = generate_texts(model, tokenizer, prompts, max_new_tokens=6, batch_size=4, stop_ids=[])
    assert found == [greedy(model, prompt, 6, set()) for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "carried"),
    [
        *[(kind, False) for kind in ("llama", "mistral", "gpt2", "gemma3n_text", "glm_moe_dsa", "bert")],
        *[(kind, True) for kind in ("mamba", "falcon_h1", "zamba2", "qwen3_next", "jamba", "minimax")],
    ],
)
def test_a_state_is_known_from_the_cache(kind: str, carried: bool) -> None:
    net = torch.nn.Module()
    net.config = AutoConfig.for_model(kind)
    assert has_recurrent_state(net) == carried


def test_learned_positions_are_padded_right_and_end(tmp_path: Path, tiny_llama: Path) -> None:
    from tests.model.test_families import make_net

    make_net("gpt2", n_positions=12, max_position_embeddings=12).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    model, tokenizer = load_model(section, device=CPU), load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    results = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=50, batch_size=4, stop_ids=[])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result == greedy(model, prompt, 12 - len(prompt), set())  # a long neighbour takes no positions
    with pytest.raises(DataError, match="too many for the model's 12 positions"):
        generate_texts(model, tokenizer, [[3] * 12], max_new_tokens=1, batch_size=1)


def test_model_and_random_state_are_left_as_found(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    model = loaded[0]
    net: Any = model.net
    net.train()
    net.model.norm.eval()
    net.generation_config.repetition_penalty = 5.0
    try:
        before, plain = torch.get_rng_state(), generate(loaded)
        assert torch.equal(before, torch.get_rng_state())
        assert net.training
        assert not net.model.norm.training
        assert net.config.use_cache is False
        assert net.generation_config.repetition_penalty == 5.0
        net.generation_config.repetition_penalty = None
        assert plain == generate(loaded)  # the base's penalties are not used
    finally:
        net.eval()


def test_sampling_follows_its_seed(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    first = generate(loaded, sampling=Sampling(2.0, seed=1))
    torch.manual_seed(99)
    assert generate(loaded, sampling=Sampling(2.0, seed=1)) == first
    assert generate(loaded, sampling=Sampling(2.0, seed=2)) != first
    assert generate(loaded, sampling=Sampling(2.0, top_k=1, seed=2)) == generate(loaded)


def test_what_a_prompt_draws_follows_from_its_own_seed(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    """Whatever shares its batch, and in whatever order; equal prompts, computed once, draw each for itself."""
    drawn = {"sampling": Sampling(temperature=0.8, top_p=0.9, top_k=50), "max_new_tokens": 8}
    seeds = [11, 12, 13, 14]
    whole = generate(loaded, seeds=seeds, **drawn)
    assert [generate(loaded, seeds=seeds, batch_size=size, **drawn) for size in (1, 3)] == [whole] * 2
    twice = [PROMPTS[place] for place in (2, 0, 2, 2, 0)]
    found = generate_texts(*loaded, twice, batch_size=5, stop_ids=[], seeds=[13, 11, 7, 13, 8], **drawn)
    assert [found[0], found[1], found[3]] == [whole[2], whole[0], whole[2]]
    assert found[2] != found[0]
    assert found[4] != found[1]


def test_a_stop_is_kept_where_it_is_asked_for(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    plain = generate(loaded)
    stops = sorted({plain[0][2], plain[2][4]})
    kept, cut = generate(loaded, stop_ids=stops, keep_stop=True), generate(loaded, stop_ids=stops)
    for ours, theirs in zip(kept, cut, strict=True):
        assert ours == theirs or (ours[:-1] == theirs and ours[-1] in stops)
    assert kept[0] == plain[0][:3]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 2.0]])
    numbers = (torch.arange(10_000) + 0.5) / 10_000
    found = draw(logits.expand(len(numbers), -1), numbers.double())[:, 0]
    shares = torch.bincount(found, minlength=4) / len(numbers)
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=2e-4)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), edges)[:, 0].tolist() == [0, 3]


def test_stops(loaded: tuple[LoadedModel, LoadedTokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    assert end_of_turn_ids(tokenizer) == [2]
    monkeypatch.setattr(tokenizer, "eos_id", 0)  # as where a base's end token is not the turn's end
    assert find_stop_ids(model, tokenizer) == [0, 2]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert end_of_turn_ids(tokenizer) == []
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    assert end_of_turn_ids(tokenizer) == []


def test_empty_prompt_is_refused(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    with pytest.raises(DataError, match="prompt 2 is empty"):
        generate_texts(*loaded, [[5], []], max_new_tokens=1, batch_size=2)


def test_an_answer_ends_where_the_runs_own_template_ends_it(loaded: tuple[LoadedModel, LoadedTokenizer]) -> None:
    model, tokenizer = loaded
    template = "{% for m in messages %}{{ m['content'] }}<|im_start|>{% endfor %}"
    start = tokenizer.native.convert_tokens_to_ids("<|im_start|>")
    assert start not in find_stop_ids(model, tokenizer)
    assert start in find_stop_ids(model, tokenizer, template)
    expected = greedy(model, PROMPTS[0], 6, set())
    ended = "{% for m in messages %}{{ m['content'] }}" + tokenizer.decode([start]) + "{% endfor %}"
    assert generate(loaded, stop_ids=None, template=ended)[0] == greedy(model, PROMPTS[0], 6, {start, 2, 0})
    assert expected
