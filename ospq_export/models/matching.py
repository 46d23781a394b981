"""Whether a set of tensors is a network's: under which prefix, and what is missing, surplus or of another shape."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ospq_export.models.checkpoint import StateDict, WeightSet
from ospq_export.models.record import CheckpointRecord, label_of

# Components that wrappers put into names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Counters of training, of thop and of weight averaging, which nothing reads in eval mode.
_COUNTERS = frozenset({"num_batches_tracked", "total_ops", "total_params", "n_averaged"})
# What networks compute from their arguments, and older versions of them stored.
_COMPUTED = frozenset(
    {"attention_bias_idxs", "attn_mask", "relative_coords_table", "relative_position_index"}
)
# Stored in a half precision, computed values differ by this much.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Network:
    """What a network takes.

    Attributes:
        model: the network itself.
        expected: its state dictionary.
        computed: its buffers that it does not store.
        parameters: names of its parameters.
    """

    model: nn.Module
    expected: Mapping[str, Tensor]
    computed: Mapping[str, Tensor]
    parameters: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """The description of a model; its tensors are shared."""
        expected = model.state_dict()
        computed = {name: buffer for name, buffer in model.named_buffers() if name not in expected}
        return cls(model, expected, computed, frozenset(name for name, _ in model.named_parameters()))

    def surplus_is_harmless(self, name: str) -> bool:
        """Whether a tensor that the network does not take has no effect in eval mode."""
        return name in self.computed or name.rsplit(".", 1)[-1] in _COUNTERS | _COMPUTED

    def absence_is_harmless(self, name: str) -> bool:
        """Whether the network's own value serves where a tensor is missing."""
        return name not in self.parameters and name.rsplit(".", 1)[-1] in {"num_batches_tracked"} | _COMPUTED


@dataclass(frozen=True)
class Fit:
    """A set of tensors under a prefix, beside a network.

    Attributes:
        record: where the set lies, and what of it the network does not take.
        state: what the network is given, by the network's names.
        problems: kind of difference to the tensors concerned; empty where the set fits.
    """

    record: CheckpointRecord
    state: StateDict
    problems: dict[str, list[str]]

    @property
    def label(self) -> str:
        """What `checkpoint_key` calls it."""
        return label_of(self.record.entry, self.record.prefix)


def unwrapped(found: WeightSet) -> WeightSet:
    """The set with wrappers' components out of its names, and sparse tensors made dense."""
    cleaned = {
        ".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in found.tensors
    }
    if len(cleaned) < len(found.tensors):
        # Two names would become one: which is meant cannot be known, and as they are they are not taken.
        cleaned = {key: key for key in found.tensors}
    return WeightSet(found.entry, {name: _dense(found.tensors[key]) for name, key in cleaned.items()})


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided or tensor.is_meta else tensor.to_dense()


def prefixes(tensors: StateDict, network: Network) -> list[str]:
    """Prefixes under which at least half of the network's tensors lie, or that all names share; "" is the first."""
    counts: Counter[str] = Counter()
    for key in tensors:
        dots = [i + 1 for i, c in enumerate(key) if c == "."]
        counts.update(key[:i] for i in dots if key[i:] in network.expected)
    likely = [prefix for prefix, count in counts.most_common() if 2 * count >= len(network.expected)]
    return list(dict.fromkeys(["", *likely, *_shared(tensors)]))


def _shared(tensors: StateDict) -> list[str]:
    """Prefixes "a.", "a.b.", ... as far as all names begin so; counters of no effect are not asked."""
    split = [key.split(".")[:-1] for key in tensors if key.rsplit(".", 1)[-1] not in _COUNTERS]
    found = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return [".".join(found[: i + 1]) + "." for i in range(len(found))]


def fit(found: WeightSet, prefix: str, network: Network, others: tuple[str, ...] = ()) -> Fit:
    """Hold a set under a prefix against a network; names that begin with one of `others` belong to other sets."""
    names = {
        key: key.removeprefix(prefix)
        for key in found.tensors
        if key.startswith(prefix) and not key.startswith(others)
    }
    own = {name: found.tensors[key] for key, name in names.items()}
    outside = [key for key in found.tensors if key not in names]
    ignored = [key for key in own if key not in network.expected and network.surplus_is_harmless(key)]
    ignored += [key for key in own if key in network.expected and _is_stale_counter(own[key], key, network)]
    state = {key: value for key, value in own.items() if key not in set(ignored)}
    absent = [key for key in network.expected if key not in state and network.absence_is_harmless(key)]
    computed = [key for key in ignored if key in network.computed]
    record = CheckpointRecord(
        entry=found.entry,
        prefix=prefix,
        aside=[key for key in outside if not network.surplus_is_harmless(key)],
        ignored=ignored + [key for key in outside if network.surplus_is_harmless(key)],
        absent=[key for key in absent if key not in own],
        differing=[key for key in computed if _differs(own[key], network.computed[key])],
    )
    return Fit(record, state, _problems(state, network.expected, set(absent)))


def _is_stale_counter(tensor: Tensor, name: str, network: Network) -> bool:
    """Whether a counter without effect has another shape or type than the network's: then the network's own stays."""
    return network.absence_is_harmless(name) and _kind(tensor) != _kind(network.expected[name])


def _differs(stored: Tensor, computed: Tensor) -> bool:
    if stored.shape != computed.shape or stored.dtype.is_floating_point != computed.dtype.is_floating_point:
        return False
    return not torch.allclose(stored.double(), computed.double(), rtol=_TOLERANCE, atol=_TOLERANCE)


def _problems(state: StateDict, expected: Mapping[str, Tensor], excused: set[str]) -> dict[str, list[str]]:
    """How `state` differs from what the network expects: kind of difference to the tensors concerned."""
    found = {
        "missing": [key for key in expected if key not in state and key not in excused],
        "unknown": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} is {_kind(state[key])}, the model's {_kind(expected[key])}"
            for key in expected
            if key in state and _kind(state[key]) != _kind(expected[key])
        ],
    }
    return {name: keys for name, keys in found.items() if keys}


def _kind(tensor: Tensor) -> str:
    """The shape, and what else keeps a tensor from being taken for float weights: integers, 8-bit floats, shards, no data."""
    plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    extra = "" if plain else f" {tensor.dtype}"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        extra += f" {type(tensor).__name__}"
    return f"{tuple(tensor.shape)}{extra}{' without data' if tensor.is_meta else ''}"


def adapted(found: WeightSet, prefix: str, network: Network) -> Fit | None:
    """A set as the checkpoint filter of the model's own timm module makes it, if that fits the network."""
    adapt = getattr(sys.modules[type(network.model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return None
    own = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
    try:
        changed = dict(adapt(dict(own), network.model))
    except Exception:
        # The filters trust their input; one that falls over has met another model's weights.
        return None
    result = fit(WeightSet(found.entry, changed), "", network)
    if result.problems:
        return None
    carried = {value.data_ptr() for value in changed.values()}
    gone = [k for k, v in own.items() if k not in changed and v.data_ptr() not in carried]
    differences = {
        "prefix": prefix,
        "adapted": True,
        "aside": [key for key in found.tensors if not key.startswith(prefix)],
        "resized": [k for k, v in changed.items() if k in own and own[k].shape != v.shape],
        "dropped": [k for k in gone if not network.surplus_is_harmless(k)],
    }
    return replace(result, record=result.record.model_copy(update=differences))
