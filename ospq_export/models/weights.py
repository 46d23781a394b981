"""Reading weights into a network that is already built; refusing those not its own or not sound."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import nn

from ospq_export.errors import InputError, listed
from ospq_export.models.checkpoint import WeightSet, read_checkpoint
from ospq_export.models.matching import Fit, Network, adapted, fit, prefixes, unwrapped
from ospq_export.models.record import CheckpointRecord, label_of

logger = logging.getLogger(__name__)

_RECORD = "checkpoint_record"


def load_checkpoint(model: nn.Module, path: Path, key: str | None = None) -> CheckpointRecord:
    """Fills `model` from a file: from the one set of weights that fits, adapted by timm's own checkpoint filter if need be.

    Args:
        model: The network to fill.
        path: A safetensors file or a torch file, read without unpickling any code. Its weights may lie under any key, and their
            names may share a prefix.
        key: Which entry or prefix to take, dotted; None takes the one that fits, of several the moving average.

    Returns:
        What was taken; `checkpoint_record(model)` gives it again.

    Raises:
        InputError: The file cannot be read, has no such entry, or its tensors are not this network's.
    """
    network = Network.of(model)
    sets = [unwrapped(found) for found in read_checkpoint(path)]
    everything = [(found, prefix) for found in sets for prefix in prefixes(found.tensors, network)]
    pairs = everything if key is None else _named(key, sets, everything, network, path)
    meant = {(found.entry, prefix) for found, prefix in pairs}
    fits = [f for f in _exact([*everything, *pairs], network) if (f.record.entry, f.record.prefix) in meant]
    fits = fits or [f for pair in pairs if (f := adapted(*pair, network)) is not None]
    if not fits:
        raise _refusal(min((fit(*pair, network) for pair in pairs), key=_distance), network, path)
    chosen, *rest = sorted(fits, key=lambda f: _rank(f.label))
    others = [f.label for f in rest if not _same(f, chosen)]
    kinds = {str(t.dtype).removeprefix("torch.") for t in chosen.state.values() if t.is_floating_point()}
    how = "rule" if others else "option" if key is not None else "only"
    update = {"chosen": how, "others": others, "dtypes": sorted(kinds)}
    record = chosen.record.model_copy(update=update)
    if record.summary():
        logger.warning("%s: %s", path, record.summary())
    model.load_state_dict({**network.expected, **chosen.state})
    setattr(model, _RECORD, record)
    return record


def checkpoint_record(model: nn.Module) -> CheckpointRecord | None:
    """What `load_checkpoint` took for a model; None where it was not asked."""
    return getattr(model, _RECORD, None)


_Pair = tuple[WeightSet, str]


def _named(
    key: str, sets: list[WeightSet], everything: list[_Pair], network: Network, path: Path
) -> list[_Pair]:
    """The sets, with prefixes, that `key` may mean: itself, and those inside it.

    Raises:
        InputError: there is none of that name.
    """
    key = key.rstrip(".")
    labels = [label_of(found.entry, prefix) for found, prefix in everything]
    named = [p for p, label in zip(everything, labels, strict=True) if f"{label}.".startswith(f"{key}.")]
    for found in sets:
        # A prefix that too few names have to be thought of unasked.
        start = f"{found.entry}." if found.entry else ""
        rest = f"{key}.".removeprefix(start)
        if f"{key}.".startswith(start) and rest and any(name.startswith(rest) for name in found.tensors):
            named.append((found, rest))
    if not named:
        there = [f.label for f in _exact(everything, network)] or labels
        raise InputError(
            f"the checkpoint has no entry {key or '.'!r}; it has {listed(list(dict.fromkeys(there)), 8)}",
            where=path,
            fix="choose one of them with `checkpoint_key`, or leave it out",
        )
    return named


def _exact(pairs: list[_Pair], network: Network) -> list[Fit]:
    """Those that fit as they are. What lies under a fitting prefix is no surplus of the set around it."""
    fits: dict[tuple[str, str], Fit] = {}
    for found, prefix in sorted(pairs, key=lambda pair: -len(pair[1])):
        inner = tuple(p for entry, p in fits if entry == found.entry and p.startswith(prefix))
        result = fit(found, prefix, network, inner)
        if not result.problems:
            fits[found.entry, prefix] = result
    order = [(found.entry, prefix) for found, prefix in pairs]
    return [fits[name] for name in dict.fromkeys(order) if name in fits]


def _rank(label: str) -> int:
    """The order of timm: moving averages first, then `state_dict`, then `model`, then as the file has them."""
    if re.search(r"(^|[._])ema([._]|$)", label):
        return 0
    names = [part for part in label.split(".") if part in ("state_dict", "model")]
    return 1 + (("state_dict", "model").index(names[0]) if names else 2)


def _same(left: Fit, right: Fit) -> bool:
    """Whether two sets give the network the same values."""
    return left.state.keys() == right.state.keys() and all(
        value is right.state[key] or torch.equal(value, right.state[key]) for key, value in left.state.items()
    )


def _distance(found: Fit) -> tuple[int, int]:
    return sum(len(names) for names in found.problems.values()), len(found.record.aside)


def _refusal(nearest: Fit, network: Network, path: Path) -> InputError:
    """Why the set that comes nearest is not the network's."""
    problems, record = nearest.problems, nearest.record
    where = [f"in {record.entry!r}"] if record.entry else []
    where += [f"under {record.prefix!r}"] if record.prefix else []
    summary = "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items())
    classes, fix = _classes(nearest, network), "check the model's name and `model_kwargs`"
    if classes is not None:
        own = network.model.num_classes
        summary = f"only its classifier differs, {classes} classes for the model's {own} ({summary})"
        fix = f"give num_classes={classes} with `model_kwargs`"
    elif problems.keys() == {"missing"} and all(_is_classifier(k, network) for k in problems["missing"]):
        summary = f"it has no classifier ({summary})"
        fix = "give weights that were trained with one: those of a backbone alone predict nothing"
    said = f"the checkpoint is not of this model: {' '.join([*where, summary])}"
    return InputError(said, where=path, fix=fix)


def _is_classifier(name: str, network: Network) -> bool:
    names = getattr(network.model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return any(name.startswith(f"{part}.") for part in names)


def _classes(found: Fit, network: Network) -> int | None:
    """The checkpoint's number of classes, where nothing but the classifier is of another shape."""
    wrong = [text.split(" ", 1)[0] for text in found.problems.get("of another shape", [])]
    if found.problems.keys() != {"of another shape"} or not all(_is_classifier(k, network) for k in wrong):
        return None
    pairs = [(found.state[name], network.expected[name]) for name in wrong]
    counts = {t.shape[0] for t, _ in pairs if t.dim()} - {network.model.num_classes}
    same_width = all(t.is_floating_point() and t.shape[1:] == own.shape[1:] for t, own in pairs)
    return counts.pop() if len(counts) == 1 and same_width else None


def check_finite(model: nn.Module, where: str) -> None:
    """Raises InputError with the names of the tensors that hold NaN or infinity; `where` they came from."""
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise InputError(
            f"weights are NaN or infinite: {listed(broken)}", where=where, fix="give sound weights"
        )
