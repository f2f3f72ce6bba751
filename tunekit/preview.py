"""`tunekit preview`: shows training rows token by token, and why each token is or is not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tunekit.artifacts.report.pictures import inlined
from tunekit.artifacts.report.preview_page import preview_page
from tunekit.console import Console, visible
from tunekit.contracts import Objective, Row, Span, Tokenizer
from tunekit.data.batching.order import epoch_rows
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.rows import RowSet, load_rows
from tunekit.evaluation.row_losses import segments
from tunekit.files.durable import write_text
from tunekit.model.families import make_family
from tunekit.model.load import make_meta_model
from tunekit.model.parts import part_notes
from tunekit.model.storage.inspection import family_of_base
from tunekit.objectives.base import make_objective
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import shows_of

TRAINED = "trained on"
FIRST = "not trained on: the first token, because no earlier token can predict it"
PROMPT = "not trained on: prompt, or reasoning that data.reasoning masks"
BETWEEN = "not trained on: another turn, masked reasoning, or the template's own text"
AFTER = "not trained on: after the last answer"

KINDS = {TRAINED: "t", FIRST: "p", PROMPT: "p"}  # CSS classes of tokens on the page; all other tokens are "o"


@dataclass(frozen=True)
class Token:
    """One token in the preview. `why`: the reason why it is or is not trained on."""

    text: str
    token_id: int
    trained: bool
    why: str


def preview_verb(written: LoadedRecipe, rows: int, html: str | None) -> None:
    """Show `rows` training rows in training order. Raises: TunekitError; the command line returns its exit code."""
    refuse_to_replace("--html", html, written)
    recipe = written.recipe
    processor = make_family(recipe.objective.family).processor(recipe.model)
    objective, tokenizer = make_objective(recipe.objective, processor), processor.tokenizer
    loaded = load_rows(recipe.data, objective, seed=recipe.training.seed)
    order = epoch_rows(loaded.draws, seed=recipe.training.seed, epoch=0, shuffle=recipe.data.shuffle)
    shown = [loaded.train[int(index)] for index in order[:rows]]
    console, shows = Console(), shows_of(objective.name)
    section = loaded.objective.section(recipe.model, recipe.training.seed)
    console.info(*written.rewrites, *_part_notes(section), *loaded.notes)
    for row in shown:
        parts = loaded.objective.rows.spans(row)
        console.info(f"\n{heading(row, parts, shows.sizes)}")
        for part in parts:
            if part.title:
                console.info(part.title)
            console.print_segments(segments(part, tokenizer))
    if any(part.trained.any() for row in shown for part in loaded.objective.rows.spans(row)):
        others = "prompts, other turns, masked reasoning, and the text of the chat template"
        console.info(f"\nMarked text is trained on. The rest is not: {others}.")
    facts = statistics(loaded, shows.units, shows.sizes)
    console.table(["rows", "value"], facts)
    if html is not None:
        write_text(Path(html), page(shown, loaded.objective, tokenizer, facts, loaded.notes))
        console.info(f"written to {html}")


def _part_notes(section: ModelSection) -> list[str]:
    """A note on the parts of a composite model that the rows do not train."""
    if make_family(family_of_base(section)).trained_as is None:
        return []
    return part_notes(make_meta_model(section, device=torch.device("cpu")).net)


def heading(row: Row, parts: Sequence[Span], sizes: str) -> str:
    """A row's title: its file and line, its size, and the number of its trained tokens."""
    trained = sum(int(part.trained.sum()) for part in parts)
    of = "of them" if sizes == "tokens" else "tokens"
    return f"{row.origin}: {row.size:,} {sizes}" + (f", {trained} {of} trained on" if trained else "")


def explain_tokens(part: Span, tokenizer: Tokenizer | None) -> list[Token]:
    """All tokens of a row, each with the reason why it is or is not trained on."""
    trained = part.trained  # (T,)
    places = np.flatnonzero(trained)
    first, last = (int(places[0]), int(places[-1])) if len(places) else (len(trained), -1)
    tokens: list[Token] = []
    if tokenizer is None:
        return tokens
    for index, token_id in enumerate(part.ids.tolist()):
        why = TRAINED
        if not trained[index]:
            why = (
                FIRST
                if index == 0 and not part.continues
                else PROMPT
                if index < first
                else AFTER
                if index > last
                else BETWEEN
            )
        tokens.append(Token(tokenizer.token_text(token_id), token_id, bool(trained[index]), why))
    return tokens


def statistics(rows: RowSet, units: str, sizes: str) -> list[tuple[str, object]]:
    """Counts and lengths of the training rows, as names and values. `units`: the unit that the loss sums over; `sizes`:
    the unit of lengths."""
    counts = rows.counts
    lengths = np.asarray(rows.train.lengths)  # (rows,)
    share = counts.supervised_tokens / max(counts.tokens, 1)
    facts: list[tuple[str, object]] = [
        ("read", counts.read),
        ("trained on", counts.trained),
        *((f"dropped: {reason}", number) for reason, number in counts.dropped_reasons.items()),
        ("truncated", counts.truncated),
        (f"{sizes} of an epoch", counts.tokens),
        (f"{units} of an epoch", counts.supervised_tokens),
    ]
    if "token" in units and sizes == "tokens":
        facts.append(("share trained on", f"{100 * share:.1f} %"))
    if sizes != "pixels":  # all images have the size in the recipe
        facts += [
            ("shortest", int(lengths.min(initial=counts.longest_tokens))),
            ("median length", int(np.median(lengths))),
            ("95 % are no longer than", int(np.quantile(lengths, 0.95, method="higher"))),
            ("longest", counts.longest_tokens),
        ]
    if counts.estimated:
        facts.append(("counts", "estimated from the first rows (streamed)"))
    if (held := rows.eval_counts) is not None:
        facts += [("evaluation rows", held.trained), (f"evaluation {sizes}", held.tokens)]
        facts += [(f"evaluation, dropped: {reason}", number) for reason, number in held.dropped_reasons.items()]
    return facts


def page(
    rows: Sequence[Row],
    objective: Objective,
    tokenizer: Tokenizer | None,
    facts: Sequence[tuple[str, object]],
    notes: Sequence[str],
) -> str:
    """An HTML page that shows these rows; it is one file that loads nothing else."""
    shown, sizes = list[dict[str, object]](), shows_of(objective.name).sizes
    for row in rows:
        parts = objective.rows.spans(row)
        shown.append({"heading": visible(heading(row, parts, sizes)), "parts": [_shown(p, tokenizer) for p in parts]})
    return preview_page("Training rows", shown, facts, [visible(note) for note in notes])


def _shown(part: Span, tokenizer: Tokenizer | None) -> dict[str, object]:
    special = frozenset[int]() if tokenizer is None else tokenizer.special_ids
    tokens = [
        {
            "text": visible(token.text).replace("\n", "\N{RETURN SYMBOL}\n"),
            "title": f"{token.token_id}: {token.why}",
            "kinds": KINDS.get(token.why, "o") + (" s" if token.token_id in special else ""),
        }
        for token in explain_tokens(part, tokenizer)
    ]
    source = None if part.image is None else inlined(part.image)
    return {"title": visible(part.title), "tokens": tokens, "image": source}
