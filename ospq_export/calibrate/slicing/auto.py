"""`slicing = "auto"`: the granularity is chosen by trial reconstructions (our reading of the paper's Algorithm 1).

The paper says that its algorithm determines the granularity per model and then optimises. How is not known here, so all of
this is ours: candidates are the ladder of uniform granularities and one slicing that avoids outlier-ridden cuts. The
activation scales are refined once, block by block; from there each candidate is reconstructed on a part of the calibration
images and judged on the rest by the total variation between the softened class probabilities of the float and of the quantized
network. The best is taken. The run then starts from the searched ranges, as if nothing had been tried: started from the scales
that a trial learned, it ended lower. Trials are long before they are many: in short ones fine slices are ahead of those that
would overtake them later (docs/granularity.md has the measurements).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ospq_export.calibrate.cost import step_bytes
from ospq_export.calibrate.slicing.plan import Candidate, Plan, candidates_of, plan
from ospq_export.calibrate.slicing.trials import Trials
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Recipe
from ospq_export.runs.manifest import CandidateRecord, SlicingRecord
from ospq_export.tasks.base import Task
from ospq_export.tasks.classify import CLASSIFY
from ospq_export.world.memory import total_memory

log = logging.getLogger(__name__)


def choose_slicing(
    network: QuantizedGraph,
    graph: fx.Graph,
    recipe: Recipe,
    images: Tensor,
    dominances: Mapping[str, float],
    device: torch.device,
    seed: int,
    advance_of: Callable[[int], Callable[[], None]] = lambda _steps: lambda: None,
    say: Callable[[str], None] = log.info,
    task: Task = CLASSIFY,
) -> tuple[list[Slice], SlicingRecord]:
    """Choose the reconstruction granularity by trial; deterministic for a seed.

    Candidates with a slice too large for the device are left out. Where half of the images are too few to judge trials on, or the
    budget carries no two trials, the first candidate is taken untried.

    Args:
        network: observed; afterwards as it was before.
        graph: captured, without quantizers.
        recipe: its pilot settings bound the cost.
        images: float32 (N, C, H, W), normalised.
        dominances: of outliers at the cut points, by name; from the profile.
        device: where the network lies.
        seed: of every trial.
        advance_of: given the number of steps, returns what advances a progress bar by one.
        say: told beforehand, in a line, what will be tried and what it costs, or why nothing is.
        task: what the network's output is.
    """
    fitting = _fitting(candidates_of(graph, dominances), graph, recipe.reconstruction.batch_size, device)
    chosen = plan(recipe, len(images), fitting)
    say(chosen.summary(recipe, len(images)))
    if len(chosen.candidates) == 1:
        winner, records, held = chosen.candidates[0], [_record(chosen.candidates[0])], 0
    else:
        advance, block, observed = advance_of(chosen.steps), slicing_of(graph, "block"), network.state()
        trials = Trials(network, block, chosen.candidates, recipe, images, device, seed, advance, task)
        winner, records = _best(trials, chosen)
        network.load_state(observed)
        held = len(trials.judge)
    record = SlicingRecord(
        choice=winner.name, share=chosen.share, held_out=held, candidates=records, dominance=dict(dominances)
    )
    return winner.slices, record


def _best(trials: Trials, plan: Plan) -> tuple[Candidate, list[CandidateRecord]]:
    scores = [trials.run(c, plan.iterations, plan.batch_size) for c in plan.candidates]
    winner = plan.candidates[scores.index(min(scores))]
    return winner, [_record(c, score) for c, score in zip(plan.candidates, scores, strict=True)]


def _record(candidate: Candidate, *scores: float) -> CandidateRecord:
    return CandidateRecord(
        name=candidate.name, ends=[s.end for s in candidate.slices], divergence=list(scores)
    )


def _fitting(
    candidates: Sequence[Candidate], graph: fx.Graph, batch_size: int, device: torch.device
) -> Sequence[Candidate]:
    """Those whose largest slice can be learned in half of the device's memory; of what is free now no result may depend."""
    most = total_memory(device) // 2
    return [c for c in candidates if step_bytes(graph, c.slices, batch_size) <= most] or candidates[:1]
