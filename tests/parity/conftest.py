"""peft without its model cards: no comparison reads one, and each takes a tenth of a comparison's time."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest


@pytest.fixture(scope="module", autouse=True)
def no_model_cards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, folder: None)
        yield
