"""Restricts answers to a JSON schema or to tool calls. llguidance computes which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from tunekit.basics import JsonObject
from tunekit.errors import InputError
from tunekit.machine.versions import needed
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.talking.tools import ToolFormat

# Small models repeat white space forever where a schema allows any number of it.
OPTIONS = {"whitespace_pattern": r"(\n {0,16}| ?)"}


class Grammars:
    """Makes functions that return which tokens may come next. All of them are for the same tokenizer. Raises:
    InputError if llguidance is not installed."""

    def __init__(self, tokenizer: LoadedTokenizer, vocabulary_size: int, stop_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                *needed("an answer with a required format", "run: pip install 'tunekit[serve]'", error)
            ) from error
        self._matcher = llguidance.LLMatcher
        size = max(vocabulary_size, tokenizer.vocabulary_size)
        try:
            definition = tokenizer.backend.to_str()
            self._tokenizer = llguidance.LLTokenizer(definition, n_vocab=size, eos_token=sorted(stop_ids))
        except ValueError as error:  # such as T5's, or one without an end token
            what = f"answers with a required format are not supported for this model's tokenizer: {error}"
            raise InputError(
                what, "remove 'response_format' or 'tool_choice', and describe the format in the prompt"
            ) from error
        self._size = vocabulary_size

    def allowed(self, schema: JsonObject) -> Callable[[Sequence[int]], Tensor]:
        """Returns a function for an answer that must follow a JSON schema. Call this function after each token, with
        all new tokens so far; it returns which tokens may come next, (V,) bool.

        Raises: InputError for a schema that is invalid, too large, or has keywords that llguidance does not implement.
        """
        make = self._matcher.grammar_from_json_schema
        return self._mask(lambda: make(json.dumps(schema), overrides=OPTIONS), "response_format")

    def allowed_call(self, shape: ToolFormat, tools: Sequence[JsonObject]) -> Callable[[Sequence[int]], Tensor]:
        """Returns a function as `allowed` does, for an answer that must be a call of one of these tools. Raises:
        InputError if the schema of a tool cannot be used."""

        def make() -> str:
            before, after = json.dumps(shape.prefix), json.dumps(shape.suffix)
            schemas = [json.dumps(shape.schema(tool) | {"x-guidance": OPTIONS}) for tool in tools]
            choice = " | ".join(f"call{number}" for number in range(len(tools)))
            rules = [f"call{number}: %json {schema}" for number, schema in enumerate(schemas)]
            start = f"start: {before} SPACE ({choice}) SPACE {after}"
            return str(self._matcher.grammar_from_lark("\n".join([start, *rules, "SPACE: /[ \\n]?/"])))

        return self._mask(make, "tools")

    def _mask(self, make_grammar: Callable[[], str], field: str) -> Callable[[Sequence[int]], Tensor]:
        """Returns the function that computes which tokens a grammar allows. `field`: the request's field with the
        schema, for error messages."""
        try:
            matcher = self._matcher(self._tokenizer, make_grammar())
            problem = matcher.get_error() if matcher.is_error() else None
        except (ValueError, RecursionError) as error:  # no JSON for llguidance: NaN, a lone surrogate, 100 levels
            problem = str(error)
        if problem:
            raise InputError(f"'{field}': {problem.splitlines()[0]}", "change the schema")
        read = 0

        def mask(tokens: Sequence[int]) -> Tensor:
            nonlocal read
            matcher.consume_tokens([int(token) for token in tokens[read:]])
            read = len(tokens)
            bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)  # (V,)
            return bias[: self._size] != 0

        return mask
