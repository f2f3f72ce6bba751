"""The interface of a base's image processor, which rows of text and images use."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class ImageProcessor(Protocol):
    """Makes a base's inputs from the images of a conversation. It calls the base's own processor.

    `obstacle`: the reason why the base's rows cannot have images; None if they can.
    """

    obstacle: str | None

    def limited(self, tokens: int) -> ImageProcessor:
        """The processor with at most this number of tokens for an image; 0: itself.

        Raises: RecipeError for a number below the tokens of every image.
        """

    def save(self, folder: Path) -> None:
        """Write the limit into the image processor's files of a model folder."""

    @property
    def most_tokens(self) -> int | None:
        """The maximum number of tokens of an image; None if it is unknown."""

    @property
    def limit_text(self) -> str:
        """The maximum number of tokens of an image and, for a limited processor, the settings that limit it."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that affects the inputs made from an image."""

    @property
    def placeholder(self) -> str:
        """The text that a chat template writes for an image."""

    @property
    def token_id(self) -> int:
        """The id at which the base puts features of images."""

    @property
    def layout(self) -> dict[str, str]:
        """For each input of the vision tower: what its first dimension counts."""

    def expansion(self, height: int, width: int, *, alone: bool = True) -> str:
        """The text that the processor writes in place of the placeholder of an image of this size. `alone`: whether the
        row has no other image."""

    def inputs(self, pixels: NDArray[np.uint8], *, alone: bool = True) -> dict[str, Tensor]:
        """The inputs of the vision tower for one image (H, W, 3)."""

    def input_bytes(self, height: int, width: int) -> int:
        """The size of these inputs for an image of this size."""

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """The rows and columns of tokens of an image of this size; None if they form no grid."""
