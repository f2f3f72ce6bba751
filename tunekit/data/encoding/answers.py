"""Reads and replaces the last answer of an example and its prompt, and lists all answers of a data section."""

from dataclasses import replace

from tunekit.data.encoding.sources import read_examples
from tunekit.data.rendering.turns import last_answer
from tunekit.errors import DataError, RecipeError
from tunekit.formats.example import ChatExample, CompletionExample, Example
from tunekit.recipe.bases.section import LARGEST_COUNT
from tunekit.recipe.data import DataSection

KEY, MOST_ANSWERS = "evaluation.choices", 1000


def answer_of(example: Example) -> str | None:
    """The text of the example's last answer; None for plain text and for a conversation without an answer."""
    if isinstance(example, ChatExample):
        index = last_answer(example)
        return None if index is None else example.messages[index].content
    return example.completion if isinstance(example, CompletionExample) else None


def with_answer(example: Example, text: str) -> Example:
    """The example with `text` as its last answer. Later turns are removed."""
    if isinstance(example, CompletionExample):
        return replace(example, completion=text)
    assert isinstance(example, ChatExample)  # other examples have no answer
    index, plain = last_answer(example), example.without_template
    assert index is not None
    answer = replace(example.messages[index], content=text, weight=1.0)
    other = None if plain is None else replace(plain, completion=text)
    return replace(example, messages=(*example.messages[:index], answer), without_template=other)


def prompt_of(example: Example) -> str:
    """The prompt of the last answer; in a conversation, the user's last turn before this answer."""
    if isinstance(example, ChatExample):
        index = _last_question(example)
        return "" if index is None else example.messages[index].content
    return example.prompt if isinstance(example, CompletionExample) else ""


def with_own_text(example: Example, start: str, end: str, text: str) -> Example:
    """The example with `text` in its prompt, in place of the text between `start` and `end`."""
    if isinstance(example, CompletionExample):
        return replace(example, prompt=f"{start}{text}{end}")
    assert isinstance(example, ChatExample)
    index, plain = _last_question(example), example.without_template
    assert index is not None
    content = example.messages[index].content
    own = content[len(start) : len(content) - len(end)]
    if plain is not None:
        plain = replace(plain, prompt=plain.prompt.replace(own, text) if own else f"{start}{text}{end}")
    turn = replace(example.messages[index], content=f"{start}{text}{end}")
    turns = (*example.messages[:index], turn, *example.messages[index + 1 :])
    return replace(example, messages=turns, without_template=plain)


def _last_question(example: ChatExample) -> int | None:
    """The index of the user's last turn before the last answer; None if there is no such turn."""
    turns = enumerate(example.messages[: last_answer(example)])
    return max((index for index, message in turns if message.role == "user"), default=None)


def answers_of_rows(data: DataSection, kind: str) -> tuple[str, ...]:
    """The sorted, different answers of all training and evaluation examples; blanks around an answer are ignored.

    `kind`: the kind of the examples.
    Raises: RecipeError for a streamed source; DataError for fewer than two answers, or too many.
    """
    evaluation = data.eval if isinstance(data.eval, tuple) else ()
    answers: dict[str, str] = {}
    for source in (*data.train, *evaluation):
        if source.streaming:
            what = f"{source.path} is streamed, and its first rows can lack some of the answers"
            raise RecipeError(what, "list the answers", key=KEY)
        for _, example in read_examples(source, kind, range(LARGEST_COUNT)):
            text = answer_of(example) or ""
            if text.strip():
                answers.setdefault(text.strip(), text)
    if not 2 <= len(answers) <= MOST_ANSWERS:
        few = len(answers) < 2
        limit = "at least two answers are needed" if few else f"at most {MOST_ANSWERS} answers are possible"
        how = "add rows with other answers, or list the answers" if few else "list the answers"
        raise DataError(f"the rows have {len(answers):,} different answers, but {limit}", how, key=KEY)
    return tuple(answers[label] for label in sorted(answers))
