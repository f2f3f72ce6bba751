"""Conversion of a model folder by CTranslate2, and log-probabilities of the result."""

from typing import Any

import numpy as np
from ctranslate2 import Generator
from ctranslate2.converters import TransformersConverter


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Nothing for a conversion, else all log-probabilities of the rows."""
    if "output" in request:
        converter = TransformersConverter(request["model"], copy_files=request["files"], low_cpu_mem_usage=True)
        converter.convert(request["output"], quantization=request["type"])
        return {}
    generator = Generator(request["model"], device="cpu", compute_type="default")
    return {
        f"values.{index}": np.array(generator.forward_batch([row], return_log_probs=True))[0]
        for index, row in enumerate(request["rows"])
    }
