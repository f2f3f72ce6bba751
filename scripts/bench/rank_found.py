"""Lists the rows of public data that `tunekit data rank` finds most likely wrong, for a person to judge.

    scripts/bench/run rank_found [--model MODEL] [--data NAME,NAME] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2; rows come from TUNEKIT_SHARED/data, with the labels that they have there. The first rows of the
list "likely wrong" are written to rank_found.json. A person writes a verdict and a reason to each row there; then this
command writes rank_found.md.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import rank
from beside.units import parse_options, run_units, shared_data, tunekit, write_parts

SHOWN = 10
rank.SENTIMENT_ROWS, rank.INTENTS, rank.INTENT_ROWS = 300, 12, 60  # for each label; intents; for each intent
DRAWN = {
    "sentiment": "sentiment_2way: 600 rows of the training file, 300 of each label",
    "banking": "Banking77: 720 rows of the training file, 60 of each of 12 intents",
}
HEAD = f"""# Wrong rows in public data

Nothing was planted here. all-MiniLM-L6-v2 was trained on rows with their published labels (LoRA on all linear layers,
4 epochs, a checkpoint for each), and `tunekit data rank` ranked them. Rows and intents were drawn at random, with seed
0. The tables show the list "likely wrong", in its order, up to its row {SHOWN}, without a selection. One reader judged
the rows. Wrong: the label is wrong. Ambiguous: two labels can be defended. Right: the label is right, and the row is
hard or rare. Made by `scripts/bench/run rank_found`.
"""


def unit(name: str, model: str, place: Path) -> dict[str, Any]:
    """Train on the rows, rank them, and return the first rows of the list."""
    rows, held = {"sentiment": rank.sentiment, "banking": rank.banking}[name](random.Random(0), shared_data())
    write_parts(place, train=rows, eval=held)
    recipe = rank.recipe_of(name, model, 0, -(-len(rows) // 16))
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    tunekit(place, "train", str(place / "recipe.yaml"), "--overwrite")
    tunekit(place, "data", "rank", str(place / "run"), "--json", str(place / "rank.json"))
    ranked = json.loads((place / "rank.json").read_text("utf-8"))
    listed = ranked["lists"]["likely wrong"]
    facts = {row["row"]: row for row in ranked["rows"]}
    first = [
        {**rows[int(where.rpartition(":")[2]) - 1], "disagreement": facts[where]["disagreement"]}
        for where in listed[:SHOWN]
    ]
    return {"rows": len(rows), "listed": len(listed), "first": first}


def page(units: dict[str, dict]) -> str:
    """rank_found.md."""
    text = HEAD
    for name in filter(units.__contains__, DRAWN):
        one = units[name]
        verdicts = [row.get("verdict", "not judged") for row in one["first"]]
        counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(sorted(verdicts, reverse=True)))
        text += f"\n## {DRAWN[name]}\n\nThe list has {one['listed']} rows. "
        text += f"Verdicts on the first {len(verdicts)}: {counts}.\n\n"
        text += "| text | label | similar rows with other labels | verdict |\n|---|---|--:|---|\n"
        for row, verdict in zip(one["first"], verdicts, strict=True):
            why = f": {row['reason']}" if row.get("reason") else ""
            text += (
                f"| {row['text'].replace('|', '/')} | {row['label']} | {row['disagreement']:.0%} | {verdict}{why} |\n"
            )
    return text


def main() -> None:
    settings = parse_options(__doc__, "rank_found", data=",".join(DRAWN))
    run_units(settings, settings.data.split(","), lambda name, place: unit(name, settings.model, place), page)


if __name__ == "__main__":
    main()
