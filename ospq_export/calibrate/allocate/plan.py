"""The choices that a network has: operators in groups, what each loses and costs in each format; and recipes of a choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ospq_export.calibrate.allocate.cost import Roofline, average_bits, kind_of
from ospq_export.calibrate.allocate.effects import Sensitivity, globs
from ospq_export.calibrate.allocate.operators import Operator, groups_of, operators_of
from ospq_export.calibrate.allocate.programme import Border, Programme
from ospq_export.engines.rates import find_gpu
from ospq_export.errors import InputError
from ospq_export.formats.choice import FLOAT
from ospq_export.graph.capture import operator_names
from ospq_export.recipes import Recipe
from ospq_export.runs.allocation import Attempt, Budget

POINTS = 24
"""Bounds of the cost at which the least loss is looked for."""


@dataclass(frozen=True)
class Choices:
    """A network's operators, and what they lose and cost.

    Attributes:
        operators: in graph order.
        groups: indices of operators that share a format.
        formats: names.
        losses: of every operator in every format.
        roofline: None where bits are the cost.
    """

    operators: list[Operator]
    groups: list[list[int]]
    formats: tuple[str, ...]
    losses: Mapping[str, Mapping[str, float]]
    roofline: Roofline | None

    def bits(self) -> Programme:
        """The programme whose cost is the average bits."""
        total = sum(o.macs for o in self.operators)
        return Programme(self._losses(), self._sums(lambda o, f: o.macs * o.bits(f) / total))

    def seconds(self) -> Programme:
        """The programme whose cost is the time.

        Raises:
            ValueError: no GPU was named.
        """
        if self.roofline is None:
            raise ValueError("the time of which GPU?")
        borders, group_of = [], {i: g for g, inside in enumerate(self.groups) for i in inside}
        place = {o.name: i for i, o in enumerate(self.operators)}
        for reader, operator in enumerate(self.operators):
            producer = place.get(operator.source or "")
            if producer is not None and group_of[producer] != group_of[reader]:
                source = self.operators[producer]
                made, read = ([kind_of(o, name) for name in self.formats] for o in (source, operator))
                cost = self.roofline.conversion(source)
                borders.append(Border(group_of[producer], group_of[reader], made, read, cost))
        return Programme(self._losses(), self._sums(self.roofline.seconds), borders)

    def programme(self) -> Programme:
        """The one whose cost is the time where a GPU is named, else the bits."""
        return self.bits() if self.roofline is None else self.seconds()

    def _losses(self) -> NDArray[np.float64]:
        return self._sums(lambda o, name: 0.0 if name == FLOAT else self.losses[name][o.name])

    def _sums(self, of: Callable[[Operator, str], float]) -> NDArray[np.float64]:
        sums = [[sum(of(self.operators[i], f) for i in g) for f in self.formats] for g in self.groups]
        return np.array(sums)

    def by_operator(self, chosen: Sequence[int]) -> dict[str, str]:
        """The format of every operator, in graph order, of a choice for every group."""
        found = {i: self.formats[f] for inside, f in zip(self.groups, chosen, strict=True) for i in inside}
        return {operator.name: found[i] for i, operator in enumerate(self.operators)}

    def attempt(self, formats: Mapping[str, str]) -> Attempt:
        """What formats cost, and what they are expected to lose; nothing is measured."""
        lost = [0.0 if name == FLOAT else self.losses[name][o] for o, name in formats.items()]
        latency = None if self.roofline is None else self.roofline.share(self.operators, formats)
        bits = average_bits(self.operators, formats)
        return Attempt(formats=dict(formats), bits=bits, latency=latency, loss=sum(lost))

    def attempts(self, budget: Budget) -> list[Attempt]:
        """What is worth a try, from the cheapest on: one choice where the budget is bits or time, else those of the front.

        Raises:
            InputError: not even the cheapest formats keep to the bits or the time.
        """
        programme = self.programme()
        if budget.bits is None and budget.latency is None:
            return [self.attempt(self.by_operator(c)) for c in programme.front(POINTS)]
        if budget.latency is not None and self.roofline is not None:
            float_ = self.roofline.total(self.operators, {o.name: FLOAT for o in self.operators})
            limit, asked = budget.latency * float_, f"`budget_latency` {budget.latency:g}"
        else:
            programme, limit = self.bits(), float(budget.bits or 0.0)
            asked = f"`budget_bits` {limit:g}"
        chosen = programme.least_loss(limit)
        if chosen is None:
            least = programme.least_cost(np.inf)
            assert least is not None
            cheapest = self.attempt(self.by_operator(least))
            cost = cheapest.bits if budget.latency is None else cheapest.latency
            raise InputError(
                f"with {', '.join(self.formats)} the network takes {cost:.3g} at least",
                where=asked,
                fix="allow more, or give formats of fewer bits",
            )
        return [self.attempt(self.by_operator(chosen))]


def choices_of(captured: fx.GraphModule, sensitivity: Sensitivity, budget: Budget) -> Choices:
    """The choices of a network whose losses are known.

    Args:
        captured: the float network.
        sensitivity: in every format of the budget but float.
        budget: names formats, and the GPU where time counts.

    Raises:
        InputError: the GPU is not known.
    """
    losses = {name: sensitivity.by_operator(name) for name in budget.formats if name != FLOAT}
    return _choices(captured, losses, budget)


def _choices(captured: fx.GraphModule, losses: Mapping[str, Mapping[str, float]], budget: Budget) -> Choices:
    operators = operators_of(captured)
    roofline = None if budget.gpu is None else Roofline(find_gpu(budget.gpu))
    return Choices(operators, groups_of(captured, operators), budget.formats, losses, roofline)


def check_reachable(captured: fx.GraphModule, budget: Budget) -> None:
    """Refuse bits or a time that not even the cheapest formats keep, before any losses are known.

    Raises:
        InputError: they do not.
    """
    if budget.bits is None and budget.latency is None:
        return
    nothing = dict.fromkeys(operator_names(captured.graph).values(), 0.0)
    _choices(captured, dict.fromkeys(budget.formats, nothing), budget).attempts(budget)


def recipe_of(recipe: Recipe, operators: Sequence[Operator], formats: Mapping[str, str]) -> Recipe:
    """A recipe that gives every operator its format, and has all else of another.

    Args:
        recipe: the other one.
        operators: of the network.
        formats: by operator.
    """
    base = Counter(formats[o.name] for o in operators if o.weights).most_common(1)[0][0]
    names, overrides = [o.name for o in operators], dict[str, str]()
    for name in dict.fromkeys(formats.values()):
        # An override may not name a format that an operator refuses.
        exact = {o.name: o.format_names(name)[1] for o in operators if formats[o.name] == name}
        for kind in dict.fromkeys(exact.values()) if name != base else ():
            chosen = [o for o, found in exact.items() if found == kind]
            overrides |= dict.fromkeys(globs(chosen, names), kind)
    given = dict.fromkeys(("weights", "activations", "attention", "ends"), base)
    bits = dict.fromkeys(("weight_bits", "activation_bits", "first_last_bits"))
    return recipe.model_copy(
        update={"name": f"{recipe.name}-allocated", **given, **bits, "overrides": overrides}
    )
