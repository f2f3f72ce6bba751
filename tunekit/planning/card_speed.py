"""Estimates how fast a card would train, from its data sheet. For `tunekit plan --card`."""

from tunekit.machine.cards import Card
from tunekit.planning.execution import RECOMPUTED
from tunekit.records import Plan

# The share of a card's published TFLOP/s that the products of training reach. The fastest published figure for LoRA on
# an 8B model and one H100 (NeMo AutoModel: 12,473 tokens a second) is 43 % of 989 TFLOP/s.
REACHED = 0.4
KERNELS = 222  # that forward and backward of a layer with LoRA start, as operator traces count them
LAUNCH_SECONDS = 5e-6  # that the host usually needs to start a kernel
FLOPS = 4  # per weight and token: forward, and the gradients of the inputs
FLOPS_OF_FULL = 6  # also the gradients of the weights


def speed_note(plan: Plan, name: str, card: Card) -> str | None:
    """A sentence with the tokens per second of a run on this card, and what the estimate assumes. A micro-batch lasts
    as long as the slowest of: its products, reading the weights in each pass, and starting its kernels. Attention
    scores and the work between the products are left out.

    None if weights are streamed, whose speed other notes limit; if not every weight computes every token; and for rows
    that are streamed.
    """
    experts = any(target.experts for target in plan.targets)
    micro_batches = plan.rows.micro_batches_per_epoch
    if plan.text is None or plan.choice.streaming != "off" or experts or not micro_batches:
        return None
    recomputed = plan.choice.checkpointed_layers / max(plan.model.layers, 1)
    flops = FLOPS_OF_FULL if plan.recipe["adapter"]["method"] == "full" else FLOPS
    flops_of_token = plan.total_parameters * flops * (1 + recomputed * RECOMPUTED)
    tokens = plan.rows.training.tokens / micro_batches
    times = {
        "computing products": tokens * flops_of_token / (REACHED * card.tflops * 1e12),
        "reading the weights": (2 + recomputed) * plan.peak_bytes.weights / (card.bandwidth * 1e9),
        "starting kernels": plan.model.layers * KERNELS * LAUNCH_SECONDS,
    }
    slowest = max(times, key=lambda part: times[part])
    return (
        f"{name}: about {tokens / times[slowest]:,.0f} tokens a second, an estimate that was not measured on a card; "
        f"{slowest} takes the most time ({REACHED:.0%} of {card.tflops:g} TFLOP/s, {card.bandwidth:,} GB/s, "
        f"{LAUNCH_SECONDS * 1e6:g} microseconds a kernel)"
    )
