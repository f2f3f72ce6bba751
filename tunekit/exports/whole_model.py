"""A model folder for a program's own converter: the merged model, or the base with config keys of older programs."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunekit.arithmetic.merge import merge
from tunekit.errors import Problem
from tunekit.exports.programs.program import find_program
from tunekit.exports.programs.versions import INSTALL
from tunekit.files.work_folder import work_folder
from tunekit.model.storage.portable import make_portable
from tunekit.model.storage.quantized_layouts import stored_settings
from tunekit.targets.exportable import Exportable


def packed_problems(exportable: Exportable) -> list[Problem]:
    """A problem if a base is exported without an adapter, but the recipe quantizes the base: the export would have the
    full weights, and the run would compute with the quantized weights. A problem too if the base's files contain
    quantized weights, because the converter would read these files."""
    if exportable.kind == "model" and (stored := stored_settings(exportable.config)):
        what = f"the converter cannot read the base's weights, which are stored as {stored.get('quant_method')}"
        return [Problem(what, "export an adapter of it, which is merged first, or name the unquantized base")]
    packing = exportable.target.model.quantization
    if exportable.kind == "adapter" or packing == "none":
        return []
    what = f"the recipe loads the base as {packing}, but the export would have the base's full weights"
    return [Problem(what, "add model.quantization=none to the command")]


def conversion_problems(
    exportable: Exportable, program: str, families: Collection[str], model_types: Collection[str]
) -> list[Problem]:
    """Reasons why the converter of a program cannot read the model. `families`, `model_types`: the families and
    model types that the converter supports."""
    wrong = packed_problems(exportable)
    if find_program(program) is None:
        how = f"install it with: {INSTALL} {program}"
        wrong.append(Problem(f"{program}, which converts the model, is not installed", how))
    kind = exportable.config.get("model_type")
    if exportable.gguf_file is not None and exportable.kind == "model":
        wrong.append(Problem("the model is a GGUF file, which the converter does not read", "name a folder"))
    elif exportable.family not in families:
        wrong.append(Problem(f"{exportable.family} models are not converted", "choose another --to"))
    elif kind not in model_types:
        wrong.append(Problem(f"{program} does not read models of type {kind}", "choose another --to"))
    return wrong


@contextmanager
def whole_model(exportable: Exportable, path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` with the merged model, or with links to the base's files."""
    with work_folder(path) as work:
        folder = work / "model"
        if exportable.kind == "adapter":
            merge(exportable.target, folder)
        else:
            folder.mkdir()
            for file in exportable.folder.iterdir():
                if file.suffix in (".json", ".jinja"):  # which make_portable may rewrite
                    shutil.copyfile(file, folder / file.name)
                elif file.is_file():
                    (folder / file.name).symlink_to(file.resolve())
            make_portable(folder)
        yield folder
