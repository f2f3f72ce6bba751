"""Types that are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.tiny import model_types, write_tiny
from tunekit.errors import ModelError
from tunekit.model.storage.inspection import find_family
from tunekit.model.storage.source import read_json
from tunekit.model.unsupported import REASON_OF, REASONS
from tunekit.recipe.model import ModelSection


def test_every_refused_type_exists_and_is_named_once() -> None:
    names = [name for names in REASONS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert set(names) <= set(model_types())


@pytest.mark.parametrize("model_type", ["bert", "blip-2", "musicgen"])
def test_they_are_refused_before_weights_are_read(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(model_type, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=REASON_OF[model_type]):
        find_family(read_json(folder / "config.json"), ModelSection(name_or_path=str(folder)))
