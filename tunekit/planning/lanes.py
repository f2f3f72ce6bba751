"""Divides the trials of a sweep (lanes) into groups that share a loaded base (passes). Also predicts the memory of each
group and the time that sharing saves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.kernels.lane_products import obstacle_to_lanes
from tunekit.machine.memory import available_bytes
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.planning.memory import usable_bytes
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Choice, bytes_text
from tunekit.training.lane import Lane
from tunekit.tuned.twin import make_twin

# Costs of a product with a matrix, in tokens that a core multiplies in the same time: to unpack the matrix, and the
# minimum of a product. Measured on one core with AMX, for 2,048 x 5,632 in bfloat16: 16 ms to unpack NF4; 4.0, 5.1, 7.6
# and 17.6 ms for a product of 16, 128, 256 and 512 tokens.
UNPACK_TOKENS, LEAST_TOKENS = 500, 110
RECOMPUTED, RESIDENT = 3, 2  # products of a step: forward, gradient, and the recomputation
UNPACKED_TOGETHER = 2  # in the forward and in the backward pass
STATE_BYTES = 16  # of a trained number: float32 weight, gradient and two moments
WORTH = 1.25  # least estimated gain for which rows are joined, which changes the order of sums


@dataclass(frozen=True)
class LanePass:
    """Trials that use one loaded base, and their predicted peak memory. `together`: their steps run together; otherwise
    the trials run one after another. `joined`: the settings of one network that computes the rows of all trials; None:
    each trial computes its rows separately, for the reason `why_not`."""

    lanes: Sequence[Lane]
    peak_bytes: int
    together: bool = False
    joined: Choice | None = None
    gain: float = 1.0  # estimated time of a step of each lane alone, as a multiple of the time together
    why_not: str = ""

    def groups(self) -> list[list[Lane]]:
        """The groups of trials that train at the same time."""
        return [list(self.lanes)] if self.together else [[lane] for lane in self.lanes]


def make_passes(lanes: Sequence[Lane]) -> list[LanePass]:
    """Group all trials that have not ended by their base and by available memory. The groups are in the order of their
    first trial."""
    by_base: list[list[Lane]] = []
    for lane in [lane for lane in lanes if not lane.ended]:
        key = lane.base_key
        shared = [members for members in by_base if key is not None and members[0].base_key == key]
        shared[0].append(lane) if shared else by_base.append([lane])
    return [each for members in by_base for each in _divided(members)]


def _divided(members: Sequence[Lane]) -> list[LanePass]:
    """Divide trials that have the same base into groups: each group has as many trials as fit into memory together."""
    key, one_by_one = members[0].base_key, LanePass(members, max(map(_peak, members)))
    same_process = len({lane.process_settings for lane in members}) == 1
    if key is None or len(members) == 1 or not same_process or not all(lane.runs_together for lane in members):
        why = "the trials cannot share a loaded base" if same_process else "their threads or deterministic differ"
        return [replace(one_by_one, why_not=why)]
    streamed, base = key.streaming != "off", make_meta_model(key.section, device=members[0].session.devices.device)
    why_not = _why_not_joined(members, base, streamed)
    joins = not why_not
    if not streamed and not joins:
        return [replace(one_by_one, why_not=why_not)]
    packed = [packed_layers(layer) for _, layer in base.family.layers(base.net)]
    unpacked = max(sum(each.in_features * each.out_features for each in layer.values()) for layer in packed)
    groups: list[list[Lane]] = []
    for lane in members:
        peak = _peak_together([*groups[-1], lane] if groups else [lane], unpacked * base.dtype.itemsize, joins)
        groups[-1].append(lane) if groups and peak <= _limit(lane) else groups.append([lane])
    passes = [_pass(group, unpacked * base.dtype.itemsize, joins, streamed) for group in groups]
    return [replace(each, why_not=why_not) for each in passes]


def _pass(group: Sequence[Lane], unpacked_bytes: int, joins: bool, streamed: bool) -> LanePass:
    together = len(group) > 1
    plan = group[0].plan
    joined = plan.choice if joins and together and plan is not None else None
    peak = _peak_together(group, unpacked_bytes, joins)
    return LanePass(group, peak, together, joined, _gain(group, bool(unpacked_bytes), joins, streamed))


def _why_not_joined(lanes: Sequence[Lane], base: LoadedModel, streamed: bool) -> str:
    """Why the trials compute their rows separately; "" if one network computes the rows of all of them, so that they
    share matrix products. The recipe decides; with `auto`, this is done only if it is clearly faster."""
    setting = lanes[0].joined
    if setting is False:
        return "sweep.joined is false"
    for lane in lanes:
        if obstacle := _obstacle(lane):
            return f"{lane.trial.name}: {obstacle}"
    if _drops(base.net):
        return "the base uses dropout in training"
    if setting == "auto":
        together = _gain(lanes, bool(packed_layers(base.net)), False, streamed) if streamed else 1.0
        joined = _gain(lanes, bool(packed_layers(base.net)), True, streamed)
        if lanes[0].session.devices.device.type != "cpu" or joined < WORTH * together:
            return "it would not be clearly faster"
    return "" if _fit(lanes, base) else "an adapted layer or the adapter's method cannot be joined"


def _obstacle(lane: Lane) -> str:
    """What prevents joining this trial with others; "" if nothing does."""
    assert lane.prepared is not None
    inputs, adapter = lane.prepared.largest_batch.inputs, lane.prepared.adapter
    one_sequence = inputs.keys() == {"input_ids", "position_ids"} and len(inputs["input_ids"]) == 1
    if not one_sequence:
        return "a micro-batch has padding, or is not one sequence of token ids"
    if adapter.trains_base:
        return "it trains the base"
    return "its adapter uses dropout" if getattr(adapter, "dropout", 0.0) else ""


def _drops(net: nn.Module) -> bool:
    """Whether the base uses dropout in training."""
    rates = [getattr(net.config, name, 0.0) for name in vars(net.config) if "dropout" in name or "pdrop" in name]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _fit(lanes: Sequence[Lane], base: LoadedModel) -> bool:
    """Whether every adapted layer of these trials can be joined. To check this, the adapters are attached to the base
    on the meta device."""
    head, different = base.family.head_name(base.net), list[AdapterSettings]()
    for lane in lanes:
        assert lane.prepared is not None
        if lane.prepared.adapter not in different:
            different.append(lane.prepared.adapter)
    for settings in different:
        twin = make_twin(base)
        adapter = attach_adapter(twin.net, settings, seed=0, head_name=head)
        layers = list(adapter.layers.values())
        whole = len(layers) != len(adapter.parts()) or head in adapter.layers
        if whole or obstacle_to_lanes(layers) is not None:
            return False
    return True


def _limit(lane: Lane) -> float:
    """The bytes that a group with this trial may use."""
    assert lane.plan is not None
    device = lane.session.devices.device
    return usable_bytes(device, lane.plan.budget_bytes, available_bytes(device))


def _peak(lane: Lane) -> int:
    return 0 if lane.plan is None else lane.plan.peak_bytes.total


def _peak_together(lanes: Sequence[Lane], unpacked_bytes: int, joins: bool) -> int:
    """Peak memory of trials that run together: the peak of the largest trial, the memory that each other trial adds,
    and one unpacked layer. If `joins`, also the activations of each other trial in one layer."""
    if len(lanes) == 1:
        return _peak(lanes[0])
    largest = max(lanes, key=_peak)
    return _peak(largest) + unpacked_bytes + sum(_added_bytes(lane, joins) for lane in lanes if lane is not largest)


def _added_bytes(lane: Lane, joins: bool) -> int:
    """The memory that one more trial adds: its adapter, gradient, optimizer moments and the inputs of all layers. If
    `joins`, also its activations in one layer."""
    assert lane.plan is not None
    assert lane.prepared is not None
    facts, choice, activations = lane.plan.model, lane.plan.choice, lane.plan.peak_bytes.activations
    tokens = lane.prepared.largest_batch.padded * choice.pass_micro_batches
    inputs = facts.layers * tokens * facts.hidden_size * (4 if facts.dtype == "float32" else 2)
    of_layer = max(activations - inputs, 0) if choice.streaming != "off" else activations // max(facts.layers, 1)
    return lane.plan.trainable_parameters * STATE_BYTES + inputs + (of_layer if joins else 0)


def _gain(lanes: Sequence[Lane], packed: bool, joins: bool, streamed: bool) -> float:
    """How many times faster steps are if the trials run together, estimated from the cost of their matrix products."""
    unpack, count = UNPACK_TOKENS if packed else 0, len(lanes)
    tokens = [lane.prepared.largest_batch.padded for lane in lanes if lane.prepared is not None]
    separate = sum(max(each, LEAST_TOKENS) for each in tokens)
    products = RECOMPUTED if streamed else RESIDENT
    rows = max(sum(tokens), LEAST_TOKENS) if joins else separate
    return products * (unpack * count + separate) / (UNPACKED_TOGETHER * unpack + RECOMPUTED * rows)


def count_bases(passes: Sequence[LanePass]) -> int:
    """How many times a base is loaded for these groups of trials."""
    keys = [each.lanes[0].base_key for each in passes]
    return keys.count(None) + len(set(keys) - {None})


def pass_notes(passes: Sequence[LanePass]) -> list[str]:
    """A note for each group of trials that run together: why this saves time, and how much. If their rows are joined,
    each plan also gets a note."""
    notes = []
    for each in passes:
        if each.lanes[0].joined is True and each.joined is None and len(each.lanes) > 1:
            notes.append(f"sweep.joined: true has no effect on {len(each.lanes)} trials; {each.why_not}")
        if not each.together:
            continue
        count, alone = len(each.lanes), max(map(_peak, each.lanes))
        why = "each layer of the streamed base is loaded and unpacked once for all trials"
        result = "the results are equal to those of separate runs, bit for bit"
        if each.joined is not None:
            why = "their rows are joined, so each product with the base is computed once for all trials"
            result = (
                "the results equal those of separate runs except for rounding; for equal bits, set sweep.joined: false"
            )
        gain = f"; together, a step is about {each.gain:.1f} times as fast as {count} separate steps (a rough estimate)"
        memory = f"predicted peak {bytes_text(each.peak_bytes)}, or {bytes_text(alone)} for a single trial"
        notes.append(f"{count} trials run together: {why}{gain if each.gain >= 1.05 else ''}; {memory}; {result}")
        for lane in each.lanes if each.joined is not None else ():
            assert lane.plan is not None
            lane.plan = replace(
                lane.plan,
                notes=[
                    *lane.plan.notes,
                    f"the rows of this run are joined with other trials of a sweep, {count} in all",
                ],
            )
    return notes
