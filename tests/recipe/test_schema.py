"""The schema and the reference name every key; the recipe that init writes is valid, with comments and without."""

from __future__ import annotations

import json
import re

from tests.support.recipe_mutator import VALUES
from tunekit.recipe.foreign.table import IN_ADAPTER, TOP_LEVEL, alias_target
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.draft import Draft
from tunekit.recipe.reading.names import facts_of, known_names, needs_generation, settings_class
from tunekit.recipe.reading.schema import make_reference, make_schema
from tunekit.recipe.reading.sections import fields_at


def test_the_schema_has_every_key_and_shorthand() -> None:
    schema = json.loads(json.dumps(make_schema()))
    for key in VALUES:
        section, _, rest = key.partition(".")
        found = schema["properties"][section]
        if rest.startswith("train.0."):
            assert rest.removeprefix("train.0.") in schema["$defs"]["Source"]["properties"]
            continue
        choices = [choice for choice in found.get("anyOf", [found]) if "properties" in choice]
        assert any(rest in choice["properties"] for choice in choices), key
    assert {"type": "string", "minLength": 1} in schema["properties"]["model"]["anyOf"]
    assert {"enum": [*known_names("adapters"), "qlora"]} in schema["properties"]["adapter"]["anyOf"]
    train = schema["properties"]["data"]["properties"]["train"]["anyOf"]
    assert [choice.get("type", "source") for choice in train] == ["string", "source", "array"]
    assert schema["properties"]["data"]["properties"]["max_length"]["minimum"] == 2
    assert schema["properties"]["num_train_epochs"]["deprecated"] is True


def test_the_reference_has_a_meaning_for_every_key() -> None:
    reference = make_reference()
    parts = re.split(r"^(?=\S)", reference, flags=re.MULTILINE)
    for key in VALUES:
        section, leaf = key.replace(".train.0.", ".train.N.").rsplit(".", 1)
        own = "".join(part for part in parts if part.startswith((f"{section}:", f"{section}.start:")))
        line = re.search(rf"^  {leaf} .*$", own, re.MULTILINE)
        assert line is not None, key
        assert len(line.group().split()) > 3, f"{key} has no meaning: {line.group()}"
    for key in ("reward.allow_code", "reward.exact_match", "examples.output"):  # keys of a mapping in a list
        assert re.search(rf"^  {re.escape(key)} .*\w", reference, re.MULTILINE) is not None, key
    assert "  train.path" not in reference  # the keys of a source are listed once, as data.train.N


def test_every_alias_leads_to_a_key_that_exists() -> None:
    draft = Draft("x")
    objectives = {key for name in known_names("objectives") for key in settings_class("objectives", name).model_fields}
    for name in (*TOP_LEVEL, *IN_ADAPTER):
        target = alias_target(name)
        known = objectives if target and target[0] == "objective" else fields_at((target or ())[:-1], draft)
        assert target is None or target[-1] in known, name


def test_every_named_file_states_its_facts() -> None:
    for name in known_names("metrics"):
        facts = facts_of("metrics", name)
        assert hasattr(facts, "score") != hasattr(facts, "NEEDS"), "from answers, or from an objective's sums"
        assert isinstance(facts_of("metrics", name).HIGHER_IS_BETTER, bool)
    assert needs_generation("exact_match")
    assert not needs_generation("perplexity")
    for name in known_names("formats"):
        assert facts_of("formats", name).FIELDS
        assert facts_of("formats", name).DESCRIPTION
    for kind in ("adapters", "objectives"):
        for name in known_names(kind):
            needed = {"distill": {"teacher": ModelSection(name_or_path="a teacher")}}.get(name, {})
            assert settings_class(kind, name)(method=name, **needed).method == name


def test_a_family_is_a_file_of_its_own() -> None:
    from tunekit.model.families import known_families

    assert set(known_names("families")) == {family.name for family in known_families()}
