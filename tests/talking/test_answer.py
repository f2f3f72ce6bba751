"""Texts and token places of completions, with a tokenizer that drops the space before the first token of a text."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer

from tests.talking.test_conversation import load
from tunekit.errors import InputError
from tunekit.generate import answer
from tunekit.model.text.draws import Score
from tunekit.talking.answer import AnswerWriter, Reply, Request, TokenScore, decoder_after
from tunekit.talking.choices import ChatForm, TextForm
from tunekit.talking.conversation import Speaker, make_speaker

STORIES, ENCODER = (
    Path(os.environ.get("TUNEKIT_SHARED", "../shared")) / "models" / name for name in ("stories260k", "bart-g2p")
)
WORDS = ["▁a", "▁little", "▁", *(f"<0x{byte:02X}>" for byte in "€é".encode())]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is absent")
    return make_speaker(load(STORIES), needs_template=False)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ([0], [1], " little"),
        ([0, 2], [1], " little"),
        ([3, 4, 5], [1, 0], " little a"),  # the prompt ends with a character of three tokens
        ([0, 3, 4, 5], [6, 7], "é"),
        ([0, 3, 4], [5], "�"),  # the prompt ends within a character, which the answer cannot show
        ([], [1], "little"),
    ],
)
def test_an_answer_is_decoded_as_the_rest_of_its_prompt(prompt: list[int], answer: list[int], text: str) -> None:
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="▁"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # as in Llama 2's tokenizer
    assert decoder_after(backend.decode, prompt)(answer, skip_special_tokens=True) == text


def test_a_completion_continues_the_text_and_its_tokens_have_their_places(speaker: Speaker) -> None:
    prompt = "Once upon a time, there was a"
    (reply,) = speaker.answer([Request(text=prompt, max_new_tokens=4, top=0, echoes=True)], "base")
    assert reply.text == f"{prompt} little girl"
    logprobs = TextForm(True).choice(reply)["logprobs"]
    assert logprobs["tokens"][:3] == ["<s>", " Once", " upon"]
    assert logprobs["text_offset"][:3] == [0, 0, 4]
    places = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[2:]
    assert all(reply.text.startswith(token, place) for token, place in places)
    assert b" " in [score.data for score in speaker.answer([Request(text="a é", top=0, echoes=True)], "base")[0].scores]


def test_an_answer_follows_the_schema_of_its_request(speaker: Speaker) -> None:
    pytest.importorskip("llguidance")
    (reply,) = speaker.answer([Request(text="Once", max_new_tokens=8, schema={"type": "integer"})], "base")
    assert int(reply.text)


def test_without_an_end_token_a_schema_is_refused(speaker: Speaker) -> None:
    pytest.importorskip("llguidance")
    endless = make_speaker(load(STORIES), needs_template=False)
    endless.template.stop_ids = frozenset()
    with pytest.raises(InputError, match="not supported for this model's tokenizer"):
        endless.prepare(Request(text="Once", schema={"type": "integer"}))


@pytest.mark.parametrize("tags", [("[THINK]", "[/THINK]"), ("<think>", "</think>"), ("<|channel>", "<channel|>")])
@pytest.mark.parametrize("special", [True, False])
def test_answers_keep_the_tags_of_reasoning(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: tuple[str, str], special: bool
) -> None:
    """In Mistral's tokenizers they are special tokens, in Qwen's they are not."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    native = AutoTokenizer.from_pretrained(folder)
    native.add_tokens([AddedToken(tag, special=special) for tag in tags])
    native.save_pretrained(folder)
    loaded = load(folder)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(f"{tags[0]}two{tags[1]}2<|im_end|>")
    assert len(ids) == 7
    expected = f"{tags[0]}two{tags[1]}2"
    monkeypatch.setattr("tunekit.objectives.rows.text.generate_texts", lambda *_, **__: [ids])
    assert answer(loaded, ["1 + 1"]) == [expected]
    speaker = make_speaker(loaded)
    writer = AnswerWriter(tokenizer.decode, Request(max_new_tokens=9, top=0))
    for token in ids:
        writer.add(token, speaker.score(token, Score(-1.0, ())))
    writer.finish()
    reply = writer.reply()
    assert reply.text == ChatForm(True).choice(reply)["message"]["content"] == expected
    places = TextForm(True).choice(reply)["logprobs"]["text_offset"]
    assert places == [0, *(len(tags[0]) + at for at in (0, 1, 2, 3)), len(expected) - 1, len(expected)]


def written(text: str, stop: str) -> Reply:
    """An answer whose tokens have two characters each."""
    writer = AnswerWriter(lambda ids, **_: text[: 2 * len(ids)], Request(max_new_tokens=9, stop=[stop], top=0))
    while not writer.ended and 2 * len(writer.ids) < len(text):
        place = 2 * len(writer.ids)
        writer.add(1, TokenScore(text[place : place + 2].encode(), -1.0))
    writer.finish()
    return writer.reply()


def test_a_token_that_is_written_in_two_pieces_moves_the_next_token() -> None:
    """A stop text could begin within it."""
    assert TextForm(True).choice(written(" a b c", "b!"))["logprobs"]["text_offset"] == [0, 2, 4]


@pytest.mark.parametrize("form", [ChatForm, TextForm])
def test_an_answer_without_tokens_has_empty_logprobs(form: type[ChatForm | TextForm]) -> None:
    """Clients that request them read their fields."""
    reply = written("abcd", "ab")
    scores = form(True).choice(reply)["logprobs"]
    assert (reply.text, any(scores.values())) == ("", False)
    assert form(False).choice(reply)["logprobs"] is None


@pytest.fixture(scope="module")
def encoder() -> Speaker:
    if not ENCODER.is_dir():
        pytest.skip(f"{ENCODER} is absent")
    return make_speaker(load(ENCODER), needs_template=False)


def test_an_encoder_scores_no_prompt(encoder: Speaker) -> None:
    """The request is refused before its answer starts: an error in a step would end the answers of all clients."""
    with pytest.raises(InputError, match="'logprobs' of the prompt"):
        encoder.prepare(Request(text="word", top=0, echoes=True))


def test_an_encoder_reads_the_special_tokens_that_generate_writes(encoder: Speaker) -> None:
    ids = encoder.target.tokenizer.encode_source("example")
    expected = answer(encoder.target, ["example"])[0]
    for request in (Request(text="example", max_new_tokens=30), Request(prompt=ids, max_new_tokens=30)):
        assert encoder.prepare(request).prompt == ids
        assert encoder.answer([request], "base")[0].text == expected


def test_a_prompt_of_an_encoder_takes_no_room_from_the_answer(encoder: Speaker) -> None:
    request, replies = Request(text="example " * 7, max_new_tokens=30), list[Reply]()
    with encoder.answering(2, encoder.slot_tokens(8, 10**9)[0]) as answers:
        answers.put(encoder.prepare(request), "base", lambda piece: True, replies.append)
        while answers.is_busy:
            answers.step()
    assert replies == encoder.answer([request], "base")
    assert replies[0].prompt_tokens + replies[0].new_tokens > 64
