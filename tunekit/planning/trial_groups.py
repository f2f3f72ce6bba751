"""Divides the trials of a sweep into groups that share a loaded base. Also predicts the memory of each
group and the time that sharing saves."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunekit.machine.memory import available_bytes
from tunekit.model.load import make_meta_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.planning.memory import usable_bytes
from tunekit.records import bytes_text
from tunekit.training.trials import Trial

# Costs of a product with a matrix, in tokens that a core multiplies in the same time: to unpack the matrix, and the
# minimum of a product. Measured on one core with AMX, for 2,048 x 5,632 in bfloat16: 16 ms to unpack NF4; 4.0, 5.1, 7.6
# and 17.6 ms for a product of 16, 128, 256 and 512 tokens.
UNPACK_TOKENS, LEAST_TOKENS = 500, 110
PRODUCTS = 3  # of a matrix in a step: forward, recomputation and gradient
UNPACKED_TOGETHER = 2  # in the forward and in the backward pass
STATE_BYTES = 16  # of a trained number: float32 weight, gradient and two moments


@dataclass(frozen=True)
class TrialGroup:
    """Trials that use one loaded base, and their predicted peak memory. `together`: their steps run together, because
    the base is streamed; otherwise the trials run one after another."""

    trials: Sequence[Trial]
    peak_bytes: int
    together: bool = False
    gain: float = 1.0  # estimated time of a step of each trial alone, as a multiple of the time together

    def groups(self) -> list[list[Trial]]:
        """The groups of trials that train at the same time."""
        return [list(self.trials)] if self.together else [[trial] for trial in self.trials]


def group_trials(trials: Sequence[Trial]) -> list[TrialGroup]:
    """Group all trials that have not ended by their base and by available memory. The groups are in the order of their
    first trial."""
    by_base: list[list[Trial]] = []
    for trial in [trial for trial in trials if not trial.ended]:
        key = trial.base_key
        shared = [members for members in by_base if key is not None and members[0].base_key == key]
        shared[0].append(trial) if shared else by_base.append([trial])
    return [each for members in by_base for each in _divided(members)]


def _divided(members: Sequence[Trial]) -> list[TrialGroup]:
    """Divide trials that have the same base into groups: each group has as many trials as fit into memory together."""
    key, same_process = members[0].base_key, len({trial.process_settings for trial in members}) == 1
    if key is None or key.streaming == "off" or len(members) == 1 or not same_process:
        return [TrialGroup(members, max(map(_peak, members)))]
    base = make_meta_model(key.section, device=members[0].session.devices.device)
    packed = [packed_layers(layer) for _, layer in base.family.layers(base.net)]
    unpacked = max(sum(each.in_features * each.out_features for each in layer.values()) for layer in packed)
    unpacked_bytes = unpacked * base.dtype.itemsize
    groups: list[list[Trial]] = []
    for trial in members:
        peak = _peak_together([*groups[-1], trial] if groups else [trial], unpacked_bytes)
        groups[-1].append(trial) if groups and peak <= _limit(trial) else groups.append([trial])
    return [
        TrialGroup(group, _peak_together(group, unpacked_bytes), len(group) > 1, _gain(group, unpacked > 0))
        for group in groups
    ]


def _limit(trial: Trial) -> float:
    """The bytes that a group with this trial may use."""
    assert trial.plan is not None
    device = trial.session.devices.device
    return usable_bytes(device, trial.plan.budget_bytes, available_bytes(device))


def _peak(trial: Trial) -> int:
    return 0 if trial.plan is None else trial.plan.peak_bytes.total


def _peak_together(trials: Sequence[Trial], unpacked_bytes: int) -> int:
    """Peak memory of trials that run together: the peak of the largest trial, the memory that each other trial adds,
    and one unpacked layer."""
    if len(trials) == 1:
        return _peak(trials[0])
    largest = max(trials, key=_peak)
    return _peak(largest) + unpacked_bytes + sum(_added_bytes(trial) for trial in trials if trial is not largest)


def _added_bytes(trial: Trial) -> int:
    """The memory that one more trial adds: its adapter, gradient, optimizer moments and the inputs of all layers."""
    assert trial.plan is not None
    assert trial.planned is not None
    facts = trial.plan.model
    tokens = trial.planned.largest_batch.padded * trial.plan.choice.pass_micro_batches
    inputs = facts.layers * tokens * facts.hidden_size * (4 if facts.dtype == "float32" else 2)
    return trial.plan.trainable_parameters * STATE_BYTES + inputs


def _gain(trials: Sequence[Trial], packed: bool) -> float:
    """How many times faster steps are if the trials run together, estimated from the cost of their matrix products."""
    unpack, count = UNPACK_TOKENS if packed else 0, len(trials)
    tokens = [trial.planned.largest_batch.padded for trial in trials if trial.planned is not None]
    products = PRODUCTS * sum(max(each, LEAST_TOKENS) for each in tokens)
    return (PRODUCTS * unpack * count + products) / (UNPACKED_TOGETHER * unpack + products)


def count_bases(groups: Sequence[TrialGroup]) -> int:
    """How many times a base is loaded for these groups of trials."""
    keys = [each.trials[0].base_key for each in groups]
    return keys.count(None) + len(set(keys) - {None})


def group_notes(groups: Sequence[TrialGroup]) -> list[str]:
    """A note for each group of trials that run together: why this saves time, and how much."""
    notes = []
    for each in groups:
        if not each.together:
            continue
        count, alone = len(each.trials), max(map(_peak, each.trials))
        why = "each layer of the streamed base is loaded and unpacked once for all trials"
        gain = f"; together, a step is about {each.gain:.1f} times as fast as {count} separate steps (a rough estimate)"
        memory = f"predicted peak {bytes_text(each.peak_bytes)}, or {bytes_text(alone)} for a single trial"
        result = "the results are equal to those of separate runs, bit for bit"
        notes.append(f"{count} trials run together: {why}{gain if each.gain >= 1.05 else ''}; {memory}; {result}")
    return notes
