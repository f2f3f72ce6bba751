"""Texts and token places of completions, with a tokenizer that drops the space before the first token of a text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from tests.talking.test_conversation import load
from tunekit.errors import InputError
from tunekit.talking.answer import Request, decoder_after
from tunekit.talking.choices import TextForm
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
    logprobs = TextForm().choice(reply)["logprobs"]
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


def test_an_encoder_scores_no_prompt() -> None:
    """The request is refused before its answer starts: an error in a step would end the answers of all clients."""
    if not ENCODER.is_dir():
        pytest.skip(f"{ENCODER} is absent")
    speaker = make_speaker(load(ENCODER), needs_template=False)
    with pytest.raises(InputError, match="'logprobs' of the prompt"):
        speaker.prepare(Request(text="word", top=0, echoes=True))
