"""Writes a model folder completely or not at all. The caller writes the weights; this module writes all other files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunekit.contracts import Answering, Processor, Tokenizer
from tunekit.errors import ModelError
from tunekit.files.durable import is_real_folder, remove_tree, replace_folder, sync, temporary_name, write_json
from tunekit.files.work_folder import new_path
from tunekit.model.families import make_family
from tunekit.model.storage.inspection import family_of_base
from tunekit.model.storage.portable import make_portable
from tunekit.model.storage.source import KEY, read_json
from tunekit.recipe.model import HeadedModel, ModelSection

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")  # files that are never changed
COPIED = ("generation_config.json", "LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*")


@contextmanager
def atomic_model_folder(output: Path) -> Iterator[Path]:
    """Context manager: the body fills a folder with a temporary name. Afterwards the folder is flushed to disk and
    renamed to `output`. After a failure nothing remains."""
    staging = temporary_name(output)
    if is_real_folder(staging):  # left by a killed process with the same id
        remove_tree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            sync(path)
        sync(staging)
        replace_folder(staging, output)
    except BaseException:
        if staging.exists():
            remove_tree(staging)
        raise


def copy_other_files(
    section: ModelSection,
    base: Path,
    processor: Processor,
    chat_template: str | None,
    folder: Path,
    answering: Answering | None,
) -> None:
    """Copy the tokenizer or other processor, the chat template, the generation settings and the licence of a base. Copy
    code files only if the base may run remote code. Finally rewrite the folder's small files so that older
    programs can read them (make_portable).

    `answering`: how the trained model answers. It may change the processor and the generation settings.
    """
    for path in copied_files(section, base):
        shutil.copyfile(path, folder / path.name)
    answering_processor = None if answering is None else answering.processor
    (answering_processor or processor).save(folder)  # it may change the copied files
    if isinstance(section, HeadedModel) and processor.tokenizer is not None:
        _name_padding(folder / "tokenizer_config.json", processor.tokenizer)
    settings, generation = folder / "generation_config.json", {} if answering is None else answering.generation
    if generation and settings.exists():
        values = {**json.loads(settings.read_bytes()), **generation}
        write_json(settings, {name: value for name, value in values.items() if generation.get(name, "") is not None})
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    make_portable(folder)


def check_copied_files(section: ModelSection, base: Path) -> None:
    """Check the files of a base that a model folder made from it needs. Call this before long work.

    Raises: ModelError if a composite base has no processor files, or if a file is a link that could lead to a private
    file.
    """
    check_processor_files(section, base)
    copied_files(section, base)


def check_processor_files(section: ModelSection, base: Path) -> None:
    """Raises: ModelError if a composite base has no processor files, which a merge of any adapter needs."""
    processor_files = make_family(family_of_base(section)).copied
    if processor_files and not any((base / name).exists() for name in processor_files):
        what = f"{base} contains no processor files ({processor_files[0]}), which programs need to load its class"
        raise ModelError(what, "copy them from the place of the base into its folder", key=KEY)


def copied_files(section: ModelSection, base: Path) -> list[Path]:
    """The files in the folder of a base that a model made from it needs unchanged: generation settings, licence, and
    code if the base may run it.

    Raises: ModelError if one is a link that could lead to a private file.
    """
    if Path(section.name_or_path).suffix.lower() == ".gguf":
        return []
    processor_files = make_family(family_of_base(section)).copied
    patterns = (*COPIED, *processor_files, *(("*.py",) if section.trust_remote_code else ()))
    paths = sorted(path for pattern in patterns for path in base.glob(pattern))
    for path in paths:
        _check_link(path, base, may_be_elsewhere=True)
    return paths


def write_portable_copy(source: Path, output: Path) -> None:
    """Write a copy of a model folder that older programs can read too. Weights become hard links where the file system
    allows it; all other files are copied, so that nothing in `source` changes."""
    with new_path(output) as staging:
        staging.mkdir()
        _copy_files(source, staging, source)
        make_portable(staging)


def _check_link(path: Path, folder: Path, *, may_be_elsewhere: bool) -> None:
    """Raises: ModelError if a file of the model folder is a link that could lead to a private file: links come with
    downloaded folders, and copies are published. `may_be_elsewhere`: accept a file of the same name anywhere."""
    target = path.resolve()
    is_cached = target.parent.name == "blobs"  # in the hub's cache
    is_same = may_be_elsewhere and target.name == path.name
    if not (is_cached or is_same or target.is_relative_to(folder.resolve())):
        raise ModelError(
            f"is a link to {target}, outside of the model folder", "replace it by a copy of the file", file=str(path)
        )


def _copy_files(source: Path, folder: Path, model: Path) -> None:
    """Link or copy all files of a folder of `model` and its subfolders, except hidden files and links to folders."""
    for path in sorted(source.iterdir()):
        place = folder / path.name
        if path.name.startswith("."):
            continue
        if is_real_folder(path):
            place.mkdir()
            _copy_files(path, place, model)
            sync(place)
        elif path.is_file():
            is_weights = path.name.endswith(WEIGHTS)
            _check_link(path, model, may_be_elsewhere=is_weights)
            if not (is_weights and _linked(path, place)):
                shutil.copyfile(path, place)
                sync(place)


def _linked(path: Path, place: Path) -> bool:
    """Make `place` a hard link to the file. False if that is impossible, such as between two file systems."""
    try:
        os.link(path.resolve(), place)  # the hub's cache consists of links
    except OSError:
        return False
    return True


def _name_padding(path: Path, tokenizer: Tokenizer) -> None:
    """If the tokenizer's file names no padding token, write the padding token of config.json into it. Other programs
    pad with this token, and a decoder's classification head reads the last token before the padding."""
    settings, config = (read_json(file) if file.is_file() else {} for file in (path, path.parent / "config.json"))
    if settings and settings.get("pad_token") is None and config.get("pad_token_id") == tokenizer.pad_id:
        write_json(path, {**settings, "pad_token": tokenizer.token_text(tokenizer.pad_id)})
