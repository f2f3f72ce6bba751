"""A vision transformer as small as it can be, saved with its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SIDE = 16
MEAN, DEVIATION = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)


def write_tiny_vit(folder: Path) -> Path:
    """One with a head of two labels."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=SIDE,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=list(MEAN), image_std=list(DEVIATION)).save_pretrained(folder)
    return folder
