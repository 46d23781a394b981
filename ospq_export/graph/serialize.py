"""A captured graph as JSON: nodes, arguments, shapes, module paths; its constants lie in a file of tensors beside it.

A graph is rebuilt from operators of an allow-list alone, so that a run directory needs neither the model's code nor timm, and a
foreign one can call nothing else.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.errors import InputError, damaged, reason_of
from ospq_export.graph.outputs import LOGITS, output_names, output_node
from ospq_export.graph.sizes import SizeRange, propagate

_ATEN = """
__and__.Tensor __or__.Tensor _native_batch_norm_legit_no_training.default _softmax.default _to_copy.default
_unsafe_view.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec abs.default acos.default acosh.default
adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default add.Scalar add.Tensor addcdiv.default
addcmul.default addmm.default alias.default all.default all.dim all.dims amax.default amin.default any.default any.dim
any.dims arange.default arange.start arange.start_step argmax.default argmin.default asin.default asinh.default atan.default
atan2.default atanh.default avg_pool1d.default avg_pool2d.default avg_pool3d.default baddbmm.default batch_norm.default
bilinear.default bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bitwise_xor.Tensor bmm.default
cat.default ceil.default celu.default chunk.default clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default
clamp_min.Tensor clamp_min.default clone.default col2im.default constant_pad_nd.default contiguous.default conv1d.default
conv2d.default conv3d.default conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default
copy.default cos.default cosh.default cumsum.default detach.default diagonal.default div.Scalar div.Tensor div.Tensor_mode
dropout.default einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default erfc.default exp.default
exp2.default expand.default expm1.default fill.Scalar fill.Tensor flatten.using_ints flip.default floor.default
floor_divide.default fmod.Scalar fmod.Tensor frac.default full.default full_like.default gather.default ge.Scalar ge.Tensor
gelu.default glu.default grid_sampler_2d.default group_norm.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default
hardtanh.default im2col.default index.Tensor index_put.default index_select.default instance_norm.default isinf.default
isnan.default layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor linalg_vector_norm.default
linear.default linspace.default log.default log10.default log1p.default log2.default log_sigmoid.default log_softmax.int
logaddexp.default logical_and.default logical_not.default logical_or.default logical_xor.default logit.default
logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim
max_pool1d.default max_pool2d.default max_pool2d_with_indices.default max_pool3d.default maximum.default mean.default
mean.dim min.default min.dim minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor narrow.default
ne.Scalar ne.Tensor neg.default new_full.default new_ones.default new_zeros.default ones.default ones_like.default
pad.default permute.default pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
prelu.default prod.default prod.dim_int reciprocal.default reflection_pad1d.default reflection_pad2d.default relu.default
relu6.default remainder.Scalar remainder.Tensor repeat.default repeat_interleave.self_int replication_pad1d.default
replication_pad2d.default reshape.default rms_norm.default roll.default round.default rsqrt.default rsub.Scalar
scalar_tensor.default scatter.src scatter.value scatter_add.default select.int select_scatter.default selu.default
sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor slice_scatter.default softmax.int
softplus.default sort.default split.Tensor split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim
squeeze.dims stack.default std.correction sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int tan.default
tanh.default to.dtype topk.default transpose.int tril.default triu.default trunc.default type_as.default unbind.int
unflatten.int unfold.default unsqueeze.default upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec
upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_trilinear3d.vec var.correction
var_mean.correction view.default where.Scalar where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""
ATEN = frozenset(f"aten.{name}" for name in _ATEN.split())
# Arithmetic on sizes, and the parts of what gives several tensors.
_ON_SIZES = ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem")
SIZES: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in _ON_SIZES}
_VERSION = 1
# What torch calls by name and JSON has no form for.
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def describe(module: fx.GraphModule) -> dict[str, Any]:
    """The graph as values that JSON has.

    Args:
        module: what `capture` returned.

    Raises:
        InputError: an operator is not in the allow-list.
    """
    stacks: dict[str, int] = {}
    nodes = []
    for node in module.graph.nodes:
        stack = [[key, *entry] for key, entry in node.meta.get("nn_module_stack", {}).items()]
        entry = {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": _encode(node.args),
            "kwargs": _encode(node.kwargs),
            "shape": _shape(node.meta.get("val")),
            "module": node.meta.get("module_path", ""),
            "stack": stacks.setdefault(json.dumps(stack), len(stacks)),
        }
        nodes.append({key: value for key, value in entry.items() if value not in (None, [], {}, "")})
    names = list(output_names(module.graph))
    sizes = module.meta.get("sizes")
    return {
        "version": _VERSION,
        **({} if names == [LOGITS] else {"outputs": names}),
        **({} if sizes is None else {"sizes": sizes.model_dump(mode="json")}),
        "constants": [[name, list(b.shape), _name(b.dtype)] for name, b in module.named_buffers()],
        "stacks": [json.loads(text) for text in stacks],
        "nodes": nodes,
    }


def rebuild(described: dict[str, Any], where: Path, size: tuple[int, int] | None = None) -> fx.GraphModule:
    """The graph that `describe` described; its constants hold nothing yet.

    Args:
        described: what the JSON holds.
        where: what errors name.
        size: height and width that shapes are computed for, of a graph with a range; None is the calibration's.

    Returns:
        As `capture`'s, in eval mode; constants are NaN, or 0 where they are integers, and take no memory.

    Raises:
        InputError: it is no such description, or calls what is not in the allow-list.
    """
    try:
        if described["version"] != _VERSION:
            raise ValueError(f"version {described['version']}, this program reads {_VERSION}")
        constants = {
            name: _nothing(shape, getattr(torch, dtype)) for name, shape, dtype in described["constants"]
        }
        module = fx.GraphModule(constants, _graph(described))
        images = next(entry for entry in described["nodes"] if entry["op"] == "placeholder")
        sizes = SizeRange.model_validate(described["sizes"]) if "sizes" in described else None
        channels, *calibrated = map(int, images["shape"][1:])
        propagate(module, (channels, *(size or calibrated)), sizes)
        if sizes is not None:
            module.meta["sizes"] = sizes
    except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise damaged(f"the graph cannot be rebuilt: {reason_of(error)}", where) from error
    return module.eval()


def _graph(described: dict[str, Any]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for entry in described["nodes"]:
        args, kwargs = _decode(entry.get("args", []), made), _decode(entry.get("kwargs", {}), made)
        if entry["op"] == "output":
            node = graph.output(*(tuple(a) if isinstance(a, list) else a for a in args))
        else:
            target = _operator(entry["target"]) if entry["op"] == "call_function" else str(entry["target"])
            if entry["op"] not in ("placeholder", "get_attr", "call_function"):
                raise ValueError(f"a node of kind {entry['op']!r}")
            node = graph.create_node(entry["op"], target, tuple(args), kwargs, name=entry["name"])
        if node.name != entry["name"]:
            raise ValueError(f"two nodes are called {entry['name']!r}")
        stack = described["stacks"][entry["stack"]]
        node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in stack}
        plain = ((path, kind.rsplit(".", 1)[-1]) for _, path, kind in stack if "_hook" not in path)
        node.meta["module_stack"], node.meta["module_path"] = tuple(plain), entry.get("module", "")
        made[node.name] = node
    output_node(graph).meta["names"] = _output_names(described, output_node(graph))
    return graph


def _output_names(described: dict[str, Any], node: fx.Node) -> tuple[str, ...]:
    names = tuple(map(str, described.get("outputs", [LOGITS])))
    if len(set(names)) != len(node.all_input_nodes):
        raise ValueError(f"{len(node.all_input_nodes)} outputs have the names {', '.join(names)}")
    return names


def _nothing(shape: list[int], dtype: torch.dtype) -> Tensor:
    fill = torch.nan if dtype.is_floating_point else 0
    return torch.full((), fill, dtype=dtype).expand(shape)


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    name = next((name for name, function in SIZES.items() if function is node.target), str(node.target))
    if name not in SIZES and name not in ATEN:
        raise InputError(f"the operator {name} is not known", where=node.meta.get("module_path", "") or None)
    return name


def _operator(name: str) -> Callable[..., Any]:
    if name in SIZES:
        return SIZES[name]
    if name not in ATEN:
        raise LookupError(f"the operator {name!r} is not in the list of those that may be called")
    found: Callable[..., Any] = operator.attrgetter(name.removeprefix("aten."))(torch.ops.aten)
    return found


def _shape(value: Any) -> list[int | str] | None:
    if not isinstance(value, Tensor):
        return None
    return [size if isinstance(size, int) else str(size) for size in value.shape]


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _encode(value: Any) -> Any:
    """An argument as JSON has it: what JSON lacks is an object of one entry, whose key says what it is."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"mapping": {key: _encode(item) for key, item in value.items()}} if value else {}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": value.type}
    for key, kind in _NAMED.items():
        if isinstance(value, kind):
            return {key: _name(value)}
    raise InputError(f"an argument of {type(value).__name__} cannot be written")


def _decode(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    if not value:
        return {}
    ((key, held),) = value.items()
    if key == "node":
        return made[held]
    if key == "mapping":
        return {name: _decode(item, made) for name, item in held.items()}
    if key == "float":
        return float(held)
    if key == "device":
        return torch.device(held)
    found = getattr(torch, held)
    if not isinstance(found, _NAMED[key]):
        raise ValueError(f"{held!r} is no {key}")
    return found
