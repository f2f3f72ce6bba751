"""Finds the layers of the base that an adapter adapts, and the rank and alpha of each layer.

Layers are found by structure and by full names, also on the meta device and with adapters attached. Entries without a
match are reported with the nearest names. `all-linear` is every linear layer except the output head, layers with a
single output (gates), and layers on which an adapter would have no effect. A list contains full names or endings after
a dot; a text that is not a list is one regular expression for the full name.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from torch import nn

from tunekit.adapters.base import slot_count
from tunekit.adapters.copies import TrainedCopy, wrong_entries
from tunekit.adapters.expert_parameters import fused_shape, stored_transposed
from tunekit.adapters.folder.peft_models import read_as_experts, refused_by_peft
from tunekit.adapters.method import Method, load_method, saved_modules
from tunekit.adapters.module_names import (
    base_modules,
    check_layer_numbers,
    endings,
    fused_parameters,
    in_chosen_layers,
    is_fused_in,
    is_within,
    named_copies,
)
from tunekit.adapters.patterns import Patterns
from tunekit.adapters.tokens import token_slots, wrong_tokens
from tunekit.errors import AdapterError, Problem, RecipeError
from tunekit.model.parts import modules_apart
from tunekit.model.quantized.weights import layer_kind, weight_of
from tunekit.model.uncalled import skipped_modules, uncalled_layers
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target

ALL_LINEAR = "all-linear"
Value = TypeVar("Value", int, float)


def find_targets(
    net: nn.Module,
    settings: AdapterSettings,
    *,
    head_name: str | None,
    method: Method | None = None,
    file: str | None = None,
) -> list[Target]:
    """Every layer (and fused parameter) that the adapter will adapt, sorted by name.

    `file`: the adapter configuration that the settings come from. Then an entry without a match is allowed, because the
    file's tensors are compared with the targets in both directions. Two patterns with different values for one module
    are refused as ambiguous.
    Raises: RecipeError (AdapterError with `file`) with all problems.
    """
    search = Search(net, settings, method or load_method(settings.method), head_name, file)
    targets = search.layers() + search.parameters()
    search.check_patterns([target.name for target in targets])
    for what, how in wrong_tokens(net, settings, [target.name for target in targets], search.copies):
        search.report("trainable_token_indices", what, how)
    search.report_large_ranks()
    if not targets and not search.problems and (search.method.layer or search.method.parameter):
        head = [*search.copies, *([head_name] if head_name else [])]
        others = [name for name in search._adaptable_names() if not is_within(name, head)]
        how = "name other layers" if others else "the base has no linear layer; write method: full"
        search.report("target_modules", "the base has no layer to adapt", how)
    if not search.problems:
        for conflict in search.method.conflicts(settings, targets, file is not None):
            search.report(conflict.key, conflict.what, conflict.how)
    if search.problems:
        raise (AdapterError if file else RecipeError).of(search.problems)
    return sorted(targets, key=lambda target: target.name)


def unreached_experts(net: nn.Module, settings: AdapterSettings, targets: Sequence[Target]) -> list[str]:
    """Names of fused expert parameters that are not adapted, although an entry of target_modules names layers that are
    fused into them."""
    entries = getattr(settings, "target_modules", ())
    entries = None if isinstance(entries, str) else entries
    adapted = {target.name for target in targets}
    return [
        name
        for name in fused_parameters(net)
        if name not in adapted and (entries is None or any(is_fused_in(entry, name) for entry in entries))
    ]


def trained_count(method: Method, settings: AdapterSettings, targets: Sequence[Target]) -> int:
    """The number of trained parameters in an adapter's layers and in the parts that the layers share."""
    shared = slot_count(method.shared.slots(settings, targets).values()) if method.shared else 0
    return shared + sum(target.trainable_parameters for target in targets)


def copied_parameters(net: nn.Module, method: Method, settings: AdapterSettings, targets: Sequence[Target]) -> int:
    """The number of trained parameters in copied modules and in trained token rows, not in the targets. Allocates
    nothing."""
    modules = base_modules(net)
    copies = method.copied_modules(modules, settings, targets)
    slots = [TrainedCopy.slots(modules[name], name, only) for name, only in copies.items()]
    return sum(slot_count(module_slots.values()) for module_slots in (*slots, *token_slots(net, settings).values()))


class Search:
    """A search for an adapter's targets in a base. `problems` collects the entries that cannot be used."""

    def __init__(
        self, net: nn.Module, settings: AdapterSettings, method: Method, head_name: str | None, file: str | None
    ) -> None:
        self.settings, self.method, self.head_name, self.file = settings, method, head_name, file
        self.net, self.modules = net, base_modules(net)
        self.fused, self.matrices = fused_parameters(net), fused_parameters(net, (2, 3))
        self.copies = named_copies(self.modules, saved_modules(settings))  # these, and modules inside, are no targets
        self.kinds = method.layer.kinds if method.layer else frozenset()
        self.patterns = Patterns(error=AdapterError if file else RecipeError, file=file)
        self.problems: list[Problem] = []
        self.too_large: list[Target] = []
        self.by_ending: dict[str, list[str]] = {}
        for name in self.modules:
            for ending in endings(name):
                self.by_ending.setdefault(ending, []).append(name)

    def report(self, key: str, what: str, how: str) -> None:
        """Add a problem with a setting. `key`: the setting; `what`: the problem; `how`: the advice."""
        self.problems.append(Problem(what, how, self.file, None, self._full_key(key)))

    def _full_key(self, key: str) -> str:
        return key if self.file else f"adapter.{key}"

    def _patterns_of(self, key: str) -> Patterns:
        """The pattern matcher. From now on its messages name the setting `key`."""
        self.patterns.key = self._full_key(key)
        return self.patterns

    def layers(self) -> list[Target]:
        """The targets that the method adapts as layers."""
        if self.method.layer is None:
            return []
        excluded = self._match("exclude_modules", getattr(self.settings, "exclude_modules", None) or ())
        names = self._match("target_modules", getattr(self.settings, "target_modules", ())) - excluded
        if not self.file:  # files of other programs may contain unused layers
            unread = [*getattr(self.net, "unread", ()), *skipped_modules(self.net)]
            names = {name for name in names if not is_within(name, unread)}
        for what, how in wrong_entries(self.modules, saved_modules(self.settings), self.file is not None):
            self.report("modules_to_save", what, how)
        names = {name for name in self._in_layers(names) if not is_within(name, self.copies)}
        self._refuse_experts(names)
        return [self._layer_target(name, name) for name in sorted(names)]

    def _refuse_experts(self, names: Collection[str]) -> None:
        """Report layers that peft reads as fused expert parameters, if the method can only adapt layers."""
        unreadable = sorted(read_as_experts(self.net, names)) if self.method.peft.takes_experts else []
        if unreadable and self.method.parameter is None and not self.file:
            which = f"'{unreadable[0]}'{_more(unreadable)}"
            what = f"peft reads {which} as fused experts, which {self.settings.method} does not adapt"
            self.report("target_modules", what, "exclude such layers, or write method: lora")

    def parameters(self) -> list[Target]:
        """The targets that target_parameters names. The weight of a layer becomes an ordinary layer target."""
        names = {
            name
            for entry in (getattr(self.settings, "target_parameters", ()) if self.method.parameter else ())
            for name in [n for n in self.matrices if entry in endings(n)]
            or self._report_miss("target_parameters", entry)
        }
        chosen = names if self.file else self._in_layers(names)
        return [
            self._layer_target(layer, name)
            if attribute == "weight" and layer_kind(self.modules[layer]) in self.kinds
            else self._parameter_target(name, chosen)
            for name in sorted(chosen)
            for layer, _, attribute in [name.rpartition(".")]
        ]

    def _in_layers(self, names: set[str]) -> set[str]:
        """The names in the chosen layers. A chosen number without a layer is reported as a problem."""
        missing, existing = check_layer_numbers(self.modules, self.settings)
        if missing and not self.file:
            text = f"the base has no layer {', '.join(map(str, missing))}"
            self.report(
                "layers_to_transform", text, f"its layers are {existing[0]} to {existing[-1]}" if existing else ""
            )
        return in_chosen_layers(names, self.settings)

    def _match(self, key: str, entries: str | Sequence[str]) -> set[str]:
        """The names of layers that match the entries and that the method can adapt. For exclude_modules: the names of
        any modules that match."""
        targets = key == "target_modules"
        if targets and entries == ALL_LINEAR:
            return self._all_linear()
        matches: set[str] = set()
        regex, patterns = isinstance(entries, str), self._patterns_of(key)
        for entry in [entries] if isinstance(entries, str) else entries:
            if regex:
                names = [name for name in self.modules if name and patterns.matches(entry, name)]
            else:
                names = self.by_ending.get(entry, [])
            if not names and not self.file and not self._is_unloaded(key, entry, regex):
                self._report_miss(key, entry)
            matches.update(self._adaptable(entry, names, regex) if targets else names)
        return matches

    def _is_unloaded(self, key: str, entry: str, regex: bool) -> bool:
        """Whether the entry matches modules of a part that is not loaded. As a target, this is a reported problem."""
        patterns = self._patterns_of(key)
        names = modules_apart(self.net)
        match = next(
            (name for name in names if (patterns.matches(entry, name) if regex else entry in endings(name))), None
        )
        if match is not None and key == "target_modules":
            last = sorted({name.rpartition(".")[2] for name in self._adaptable_names()})
            what = (
                f"'{entry}' matches only modules outside of the language model, such as '{match}', which is not trained"
            )
            self.report(key, what, f"name layers of the language model: {', '.join(last[:8])}")
        return match is not None

    def _all_linear(self) -> set[str]:
        """The layers of `all-linear`: all linear layers except the output head, layers with a single output (gates),
        and layers on which an adapter has no effect."""
        linear, head = self.kinds & {"linear", "conv1d"}, [self.head_name] if self.head_name else []
        refused = refused_by_peft(self.net, self.modules) if self.method.peft.refuses_kernel_layers else set()
        passed_over = uncalled_layers(self.modules) | refused
        return {
            name
            for name, module in self.modules.items()
            if layer_kind(module) in linear and not is_within(name, head) and name not in passed_over
            for weight in [weight_of(module)]
            if weight is not None and weight.shape[0] > 1
        }

    def _adaptable(self, entry: str, names: Sequence[str], regex: bool) -> list[str]:
        """The names whose layers the method can adapt. Any other matched layer is reported as a problem.

        A regular expression may also match containers and layers without parameters; a list may not.
        """
        good = [name for name in names if layer_kind(self.modules[name]) in self.kinds]
        for name in names:
            module = self.modules[name]
            empty = next(module.parameters(), None) is None
            is_ignorable = regex and good and (empty or next(module.children(), None) is not None)
            if layer_kind(module) in self.kinds or is_ignorable:
                continue
            inside = sorted({n.rpartition(".")[2] for n in self._adaptable_names() if n.startswith(name + ".")})
            self.report(
                "target_modules",
                f"'{entry}' matches '{name}' ({type(module).__name__}), which {self.settings.method} cannot adapt",
                f"name the layers inside it: {', '.join(inside[:8])}" if inside else "remove it",
            )
            break
        return good

    def _adaptable_names(self) -> list[str]:
        return [name for name, module in self.modules.items() if layer_kind(module) in self.kinds]

    def _report_miss(self, key: str, entry: str) -> list[str]:
        """Report an entry without a match; returns no names."""
        fused = [name for name in self.fused if is_fused_in(entry, name)]
        if key == "target_parameters":
            what = f"'{entry}' matches no fused parameter of the base"
            self.report(key, what, self._nearest_of(entry, self.fused) or "the base has no fused parameters")
        elif fused:
            what = f"'{entry}' exists only inside the fused expert parameter '{fused[0]}'{_more(fused)}"
            how = "remove the entry"
            if self.method.parameter is not None:
                how = f"write target_parameters: [{'.'.join(fused[0].split('.')[-2:])}]"
            self.report(key, what, f"{self.settings.method} adapts layers; {how}")
        elif entry == ALL_LINEAR:
            self.report(
                key, f"'{ALL_LINEAR}' is not a module name", f"write target_modules: {ALL_LINEAR}, not in a list"
            )
        else:
            self.report(key, f"'{entry}' matches no module of the base", self._nearest(key, entry))
        return []

    def _nearest(self, key: str, entry: str) -> str:
        names = [name for name in self.modules if name] if key == "exclude_modules" else self._adaptable_names()
        last = sorted({name.rpartition(".")[2] for name in names})
        if entry in last:  # in a list it would match
            return f"a text is a pattern for the whole name of a module; write a list: [{entry}]"
        return self._nearest_of(entry, names) or f"its layers are {', '.join(last[:12])}"

    def _nearest_of(self, entry: str, names: Iterable[str]) -> str:
        """A question that suggests the names most similar to the entry, or all names if there are few. Empty if there
        are none."""
        known = sorted({ending for name in names for ending in endings(name) if ending.count(".") <= entry.count(".")})
        similar = difflib.get_close_matches(entry, known, n=3, cutoff=0.5) if len(entry) <= 200 else []
        similar = similar or (known if len(known) <= 3 else [])
        return f"did you mean {' or '.join(repr(name) for name in similar)}?" if similar else ""

    def _layer_target(self, name: str, pattern_name: str) -> Target:
        """The target for a layer. `pattern_name`: the name that is compared with rank and alpha patterns."""
        module = self.modules[name]
        weight, kind = weight_of(module), layer_kind(module)
        assert weight is not None
        assert kind is not None
        outputs, inputs = weight.shape if kind != "embedding" else weight.shape[::-1]
        bias = weight.bias is not None
        return self._with_size(
            Target(name, kind, inputs, outputs, 0, *self._rank_and_alpha(pattern_name), has_bias=bias)
        )

    def _parameter_target(self, name: str, chosen: Collection[str]) -> Target:
        owner, parameter = self.matrices[name]
        experts, outputs, inputs = fused_shape(owner, parameter)
        own_names = [attribute for attribute, _ in owner.named_parameters(recurse=False)]
        owner_name, _, attribute = name.rpartition(".")
        later = own_names[own_names.index(attribute) + 1 :]
        target = Target(
            *(name, "parameter", inputs, outputs, 0, *self._rank_and_alpha(name)),
            experts=experts,
            transposed=experts is not None and stored_transposed(owner),
            wrapped=sum(f"{owner_name}.{other}" in chosen for other in later),
        )
        return self._with_size(target)

    def _with_size(self, target: Target) -> Target:
        """The target with its number of trained parameters. A rank larger than the matrix is recorded as a problem."""
        kind = self.method.parameter if target.kind == "parameter" else self.method.layer
        assert kind is not None
        smallest, largest = sorted((target.in_features, target.out_features))
        if target.r is not None and target.r > (largest if self.file else smallest):
            self.too_large.append(target)
            return target
        return dataclasses.replace(target, trainable_parameters=slot_count(kind.slots(self.settings, target).values()))

    def report_large_ranks(self) -> None:
        """Report all ranks that are larger than their matrix as one problem, with the smallest matrix and a count."""
        if not self.too_large:
            return
        first = min(self.too_large, key=lambda target: (min(target.in_features, target.out_features), target.name))
        shape = f"({first.out_features} x {first.in_features})"
        what = f"rank {first.r} is too large for '{first.name}' {shape}{_more(self.too_large)}"
        last_name = first.name.rpartition(".")[2]
        smallest = min(first.in_features, first.out_features)
        how = f"use at most {smallest}, or exclude it with exclude_modules: [{last_name}]"
        self.report("r", what, how)

    def _rank_and_alpha(self, name: str) -> tuple[int | None, float | None]:
        r, alpha = getattr(self.settings, "r", None), getattr(self.settings, "alpha", None)
        return self._by_pattern("rank_pattern", name, r), self._by_pattern("alpha_pattern", name, alpha)

    def _by_pattern(self, key: str, name: str, default: Value | None) -> Value | None:
        """The value of the longest matching pattern, or the default. Names match as in PEFT, but PEFT takes the first
        match in the file.

        Matches with two different values are a problem in an adapter file. In a recipe they are a problem only if the
        patterns are equally long.
        """
        patterns: dict[str, Value] = getattr(self.settings, key, {})
        matching = sorted((p for p in patterns if self._patterns_of(key).matches_ending(p, name)), key=len)
        if not matching:
            return default
        longest = patterns[matching[-1]]
        rivals = [p for p in matching if self.file or len(p) == len(matching[-1])]
        for rival in rivals:
            if patterns[rival] != longest:
                text = f"'{rival}' and '{matching[-1]}' both match '{name}' with different values"
                self.report(key, text, "keep one of them")
                break
        return longest

    def check_patterns(self, names: Sequence[str]) -> None:
        """Report patterns of ranks and alphas that match no adapted layer."""
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.settings, key, {}) if not self.file else ():
                patterns = self._patterns_of(key)
                if not any(patterns.matches_ending(pattern, name) for name in names):
                    self.report(key, f"'{pattern}' matches no adapted layer", self._nearest(key, pattern))


def _more(items: Sequence[object]) -> str:
    """Text with the number of further items, for a message that names only the first item."""
    return f" and {len(items) - 1} more" if len(items) > 1 else ""
