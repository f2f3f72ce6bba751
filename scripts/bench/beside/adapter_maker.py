"""Makes adapter folders and their logits with peft or transformers. It runs in the Python of the release that is
compared.

    adapter_maker.py REQUEST      (a JSON file that adapters.py writes)

Request: injected (transformers' add_adapter instead of peft's get_peft_model), bases (name -> folder, class, inputs),
cases (name, base, config, fields, resize, spread, pickle), folder. Each case gets folder/NAME/adapter and, as its last
file, logits.npy; or error.txt if this release cannot make it. Finished cases are left alone.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
import transformers.integrations.peft


def load_base(base: dict[str, Any]) -> Any:
    """Load the base in float32. Older releases have another name for the argument `dtype`."""
    torch.manual_seed(0)
    return getattr(transformers, base["class"]).from_pretrained(base["folder"]).float().eval()


def make_adapter(case: dict[str, Any], model: Any, injected: bool) -> Any:
    """The model with an adapter. Noise is added to the trained values, so that they are like the values after
    training."""
    if case["resize"]:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + case["resize"])
    config = getattr(peft, case["config"])(**case["fields"])
    if injected:
        # transformers 5.24 asks for peft 0.22, which is not released
        transformers.integrations.peft.MIN_PEFT_VERSION = peft.__version__
        model.add_adapter(config)
    else:
        model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * case["spread"])
    return model.eval()


def answer(model: Any, base: dict[str, Any]) -> np.ndarray:
    """The logits (B, T, V), of classifiers (B, C), on the request's input."""
    inputs = {name: torch.tensor(values) for name, values in base["inputs"].items()}
    if "MULTITASK" in str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")):
        inputs["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


def make_case(case: dict[str, Any], base: dict[str, Any], injected: bool, place: Path) -> None:
    """Write the case's folder; its logits are the last file."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        model = make_adapter(case, load_base(base), injected)
        values = answer(model, base)
        model.save_pretrained(str(place / "adapter"), safe_serialization=not case["pickle"])
    except Exception:
        (place / "error.txt").write_text(traceback.format_exc(), "utf-8")
        return
    np.save(place / "logits.npy", values)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(request["folder"])
    for name, base in request["bases"].items():
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", answer(load_base(base), base))
    for case in request["cases"]:
        place = folder / case["name"]
        if not (place / "logits.npy").exists() and not (place / "error.txt").exists():
            make_case(case, request["bases"][case["base"]], request["injected"], place)
    versions = {module.__name__: module.__version__ for module in (peft, transformers, torch)}
    (folder / "versions.json").write_text(json.dumps(versions), "utf-8")


if __name__ == "__main__":
    main()
