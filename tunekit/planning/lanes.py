"""Divides the trials of a sweep (lanes) into groups that share a loaded base (passes). Also predicts the memory of each
group and the time that sharing saves."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunekit.machine.memory import available_bytes
from tunekit.model.load import make_meta_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.planning.memory import usable_bytes
from tunekit.records import bytes_text
from tunekit.training.lane import Lane

# Costs of a product with a matrix, in tokens that a core multiplies in the same time: to unpack the matrix, and the
# minimum of a product. Measured on one core with AMX, for 2,048 x 5,632 in bfloat16: 16 ms to unpack NF4; 4.0, 5.1, 7.6
# and 17.6 ms for a product of 16, 128, 256 and 512 tokens.
UNPACK_TOKENS, LEAST_TOKENS = 500, 110
PRODUCTS = 3  # of a matrix in a step: forward, recomputation and gradient
UNPACKED_TOGETHER = 2  # in the forward and in the backward pass
STATE_BYTES = 16  # of a trained number: float32 weight, gradient and two moments


@dataclass(frozen=True)
class LanePass:
    """Trials that use one loaded base, and their predicted peak memory. `together`: their steps run together, because
    the base is streamed; otherwise the trials run one after another."""

    lanes: Sequence[Lane]
    peak_bytes: int
    together: bool = False
    gain: float = 1.0  # estimated time of a step of each lane alone, as a multiple of the time together

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
    key, same_process = members[0].base_key, len({lane.process_settings for lane in members}) == 1
    if key is None or key.streaming == "off" or len(members) == 1 or not same_process:
        return [LanePass(members, max(map(_peak, members)))]
    base = make_meta_model(key.section, device=members[0].session.devices.device)
    packed = [packed_layers(layer) for _, layer in base.family.layers(base.net)]
    unpacked = max(sum(each.in_features * each.out_features for each in layer.values()) for layer in packed)
    unpacked_bytes = unpacked * base.dtype.itemsize
    groups: list[list[Lane]] = []
    for lane in members:
        peak = _peak_together([*groups[-1], lane] if groups else [lane], unpacked_bytes)
        groups[-1].append(lane) if groups and peak <= _limit(lane) else groups.append([lane])
    return [
        LanePass(group, _peak_together(group, unpacked_bytes), len(group) > 1, _gain(group, unpacked > 0))
        for group in groups
    ]


def _limit(lane: Lane) -> float:
    """The bytes that a group with this trial may use."""
    assert lane.plan is not None
    device = lane.session.devices.device
    return usable_bytes(device, lane.plan.budget_bytes, available_bytes(device))


def _peak(lane: Lane) -> int:
    return 0 if lane.plan is None else lane.plan.peak_bytes.total


def _peak_together(lanes: Sequence[Lane], unpacked_bytes: int) -> int:
    """Peak memory of trials that run together: the peak of the largest trial, the memory that each other trial adds,
    and one unpacked layer."""
    if len(lanes) == 1:
        return _peak(lanes[0])
    largest = max(lanes, key=_peak)
    return _peak(largest) + unpacked_bytes + sum(_added_bytes(lane) for lane in lanes if lane is not largest)


def _added_bytes(lane: Lane) -> int:
    """The memory that one more trial adds: its adapter, gradient, optimizer moments and the inputs of all layers."""
    assert lane.plan is not None
    assert lane.planned is not None
    facts = lane.plan.model
    tokens = lane.planned.largest_batch.padded * lane.plan.choice.pass_micro_batches
    inputs = facts.layers * tokens * facts.hidden_size * (4 if facts.dtype == "float32" else 2)
    return lane.plan.trainable_parameters * STATE_BYTES + inputs


def _gain(lanes: Sequence[Lane], packed: bool) -> float:
    """How many times faster steps are if the trials run together, estimated from the cost of their matrix products."""
    unpack, count = UNPACK_TOKENS if packed else 0, len(lanes)
    tokens = [lane.planned.largest_batch.padded for lane in lanes if lane.planned is not None]
    products = PRODUCTS * sum(max(each, LEAST_TOKENS) for each in tokens)
    return (PRODUCTS * unpack * count + products) / (UNPACKED_TOGETHER * unpack + products)


def count_bases(passes: Sequence[LanePass]) -> int:
    """How many times a base is loaded for these groups of trials."""
    keys = [each.lanes[0].base_key for each in passes]
    return keys.count(None) + len(set(keys) - {None})


def pass_notes(passes: Sequence[LanePass]) -> list[str]:
    """A note for each group of trials that run together: why this saves time, and how much."""
    notes = []
    for each in passes:
        if not each.together:
            continue
        count, alone = len(each.lanes), max(map(_peak, each.lanes))
        why = "each layer of the streamed base is loaded and unpacked once for all trials"
        gain = f"; together, a step is about {each.gain:.1f} times as fast as {count} separate steps (a rough estimate)"
        memory = f"predicted peak {bytes_text(each.peak_bytes)}, or {bytes_text(alone)} for a single trial"
        result = "the results are equal to those of separate runs, bit for bit"
        notes.append(f"{count} trials run together: {why}{gain if each.gain >= 1.05 else ''}; {memory}; {result}")
    return notes
