"""`objective: image_classify`: image classification. A head, trained with the adapter, predicts a label."""

from typing import Annotated

from pydantic import AfterValidator, Field

from tunekit.basics import Shows
from tunekit.recipe.bases.label_settings import HeadSettings, LabelSettings
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, Number, Several


def _scale(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        raise ValueError("needs two numbers above 0 and at most 1, the smaller number first")
    return value


class ImageClassifySettings(HeadSettings, LabelSettings):
    """Settings of image classification. In training, torchvision's transforms augment an image differently in each
    step."""

    summary = "cross entropy on a label for each image"
    family = "image_classifier"
    example = "image_label"
    shows = Shows(unit="label", size_unit="pixel")
    medium = "image"
    first_order = 30
    training_keys = (
        *(*LabelSettings.training_keys, "random_resized_crop", "crop_scale", "random_flip"),
        *("randaugment_ops", "randaugment_magnitude", "random_erasing"),
    )

    resolution: Annotated[Count, Field(ge=16, le=4096)] | None = Field(
        None, description="side of the images in pixels; null: the size that the model's image processor has"
    )
    random_resized_crop: bool = Field(True, description="train on a random part of each image, resized to `resolution`")
    crop_scale: Annotated[Several[Number], AfterValidator(_scale)] = Field(
        (0.5, 1.0), description="minimum and maximum share of the image in a random crop"
    )
    random_flip: bool = Field(True, description="mirror each image with probability 1/2")
    randaugment_ops: CountOrZero = Field(0, description="number of RandAugment operations per image; usually 2")
    randaugment_magnitude: Annotated[CountOrZero, Field(le=30)] = Field(
        9, description="strength of the RandAugment operations"
    )
    random_erasing: Fraction = Field(0.0, description="the probability that a rectangle of an image is erased")

    @property
    def augments(self) -> bool:
        """Whether training augments images, which needs torchvision."""
        return bool(self.random_resized_crop or self.random_flip or self.randaugment_ops or self.random_erasing)
