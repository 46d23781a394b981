"""Capture of a model as a flat ATen graph in canonical form, with a fingerprint.

After `capture`, a graph has one placeholder (images) and call_function nodes over constants; its quantizable work is
`aten.linear`, `aten.conv2d` and `aten.matmul`. Every node carries in `meta`:
    val           fake tensor (shape, dtype; the batch dimension is symbolic, and it alone)
    module_path   the module that ran the operator, e.g. "blocks.0.attn.qkv"
    module_stack  ((path, class name), ...) from the root to that module
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ospq_export.errors import InputError, reason_of
from ospq_export.graph import canonical
from ospq_export.graph.decompose import decompose
from ospq_export.graph.outputs import choose_outputs
from ospq_export.graph.ranged import check_ends, export_ranged, settle, traced_sizes, unlogged
from ospq_export.graph.sizes import SizeRange

aten = torch.ops.aten
QUANTIZABLE = (aten.linear.default, aten.conv2d.default, aten.matmul.default)


def _export(
    model: nn.Module, example: Tensor, sizes: SizeRange | None
) -> tuple[torch.export.ExportedProgram, SizeRange | None]:
    try:
        with warnings.catch_warnings(action="ignore"), _unfused(), torch.no_grad():
            if sizes is None:
                return decompose(_traced(model, example)), None
            program, sizes = export_ranged(model, example, sizes)
            return decompose(program), sizes
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the model cannot be captured as one graph: {reason_of(error)}",
            where=_failing_module(model, example) or type(model).__name__,
            fix="data-dependent control flow cannot be exported; choose another model or rewrite that module",
        ) from error


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The program, by running the module on symbols; where Python makes a number of one, by reading its bytecode."""
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        return torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        # len(tensor) can be nothing but a number, and fixes the batch size.
        if "specialized" in str(error):
            with contextlib.suppress(Exception), unlogged("torch._guards"):
                return torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=True)
        raise


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Torch's modules for transformers without their fused kernels, which nothing here could take apart."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _failing_module(model: nn.Module, example: Tensor) -> str:
    """Path and class of the deepest module that torch.export refuses when it is exported alone, "" when none is."""
    inputs: dict[nn.Module, tuple[object, ...]] = {}

    def record(module: nn.Module, args: tuple[object, ...]) -> None:
        inputs.setdefault(module, args)

    handles = [module.register_forward_pre_hook(record) for module in model.modules()]
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        return f"the float model itself fails on {tuple(example.shape)}: {reason_of(error)}"
    finally:
        for handle in handles:
            handle.remove()
    path, module = "", model
    while True:
        called = [(name, child) for name, child in module.named_children() if child in inputs]
        failing = next(((name, child) for name, child in called if not _exports(child, inputs[child])), None)
        if failing is None:
            return f"{path}, {type(module).__name__}" if path else ""
        path, module = f"{path}.{failing[0]}".lstrip("."), failing[1]


def _exports(module: nn.Module, args: tuple[object, ...]) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            torch.export.export(module, args)
    except Exception:
        return False
    return True


def _annotate(nodes: Iterable[fx.Node]) -> None:
    """Replace torch.export's module stack by plain paths that survive every later pass."""
    for node in nodes:
        stack = tuple(
            (path, kind.rsplit(".", 1)[-1])
            for path, kind in (node.meta.get("nn_module_stack") or {}).values()
            if isinstance(kind, str) and "_hook" not in path
        )
        node.meta["module_stack"] = stack
        node.meta["module_path"] = stack[-1][0] if stack else ""


def _check_sizes(graph: fx.Graph) -> None:
    """Refuse what has as many elements as the images' content says: a deployed file needs sizes that are known."""
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        if any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes):
            source = node.all_input_nodes[0] if node.target is operator.getitem else node
            raise InputError(
                f"the size of what operator {source.target} gives depends on the images' content",
                where=f"module {node.meta['module_path'] or '(root)'}",
                fix="take the selection out of the network, and do it on its outputs",
            )


def capture(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    share: bool = False,
    outputs: Sequence[str] | None = None,
    sizes: SizeRange | None = None,
) -> fx.GraphModule:
    """Capture a model as a canonical graph that computes the same function.

    Args:
        model: in eval mode, float32, one image tensor in; one tensor out, or several in tuples, dictionaries, dataclasses.
        input_size: (channels, height, width) in pixels.
        share: whether constants may be the model's own memory, for a model that is used no more, instead of copies.
        outputs: names of the outputs that are kept; None keeps all that hold real numbers.
        sizes: the heights and widths that the graph is to take besides; None fixes them at `input_size`.

    Returns:
        A GraphModule from (B, C, H, W) float32 to a tensor or a tuple of tensors, float32 with B in front, B free; constants
        are buffers, `outputs.output_names` tells the names, `meta["left_out"]` what else the model returns, and `meta["sizes"]`
        the range with the steps that the network needs. Fake values are for `input_size`.

    Raises:
        InputError: the model cannot be captured, or not for the range; names the module, and the operator where one is
            unsupported.
    """
    if sizes is None:
        return _captured(model, input_size, input_size[1:], None, share=share, outputs=outputs)
    check_ends(model, input_size[0], sizes)
    refused: InputError | None = None
    for traced in traced_sizes(input_size[1:], sizes):
        try:
            return _captured(model, input_size, traced, sizes, share=share, outputs=outputs)
        except InputError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _captured(
    model: nn.Module,
    input_size: Sequence[int],
    traced: Sequence[int],
    sizes: SizeRange | None,
    *,
    share: bool,
    outputs: Sequence[str] | None,
) -> fx.GraphModule:
    """`capture` with images of height and width `traced`."""
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, input_size[0], *traced, generator=generator)
    program, sizes = _export(model, example.to(next(iter(model.parameters())).device), sizes)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _annotate(module.graph.nodes)
    _check_sizes(module.graph)
    left_out = choose_outputs(module.graph, program.call_spec.out_spec, outputs)
    result = canonical.canonicalize(module, share=share)
    result.meta["left_out"] = left_out
    if not quantizable_nodes(result.graph):
        raise InputError("the model has no linear, conv2d or matmul to quantize", where=type(model).__name__)
    if sizes is not None:
        settle(result, input_size, sizes)
    return result


def quantizable_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The linear, conv2d and matmul nodes in topological order."""
    return [n for n in graph.nodes if n.target in QUANTIZABLE]


def operator_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique readable name per quantizable operator: its module's path, with the operator and a count where it has several."""
    nodes = quantizable_nodes(graph)
    per_path = Counter(n.meta["module_path"] for n in nodes)
    seen: Counter[tuple[str, str]] = Counter()
    names = {}
    for node in nodes:
        path, kind = node.meta["module_path"], str(node.target).split(".")[1]
        count = seen[path, kind]
        seen[path, kind] += 1
        alone = per_path[path] == 1 and kind != "matmul"
        names[node] = path if alone else f"{path}.{kind}_{count}".lstrip(".")
    return names


def fingerprint(module: fx.GraphModule) -> str:
    """SHA-256 (hex) of the graph's structure: operators, arguments, shapes, module paths; not of its weights or node names."""
    index = {node: str(i) for i, node in enumerate(module.graph.nodes)}

    def render(value: object) -> str:
        if isinstance(value, fx.Node):
            return "%" + index[value]
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(render, value)) + "]"
        return repr(value)

    digest = hashlib.sha256()
    for node in module.graph.nodes:
        kwargs = [(k, render(v)) for k, v in sorted(node.kwargs.items())]
        shape = ""
        if node.op == "get_attr":
            constant = module.get_buffer(str(node.target))
            shape = f"{tuple(constant.shape)} {constant.dtype}"
        line = f"{node.op} {node.target} {render(node.args)} {kwargs} {shape} {node.meta.get('module_path', '')}\n"
        digest.update(line.encode())
    return digest.hexdigest()
