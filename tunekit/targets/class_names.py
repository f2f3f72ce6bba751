"""Reads an adapter of another tool whose module names are those of another class of its base."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tunekit.adapters.folder.class_names import may_need_renames, renames_for, write_renamed
from tunekit.adapters.folder.config import FACTS_NAME
from tunekit.files.work_folder import temporary_folder
from tunekit.model.families import make_family
from tunekit.model.load import make_meta_model
from tunekit.model.storage.inspection import family_of_base
from tunekit.recipe.model import ModelSection

Holder = TemporaryDirectory[str] | None


def with_class_names(section: ModelSection, adapter: Path, holder: Holder) -> tuple[Path, Holder, list[str]]:
    """The adapter's folder, or a renamed copy of another tool's adapter that has the names of a composite model's text
    class (or of the composite class, if the base is the text model alone); the folder that holds the copy; and a
    note."""
    family = make_family(family_of_base(section))
    if (adapter / FACTS_NAME).exists() or not may_need_renames(adapter, composite=family.trained_as is not None):
        return adapter, holder, []
    net = make_meta_model(section.model_copy(update={"quantization": "none"}), device=torch.device("cpu")).net
    renames = renames_for(net, family.head_name(net), adapter)
    if not renames:
        return adapter, holder, []
    holder = holder or temporary_folder()
    renamed = Path(holder.name) / "renamed"
    write_renamed(adapter, renamed, net, renames)
    old, new = next(iter(renames.items()))
    note = f"the adapter has the names of another class of its base: {old} is read as {new} ({type(net).__name__})"
    return renamed, holder, [note]
