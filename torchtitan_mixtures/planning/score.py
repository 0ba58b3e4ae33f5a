"""What a layout needs and costs by formula, from a few plans of the same job in plain layouts.

The plans are of FSDP over all ranks with each kind of checkpointing, of twice the batch, and of two
ranks of tensor and of context parallelism (`probes.py`). Whatever a microbatch needs is taken to be

    fixed * cut + copied + rows * (whole + divided / tensor + gathered) / context

where `fixed` are weights, of which ranks of tensor parallelism hold the share `cut` each, `whole`
is what all of them do, `divided` is what they share, and `copied` and `gathered` are there with
tensor parallelism only. Twice the batch tells what is fixed from the rest. Two ranks of tensor
parallelism tell from `divided` what is `whole` (FLOPs, and bytes of matrix products, whose inputs
or sums are whole) or `gathered` (all else).

What the formula neglects:

- Parts of a model that its layout does not cut (norms, buffers of positions), and layers that
  cannot be dealt out evenly.
- That the peak of another batch may be in another place of a step: the peak is extended from where
  it was. It is too high where gradients come up while activations go.
- Of pipelines the gradients inside a block, and more of the head than its matrix product. Traffic
  and optimizer are those of the rank that needs most memory.
- Copies that context parallelism makes of what it exchanges, and keeps under selective
  checkpointing.
- The rounding of shards, and what eager operators copy to make them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torchtitan_mixtures.planning.candidates import Candidate, Layout
from torchtitan_mixtures.planning.step import Memory, Plan

Quantity = Callable[[Plan], float]


def transient(plan: Plan) -> int:
    """What lives at the peak beside the state and what the forward pass left."""
    memory = plan.memory
    state = memory.parameters + memory.optimizer_state + memory.other_state
    return max(0, memory.peak - state - memory.activations)


def activations(plan: Plan) -> int:
    """What the forward pass left."""
    return plan.memory.activations


def flops(plan: Plan) -> int:
    """What is computed."""
    return plan.flops


def product_bytes(plan: Plan) -> int:
    """What matrix products read and write."""
    return plan.product_bytes


class Law(NamedTuple):
    """How a quantity of one microbatch depends on the layout; see the module's docstring."""

    fixed: float
    copied: float
    whole: float
    divided: float
    gathered: float

    def at(self, rows: int, layout: Layout, cut: float) -> float:
        """Give the quantity of a microbatch of so many rows."""
        of_a_row = self.whole + self.divided / layout.tensor
        copied = 0.0
        if layout.tensor > 1:
            of_a_row, copied = of_a_row + self.gathered, self.copied
        return self.fixed * cut + copied + rows * of_a_row / layout.context


@dataclass(frozen=True)
class Trunk:
    """What a pipeline cuts: blocks with an embedding before them and a head after them.

    Attributes:
        layers: Number of blocks.
        stream: Bytes of what goes from block to block, of a sample.
        embedding: Bytes of the parameters of the embedding, as many as of the head.
        logits: Bytes of the head's output, of a sample.
        head_flops: Of the head, forward and backward, of a sample.
    """

    layers: int
    stream: int
    embedding: int
    logits: int
    head_flops: int


@dataclass(frozen=True)
class Probes:
    """Plans that formulas are taken from, all of one microbatch of `rows` samples a rank.

    Attributes:
        rows: See there.
        base: Kind of checkpointing -> plan with FSDP over all ranks.
        double: Under full checkpointing, `2 * rows` samples.
        tensor: Kind of checkpointing -> plan with two ranks of tensor parallelism; empty if the
            family has none.
        tensor_double: As `double`, with two ranks of tensor parallelism.
        context: Without checkpointing, two ranks of context parallelism; None: none is considered.
        trunk: None: the family has no pipelines.
        parameter_bytes: Of one parameter as it is kept.
        gathered_bytes: Of one parameter as FSDP gathers it.
        reduced_bytes: Of its gradient as FSDP sums it.
        has_average: Whether an average of the parameters is kept.
    """

    rows: int
    base: Mapping[str, Plan]
    double: Plan
    tensor: Mapping[str, Plan]
    tensor_double: Plan | None
    context: Plan | None
    trunk: Trunk | None
    parameter_bytes: int
    gathered_bytes: int
    reduced_bytes: int
    has_average: bool

    def cut(self, tensor: int) -> float:
        """Share of the parameters that one of so many ranks of tensor parallelism holds."""
        if tensor == 1:
            return 1.0
        base, halved = (plans["full"] for plans in (self.base, self.tensor))
        # FSDP has half as many ranks there, so ranks hold the same of what is cut, and twice that
        # of what is not.
        whole = min(max(0.0, halved.memory.parameters / base.memory.parameters - 1), 1.0)
        return whole + (1 - whole) / tensor

    def law(self, mode: str, quantity: Quantity) -> Law:
        """Work out the law of a quantity under a kind of checkpointing."""
        base = quantity(self.base[mode])
        fixed = min(self._fixed(mode, quantity, self.base["full"], self.double), base)
        rest = base - fixed
        copied, whole, gathered = 0.0, 0.0, 0.0
        if self.tensor_double is not None:
            half = quantity(self.tensor[mode])
            of_half = self._fixed(mode, quantity, self.tensor["full"], self.tensor_double)
            copied = max(0.0, min(of_half, half) - fixed * self.cut(2))
            # What two ranks have beside half of all: copies, or the other half of what is whole.
            gathered = max(0.0, half - copied - fixed * self.cut(2) - rest / 2)
            if quantity in (flops, product_bytes):
                whole, gathered = min(2 * gathered, rest), 0.0
        rows = self.rows
        return Law(fixed, copied, whole / rows, (rest - whole) / rows, gathered / rows)

    def _fixed(self, mode: str, quantity: Quantity, once: Plan, twice: Plan) -> float:
        """Tell what does not depend on the batch, from one batch and twice that.

        The latter is fixed + 2 * rest, so that 2 * (fixed + rest) less it is what is fixed.
        """
        fixed = max(0.0, 2 * quantity(once) - quantity(twice))
        if quantity is product_bytes:
            # Weights are read as often as they are multiplied with.
            fixed *= self.base[mode].flops / self.base["full"].flops
        return fixed


def predict(probes: Probes, candidate: Candidate) -> Plan:
    """Plan a step by formula.

    Args:
        probes: Plans of the same job.
        candidate: What is to be planned.

    Returns:
        The plan of the rank that needs most; collectives are not counted.
    """
    layout, mode, base = candidate.layout, candidate.mode, probes.base[candidate.mode]
    if layout.pipeline > 1:
        ranks = _pipeline(probes, candidate)
        memory = max((memory for memory, _ in ranks), key=lambda memory: memory.peak)
        share = max(share for _, share in ranks)
        of_a_round, rows = candidate.rows, 1
    else:
        memory, share = _memory(probes, candidate), 1.0
        of_a_round, rows = 1, candidate.rows
    microbatches = candidate.rounds * of_a_round

    def total(quantity: Quantity) -> int:
        of_one = probes.law(mode, quantity).at(rows, layout, probes.cut(layout.tensor))
        return round(of_one * share * microbatches)

    samples = candidate.rows * candidate.rounds * layout.readers
    return dataclasses.replace(
        base,
        degrees=layout.degrees,
        memory=memory,
        samples=samples,
        tokens=base.tokens // base.samples * samples,
        microbatches=microbatches,
        flops=total(flops),
        product_bytes=total(product_bytes),
        other_bytes=total(lambda plan: plan.other_bytes),
        optimizer_bytes=round(base.optimizer_bytes * memory.parameters / base.memory.parameters),
        sent=_traffic(probes, candidate, memory),
        calls={},
        bubble=bubble(candidate),
    )


def bubble(candidate: Candidate) -> float:
    """Share of the time in which a rank of a pipeline waits.

    To fill and to empty it takes a microbatch of one stage for each of the other ranks, where all
    take as many as they have microbatches and stages.
    """
    layout = candidate.layout
    others = layout.pipeline - 1
    return others / (layout.stages * candidate.rows + others)


def _held(probes: Probes) -> int:
    """Bytes of all parameters."""
    return probes.base["full"].memory.parameters * probes.base["full"].world_size


def _state(probes: Probes, parameters: float) -> Memory:
    """Scale what goes with parameters: gradients, moments, the average; buffers are whole."""
    base = probes.base["full"].memory
    share = parameters / base.parameters
    average = base.parameters if probes.has_average else 0
    return Memory(
        parameters=round(parameters),
        gradients=round(base.gradients * share),
        optimizer_state=round(base.optimizer_state * share),
        other_state=round(base.other_state + average * (share - 1)),
        activations=0,
        peak=0,
    )


def _memory(probes: Probes, candidate: Candidate) -> Memory:
    layout, mode, rows = candidate.layout, candidate.mode, candidate.rows
    cut = probes.cut(layout.tensor)
    state = _state(probes, _held(probes) * cut / layout.holders)
    kept = probes.law(mode, activations).at(rows, layout, cut)
    beside = probes.law(mode, transient).at(rows, layout, cut)
    return _with_peak(state, kept, beside, candidate.rounds)


def _with_peak(state: Memory, kept: float, beside: float, rounds: int) -> Memory:
    """Complete a state. Gradients are there from the second round on, and in the end anyhow."""
    other = state.parameters + state.optimizer_state + state.other_state
    earlier = state.gradients if rounds > 1 else 0
    peak = other + max(earlier + kept + beside, state.gradients)
    return dataclasses.replace(state, activations=round(kept), peak=round(peak))


def _pipeline(probes: Probes, candidate: Candidate) -> list[tuple[Memory, float]]:
    """Give the memory of each rank of a pipeline, and its share of the work."""
    layout, mode, trunk = candidate.layout, candidate.mode, probes.trunk
    assert trunk is not None
    full = probes.law("full", activations)
    # Full checkpointing keeps what goes into blocks; what it keeps beside is of the head.
    head = max(0.0, full.divided - trunk.layers * trunk.stream)

    def of_blocks(mode: str) -> float:
        law = probes.law(mode, activations)
        return Law(0.0, 0.0, 0.0, max(0.0, law.divided - head), law.gathered).at(1, layout, 0.0)

    of_all, again = of_blocks(mode), of_blocks("none") - of_blocks(mode)
    # Without a pipeline the logits are given up before the backward pass, stages keep them.
    head = (head + trunk.logits) / layout.tensor / layout.context
    work = probes.law(mode, flops)
    of_head = trunk.head_flops / (work.whole + work.divided)
    ranks = []
    for rank, layers in enumerate(layers_of_ranks(layout, trunk.layers)):
        is_last = rank == layout.pipeline - 1
        ends = (rank == 0) + is_last
        share = layers / trunk.layers
        held = (_held(probes) - 2 * trunk.embedding) * share + ends * trunk.embedding
        held *= probes.cut(layout.tensor)
        kept = in_flight(candidate, rank) * of_all * share
        # There is a buffer for each microbatch that a stage receives, and each gradient.
        received = candidate.rows * (2 * layout.stages - ends)
        kept += received * trunk.stream / layout.context
        # Weights stay gathered, and gradients whole, until all microbatches have passed.
        size = probes.gathered_bytes + probes.reduced_bytes
        kept += (layout.holders > 1) * held * size / probes.parameter_bytes
        beside = again / trunk.layers  # blocks are computed again one by one
        if is_last:
            kept += head
            loss = probes.law(mode, transient).at(1, layout, probes.cut(layout.tensor))
            beside = max(beside, loss)
        state = _state(probes, held / layout.holders)
        memory = _with_peak(state, kept + beside, 0.0, candidate.rounds)
        ranks.append((memory, (1 - of_head) * share + of_head * is_last))
    return ranks


def layers_of_ranks(layout: Layout, layers: int) -> list[int]:
    """Blocks of each rank of a pipeline.

    TorchTitan deals out embedding and head as one block each, and the rest to the first stages.
    """
    stages = layout.pipeline * layout.stages
    least, more = divmod(layers + 2, stages)
    sizes = [least + (stage < more) for stage in range(stages)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return [sum(sizes[rank :: layout.pipeline]) for rank in range(layout.pipeline)]


def deciding_ranks(probes: Probes, candidate: Candidate) -> list[int]:
    """Say which ranks must be planned to know a layout: that which needs most, the busiest."""
    if candidate.layout.pipeline == 1:
        return [0]
    ranks = _pipeline(probes, candidate)
    indices = range(len(ranks))
    heaviest = max(indices, key=lambda rank: ranks[rank][0].peak)
    busiest = max(indices, key=lambda rank: ranks[rank][1])
    # TorchTitan numbers the ranks of a stage one after the other.
    of_a_stage = candidate.layout.readers * candidate.layout.tensor * candidate.layout.context
    return [rank * of_a_stage for rank in dict.fromkeys((heaviest, busiest))]


def in_flight(candidate: Candidate, rank: int) -> float:
    """Microbatches whose activations a rank of a pipeline holds at once, of all its stages.

    1F1B runs as many forward as there are ranks from this one on before the first comes back. With
    several stages it runs all but the last for a microbatch a rank, and each rank before it waits
    for two more.
    """
    layout, stages = candidate.layout, candidate.layout.stages
    after = layout.pipeline - 1 - rank
    if stages == 1:
        return min(candidate.rows, after + 1)
    ahead = (stages - 1) * layout.pipeline + 2 * after + 1
    return min(candidate.rows * stages, ahead) / stages


def _traffic(probes: Probes, candidate: Candidate, memory: Memory) -> dict[str, int]:
    """Bytes of a step by dimension; a ring of n ranks moves (n - 1) / n of a tensor."""
    layout, rounds = candidate.layout, candidate.rounds
    sent: dict[str, float] = {}
    ring = (layout.holders - 1) / layout.holders
    if layout.pipeline > 1:
        # Gathered once, summed once in each round.
        each = probes.gathered_bytes + probes.reduced_bytes
        whole = memory.parameters * layout.holders / probes.parameter_bytes
        sent["fsdp"] = rounds * whole * each * ring
    elif layout.holders > 1:
        base = probes.base[candidate.mode]
        whole = base.sent["fsdp"] * base.world_size / (base.world_size - 1)
        sent["fsdp"] = rounds * whole * probes.cut(layout.tensor) * ring
    if layout.replicas > 1:
        # An all-reduce is a reduce-scatter and an all-gather.
        gradients = memory.gradients * probes.reduced_bytes / probes.parameter_bytes
        sent["dp_replicate"] = rounds * gradients * 2 * (layout.replicas - 1) / layout.replicas
    rows = rounds * candidate.rows / layout.pipeline
    if layout.tensor > 1:
        assert probes.tensor_double is not None
        once, twice = (plan.sent["tp"] for plan in (probes.tensor["full"], probes.tensor_double))
        # Gradients of what is not cut are summed whatever the batch.
        fixed = max(0, 2 * once - twice)
        of_a_row = (probes.tensor[candidate.mode].sent["tp"] - fixed) / probes.rows / layout.context
        # Two ranks move half of every tensor.
        moved = 2 * (layout.tensor - 1) / layout.tensor
        sent["tp"] = moved * (rounds * fixed + rows * of_a_row)
    if layout.context > 1:
        assert probes.context is not None
        # Ranks keep a part of their part, and send the rest: two ranks send a quarter.
        whole = 4 * probes.context.sent["cp"] / probes.rows / layout.tensor
        again = 1.5 if candidate.mode == "full" else 1.0  # forward, backward, and forward again
        sent["cp"] = again * rows * whole * (layout.context - 1) / layout.context**2
    if layout.pipeline > 1:
        assert probes.trunk is not None
        # A rank sends each microbatch on, and its gradient back, for each of its stages; at an end
        # of the pipeline there is one thing less to send, and two ranks are both at an end.
        stream = probes.trunk.stream / layout.context
        times = 2 * layout.stages - (layout.pipeline == 2)
        sent["pp"] = rounds * candidate.rows * stream * times
    return {name: round(number) for name, number in sent.items()}
