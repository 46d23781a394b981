"""What runs faster must stay what it is: compiled fake quantization, lower precision, and steps recorded as CUDA graphs."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import helpers as q
import pytest
import torch
from conftest import CUDA, straight_through
from hypothesis import given, settings
from hypothesis import strategies as st

from ospq_export.calibrate.objectives.base import Objective, weight_quantizers
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.graphed import Graphed
from ospq_export.calibrate.reconstruct.learner import Learner, arithmetic
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor
from ospq_export.formats import kernels
from ospq_export.graph.granularity import block_slicing
from ospq_export.graph.quantizers import Mode, quantizers_of
from ospq_export.graph.slicing import extract
from ospq_export.recipes import load_recipe
from ospq_export.runs.quantizers import quantizer_tensors

CPU = torch.device("cpu")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")


def reconstruction(*overrides):
    chosen = ("iterations=40", "batch_size=8", *overrides)
    return load_recipe("w4a4", [f"reconstruction.{o}" for o in chosen]).reconstruction


def second_slice(small_vit, observed_vit, noise):
    first, bounds = block_slicing(small_vit.graph)[:2]
    x = forward(extract(observed_vit.module, first), (noise,), Mode.FLOAT, CPU, len(noise))
    piece = extract(observed_vit.module, bounds)
    return piece, SliceData(x, x, forward(piece, x, Mode.FLOAT, CPU, len(noise))[0], len(noise))


def whole(x, scale, levels, offset, kept, grad, via=lambda f: f):
    """Value and gradients of fake quantization as one expression."""
    out = via(kernels.whole_forward)(x, scale, offset, kept, levels)
    return out, *via(kernels.whole_backward)(grad, x, scale, offset, kept, levels)


def by_autograd(x, scale, levels, offset, kept, grad):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    offset = torch.zeros_like(scale) if offset is None else offset.clone()
    offset.requires_grad_()
    out = straight_through(x, scale, levels, offset, kept)
    out.backward(grad)
    return out.detach(), x.grad, scale.grad, offset.grad


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2**-6, 4.0),
    offset=st.none() | st.floats(-2.0, 2.0),
    bits=st.integers(2, 8),
    drop=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_one_expression_has_the_formulas_values_and_gradients(scale, offset, bits, drop, seed):
    torch.manual_seed(seed)
    x, grad = torch.randn(2, 500, dtype=torch.float64)
    s = torch.tensor(scale, dtype=torch.float64)
    k = None if offset is None else torch.tensor(offset, dtype=torch.float64)
    case = (x, s, q.symmetric_levels(bits), k, q.random_kept(x, drop), grad)
    same(whole(*case), by_autograd(*case))


@COMPILER
@pytest.mark.slow
def test_compiled_it_is_the_same(caplog):
    levels = q.symmetric_levels(4)
    for size, offset, drop in ((1000, None, 0.5), (77, torch.tensor(0.3).double(), 0.0)):
        x, grad = torch.randn(2, size, dtype=torch.float64)
        case = (x, torch.tensor(0.2).double(), levels, offset, q.random_kept(x, drop), grad)
        same(whole(*case, via=kernels.compiled), by_autograd(*case))
    assert "not compiled" not in caplog.text


def test_without_a_compiler_it_runs_all_the_same(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("Cannot find a working triton installation\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    kernels.compiled.cache_clear()
    try:
        function = kernels.compiled(kernels.whole_forward)
        for _ in range(2):
            out = function(torch.tensor([0.7, 9.0]), torch.tensor(0.5), None, None, q.symmetric_levels(4))
            assert out.tolist() == [0.5, 3.5]
    finally:
        kernels.compiled.cache_clear()
    assert [r.message for r in caplog.records] == [
        "fake quantization is not compiled: Cannot find a working triton installation"
    ]


def test_precision_is_of_the_products_alone():
    a, b = torch.randn(2, 64, 64)
    with arithmetic("float32", CPU):
        assert torch.equal(a @ b, torch.mm(a, b))
    with arithmetic("bf16", CPU):
        product = a @ b
    assert product.dtype is torch.bfloat16
    before = torch.get_float32_matmul_precision()
    with arithmetic("tf32", CPU):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_bf16_learns_what_float32_learns(small_vit, observed_vit, noise):
    piece, data = second_slice(small_vit, observed_vit, noise)
    tensors = quantizer_tensors(list(quantizers_of(piece)))
    start = {name: value.clone() for name, value in tensors.items()}
    found, codes = {}, {}
    for precision in ("float32", "bf16"):
        for name, value in quantizer_tensors(list(quantizers_of(piece))).items():
            value.copy_(start[name])
        metrics = Reconstructor(reconstruction("iterations=120", f"precision={precision}"), CPU).run(
            piece, data, seed=0
        )
        assert metrics.kept and not metrics.warning
        found[precision] = metrics.error_after / metrics.error_before
        codes[precision] = torch.cat([w.codes.flatten() for w in weight_quantizers(piece)])
    assert found["bf16"] < 0.85 and abs(found["bf16"] - found["float32"]) < 0.05
    share = float((codes["bf16"] != codes["float32"]).float().mean())
    assert 0 < share < 0.1, "bf16 was at work, and decided nearly all weights alike"


@CUDA
def test_a_recorded_step_does_what_the_step_does(small_vit, observed_vit, noise):
    """Without dropping, whose random numbers a recording draws in another order."""
    piece, data = second_slice(small_vit, observed_vit, noise)
    device = torch.device("cuda")
    start = {n: v.clone() for n, v in quantizer_tensors(list(quantizers_of(piece))).items()}
    results = []
    for recorded in (True, False):
        piece.cpu()
        for name, value in quantizer_tensors(list(quantizers_of(piece))).items():
            value.copy_(start[name])
        piece.to(device)
        torch.manual_seed(0)
        settings = reconstruction("drop_probability=0", "iterations=60")
        learner = Learner(
            piece, data.to(device), Objective(settings, weight_quantizers(piece)), settings, device
        )
        assert isinstance(learner.learn, Graphed)
        if not recorded:
            learner.learn = learner.learn.step
        assert all(learner.step(index) for index in range(60))
        assert not recorded or learner.learn.graph is not None
        results.append((learner.losses, learner.rounding.v.detach().cpu()))
        learner.settle()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)


def test_what_cannot_be_recorded_is_run(monkeypatch, caplog):
    """The bookkeeping around a recording, on a machine that has no device to record on."""
    batch = SliceData((torch.zeros(2),), (torch.zeros(2),), torch.zeros(2), 2)
    graphed = Graphed(lambda part: part.target.sum())
    monkeypatch.setattr(graphed, "_aside", graphed.step)

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for value in range(6):
        batch.target.fill_(float(value))
        assert float(graphed(batch)) == 2 * value
    assert caplog.text.count("cannot be recorded as a CUDA graph: operation not permitted") == 1


@CUDA
def test_a_failed_recording_leaves_random_numbers(caplog):
    """On a real device: a step that waits for it cannot be recorded, and goes on drawing what it drops."""
    target = torch.zeros(1024, device="cuda")

    def step(part):
        kept = q.random_kept(part.target, 0.5).sum()
        return kept + 0 * int(kept)

    graphed = Graphed(step)
    found = [int(graphed(SliceData((target,), (target,), target, 1024))) for _ in range(8)]
    assert "cannot be recorded as a CUDA graph" in caplog.text
    assert all(400 < count < 624 for count in found) and len(set(found)) > 2


@CUDA
def test_memory_is_pinned_while_a_step_is_recorded():
    """As the next batch is while the present one is learned from."""
    target, stop = torch.zeros(1024, device="cuda"), threading.Event()

    def pin():
        while not stop.is_set():
            torch.empty(1 << 20).pin_memory().to("cuda", non_blocking=True)

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            for _ in range(20):
                graphed = Graphed(lambda part: part.target.sum())
                for _ in range(5):
                    graphed(SliceData((target,), (target,), target, 1024))
                assert graphed.graph is not None
        finally:
            stop.set()
    pinning.result()


@CUDA
def test_no_recording_is_broken_by_the_garbage_of_another():
    """Recordings that only the garbage collector can free, and a step that makes it run."""
    target = torch.zeros(1024, device="cuda")

    def step(part):
        for _ in range(2000):
            cycle = []
            cycle.append(cycle)
        return part.target.sum()

    for _ in range(6):
        graphed = Graphed(step)
        graphed.itself = graphed
        for _ in range(5):
            graphed(SliceData((target,), (target,), target, 1024))
        assert graphed.graph is not None
    graphed.release()
    assert graphed.graph is None and float(graphed(SliceData((target,), (target,), target, 1024))) == 0


@CUDA
def test_every_kind_of_arguments_is_compiled(caplog):
    """Offsets, masks, gradients, inference mode and dtypes are more kinds than torch compiles by default."""
    for dtype in (torch.float32, torch.bfloat16):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            for offset in (None, torch.zeros(1, device="cuda")):
                for dropped in (0.0, 0.5):
                    with mode():
                        x = torch.randn(
                            4096, device="cuda", dtype=dtype, requires_grad=mode is torch.enable_grad
                        )
                        scale = torch.full((1,), 0.1, device="cuda")
                        kept = q.random_kept(x, dropped)
                        kernels.FakeQuantize.apply(x, scale, offset, kept, -8, 7)
    assert "recompile_limit" not in caplog.text and "not compiled" not in caplog.text


def test_a_batch_is_copied_into_place():
    def data(value):
        return SliceData((torch.full((2,), value),), (torch.full((3,), value),), torch.full((1,), value), 1)

    first, second = data(1.0), data(2.0)
    held = first.map(torch.Tensor.clone)
    held.copy_(second)
    assert held.target.tolist() == [2.0] and held.quantized_input[0].tolist() == [2.0] * 3
    assert held.float_input[0].tolist() == [2.0] * 2 and first.target.tolist() == [1.0]
