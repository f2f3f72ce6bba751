"""`objective: image_classify` a head that is trained with the adapter gives each picture a label."""

from typing import Annotated

from pydantic import AfterValidator, Field

from tunekit.recipe.bases.label_settings import LabelSettings
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, Number, Several
from tunekit.records import Shows


def _scale(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        raise ValueError("must be two numbers, the smaller first, from more than 0 to 1")
    return value


class ImageClassifySettings(LabelSettings):
    """One label a picture. Pictures are changed by torchvision's transforms, another way in each step."""

    summary = "cross entropy on a label for each image"
    family = "image_classifier"
    example = "image_label"
    shows = Shows(unit="label", size_unit="pixel")
    medium = "image"
    first_order = 30

    resolution: Annotated[Count, Field(ge=16, le=4096)] | None = Field(
        None, description="pixels of a side; null: what the model's processor says"
    )
    random_resized_crop: bool = Field(True, description="a part of each image, made as large as the whole")
    crop_scale: Annotated[Several[Number], AfterValidator(_scale)] = Field(
        (0.5, 1.0), description="the least and the largest share of the image that a crop has"
    )
    random_flip: bool = Field(True, description="each image mirrored in half of the steps")
    randaugment_ops: CountOrZero = Field(0, description="operations of RandAugment for each image; 2 is usual")
    randaugment_magnitude: Annotated[CountOrZero, Field(le=30)] = Field(9, description="their strength")
    random_erasing: Fraction = Field(0.0, description="how often a rectangle of an image is erased")

    @property
    def augments(self) -> bool:
        """Whether steps change images, for which torchvision is needed."""
        return bool(self.random_resized_crop or self.random_flip or self.randaugment_ops or self.random_erasing)
