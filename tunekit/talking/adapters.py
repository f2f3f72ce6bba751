"""The adapters of one base, by name. An adapter in a folder is loaded when it is used for the first time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import (
    CONFIG_NAME,
    FACTS_NAME,
    TENSORS_NAME,
    adapter_in,
    is_adapter,
    read_adapter_config,
)
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.errors import AdapterConflict, InputError
from tunekit.model.call import calling, current_call
from tunekit.model.load import LoadedModel
from tunekit.model.text.slots import shares_slots

BASE = "base"  # the name of the base without an adapter
LISTED_NAMES = 20  # the number of names in an error
PART_BYTES = 10_000  # Python's objects for one adapted module, measured
Stamp = tuple[int, ...]


class Adapters:
    """The adapters of one base. Together they use at most `limit_bytes` of memory (None: no limit); the least recently
    used adapters are evicted. The limit includes copies of LoRA factors, which are made when one forward uses several
    adapters.

    `keeps_idle`: whether adapters stay in memory while they are not in use.
    Only one thread may load and use adapters. Other threads may read the names.
    """

    def __init__(self, base: LoadedModel, limit_bytes: int | None = None) -> None:
        self.base, self.limit_bytes = base, limit_bytes
        self.keeps_idle = True
        self._set = AdapterSet(base.net)
        self.forget: Callable[[str], None] = lambda name: None  # called before an adapter is evicted
        self._places: dict[str, Path] = {}  # of each adapter that was named by itself
        self._folders: list[Path] = []  # folders of adapters
        self._listed: dict[str, Path] = {}  # the adapters in these folders
        self._sizes: dict[str, int] = {}  # of loaded adapters that can be evicted, the least recently used first
        self._fixed_sizes: dict[str, int] = {}  # of adapters that cannot be evicted
        self._stamps: dict[str, Stamp] = {}  # the times at which their files were written

    @property
    def names(self) -> list[str]:
        """The names of the base and of the adapters."""
        return list(dict.fromkeys([BASE, *list(self._set.adapters), *list(self._places), *list(self._listed)]))

    @property
    def reloads(self) -> bool:
        """Whether some adapters come from folders, so that they can be evicted and loaded again."""
        return bool(self._places or self._listed)

    def knows(self, name: str) -> bool:
        """Whether there is a model with this name. If the name is unknown, the folders of adapters are read again
        before the answer."""
        if name not in self.names:
            self.read_folders()
        return name in self.names

    def check(self, name: str) -> None:
        """Raises: InputError if there is no model with this name."""
        if not self.knows(name):
            raise InputError(f"there is no adapter '{name}'", f"there are: {self.listing}")

    @property
    def listing(self) -> str:
        """The first LISTED_NAMES names, as text for a message."""
        names = self.names
        return ", ".join(names[:LISTED_NAMES]) + (
            f" and {len(names) - LISTED_NAMES} more" * (len(names) > LISTED_NAMES)
        )

    def place(self, name: str) -> Path | None:
        """The folder from which an adapter is loaded; None for an adapter that does not come from a folder."""
        return self._places.get(name) or self._listed.get(name)

    def put(self, name: str, attached: AttachedAdapter) -> None:
        """Add an adapter that is already attached to the net. It is never evicted."""
        self._set.add(name, lambda: attached)
        self._fixed_sizes[name] = _size_of(attached)

    def register(self, name: str, place: Path) -> None:
        """Add the adapter in a folder. It is loaded when it is used for the first time."""
        if name == BASE:
            raise InputError(f"'{BASE}' is the name of the base itself", "give the adapter another name")
        if name in self.names:
            raise InputError(f"two adapters have the name '{name}'", "rename one of their folders")
        self._places[name] = place

    def add(self, name: str, place: Path) -> None:
        """Load the adapter in a folder. Raises: AdapterError if the folder has no adapter for this base."""
        self.register(name, place)
        try:
            self.load(name)
        except BaseException:
            del self._places[name]
            raise

    def add_folder(self, folder_name: str) -> None:
        """Add the adapter in a folder; its name is the folder's name. If the folder is a run folder, this is the run's
        adapter. If the folder contains several adapter folders, all of them are added.

        Raises: InputError if there is no adapter; AdapterError if a single adapter does not fit the base.
        """
        path = Path(folder_name).expanduser().absolute()
        place, adapters = _find_adapters(folder_name, path)
        if place is not None:
            self.add(name_of(str(place)), place)
            return
        if taken := sorted({*self.names} & {*adapters}):
            raise InputError(
                f"{folder_name}: the name of its adapter '{taken[0]}' is already in use", "rename the adapter's folder"
            )
        self._folders.append(path)
        self.read_folders()

    def read_folders(self) -> None:
        """Update the list of adapters in all folders that contain several adapters."""
        self._listed = {name: place for folder in self._folders[::-1] for name, place in _adapters_in(folder).items()}

    def load(self, name: str, in_use: Collection[str] = ()) -> None:
        """Load an adapter if it is not in memory. Adapters in `in_use` are not evicted, even if the memory limit is
        exceeded.

        Raises: InputError for an unknown name; AdapterConflict if the adapter cannot be in memory together with an
        adapter in use; AdapterError if it does not fit the base.
        """
        place = self.place(name)
        stamp = self._stamps.get(name, ()) if place is None else _written(place)
        if name in self._sizes and stamp != self._stamps[name] and name not in in_use:
            self._evict(name)
        if name in self._sizes:
            self._sizes[name] = self._sizes.pop(name)
        elif name != BASE and name not in self._set.adapters:
            self.check(name)
            self._fit(in_use, _file_bytes(self._places.get(name) or self._listed[name]))
            try:
                self._attach(name)
            except AdapterConflict:
                self._evict_others({name, *in_use}, 0)
                self._attach(name)
        self._fit({name, *in_use})

    def free_copies(self) -> None:
        """Free the copies of LoRA factors that were made for forwards with several adapters."""
        self._set.keep_copies(())

    def _fit(self, in_use: Collection[str], more_bytes: int = 0) -> None:
        """Evict adapters that are not in use, until the memory limit has room for all others, for copies of their LoRA
        factors and for `more_bytes`."""
        self._set.keep_copies(in_use)
        if not self.keeps_idle:
            self._evict_others(in_use, 0)
        elif self.limit_bytes is not None:
            sizes = self._sizes | self._fixed_sizes
            copied = sum(sizes.get(name, 0) for name in in_use) if len(in_use) > 1 else 0
            self._evict_others(in_use, self.limit_bytes - copied - more_bytes)
            room = max(self.limit_bytes - sum(self._sizes.values()) - more_bytes, 0)
            if self._set.copies.used_bytes > room:
                self._set.keep_copies(())
            self._set.copies.limit_bytes = room

    @property
    def nbytes(self) -> int:
        """The memory of adapters that can be evicted, plus the memory of copied LoRA factors."""
        return sum(self._sizes.values()) + self._set.copies.used_bytes

    def _attach(self, name: str) -> None:
        base, place = self.base, self._places.get(name) or self._listed[name]
        stamp = _written(place)
        attach = partial(attach_adapter_folder, base.net, place, head_name=base.family.head_name(base.net))
        attach = partial(attach, base_fingerprint=base.fingerprint, device=base.device, shares_base=True)
        attached = self._set.add(name, attach)
        self._sizes[name] = _size_of(attached)
        self._stamps[name] = stamp

    def _evict_others(self, names: Collection[str], limit_bytes: int) -> None:
        """Evict adapters except those in `names`, until the memory of all evictable adapters is at most
        `limit_bytes`."""
        for other in [name for name in self._sizes if name not in names]:
            if sum(self._sizes.values()) <= limit_bytes:
                return
            self._evict(other)

    def _evict(self, name: str) -> None:
        self.forget(name)
        self._set.remove(name).free()
        del self._sizes[name], self._stamps[name]

    def loaded(self, name: str) -> AttachedAdapter | None:
        """The adapter; None for the base."""
        return self._set.adapters.get(name)

    def shares_forwards(self, name: str) -> bool:
        """Whether one forward can compute rows for this model (a loaded adapter, or the base) and rows for other
        models."""
        return name == BASE or (self._shares_slots and self._set.shares_forwards(name))

    @cached_property
    def _shares_slots(self) -> bool:
        return shares_slots(self.base)

    def using(self, name: str | None) -> AbstractContextManager[object]:
        """A context manager: inside the block, forwards use this adapter; with the name of the base or None, they use
        the base alone."""
        bypassed = name is None or name == BASE
        return calling(replace(current_call(), bypassed=True)) if bypassed else self._set.using(str(name))

    def using_rows(self, names: Sequence[str | None]) -> AbstractContextManager[object]:
        """A context manager: inside the block, each row of a forward uses the adapter with its name (None: the base).
        If there is a single name, all rows use it."""
        if len({*names}) == 1:
            return self.using(names[0])
        return self._set.using_rows([None if name == BASE else name for name in names])


def name_of(target: str) -> str:
    """The name under which an adapter is served: the name of its folder. For the adapter of a run, the name of the
    run."""
    path = Path(os.path.abspath(target))
    return path.parent.name if path.name == "adapter" else path.name


def check_folder(folder_name: str) -> None:
    """Check a folder before `Adapters.add_folder` is called. This does not need the base, whose loading takes long. If
    the folder contains several adapters, each is checked when it is used for the first time.

    Raises: InputError if there is no adapter; AdapterError if a single adapter is damaged.
    """
    place, _ = _find_adapters(folder_name, Path(folder_name).expanduser().absolute())
    if place is not None:
        read_adapter_config(place).check_files()


def _find_adapters(folder_name: str, path: Path) -> tuple[Path | None, dict[str, Path]]:
    """The folder of a single adapter; or, for a folder with several adapters, their folders by name.

    Raises: InputError if there is no adapter.
    """
    place = adapter_in(path)
    adapters = {} if place is not None else _adapters_in(path)
    if place is None and not adapters:
        what = f"{folder_name} contains no adapter (adapter_config.json)"
        raise InputError(what, "name an adapter folder, a run folder, or a folder that contains adapters")
    return place, adapters


def _written(place: Path) -> Stamp:
    """The modification times of an adapter's files; 0 for a missing file."""
    paths = [place / name for name in (CONFIG_NAME, FACTS_NAME, TENSORS_NAME)]
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def _size_of(attached: AttachedAdapter) -> int:
    """The memory of an adapter."""
    return sum(tensor.nbytes for tensor in attached.state().values()) + PART_BYTES * len(attached.parts())


def _file_bytes(place: Path) -> int:
    """The size of an adapter's file of tensors; 0 if it is missing."""
    path = place / TENSORS_NAME
    return path.stat().st_size if path.exists() else 0


def _adapters_in(folder: Path) -> dict[str, Path]:
    """The folders of the adapters in a folder, by name. A run folder counts as the adapter of the run."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    places = [(name, place) for name in names if name != BASE for place in (folder / name / "adapter", folder / name)]
    return {name: place for name, place in places if is_adapter(place)}
