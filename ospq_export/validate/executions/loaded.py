"""An engine in memory, run by Polygraphy; tensors live in torch's CUDA memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ospq_export.engines.products import Product, load, load_engine, quiet_polygraphy
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray

_WARM_UP = 3


class LoadedEngine:
    """A serialized engine on the current CUDA device, in batches that its profile takes.

    Args:
        name: how the report calls it.
        product: what built it.
        source: the engine's file, or its bytes.
        file: name of what was deployed, and its size in bytes.

    Raises:
        InputError: the product is missing, or cannot load the engine.
    """

    def __init__(self, name: str, product: Product, source: Path | bytes, file: tuple[str, int]) -> None:
        self.name = name
        trt = load(product)
        self.engine = load_engine(product, source)
        from polygraphy.backend.trt import TrtRunner

        self.runner = TrtRunner(self.engine, name=name)
        with quiet_polygraphy():
            self.runner.activate()
        tensors = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [t for t in tensors if self.engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
        self.input, self.outputs = inputs[0], [t for t in tensors if t not in inputs]
        fixed = int(self.engine.get_tensor_shape(self.input)[0])
        self.fixed_batch = fixed if fixed > 0 else None
        self.batch_size = int(self.engine.get_tensor_profile_shape(self.input, 0)[2][0])
        self.detail = {
            "runtime": f"{product.module} {trt.__version__}",
            "device": torch.cuda.get_device_name(),
            "file": file[0],
            "bytes": str(file[1]),
        }

    def __call__(self, images: FloatArray) -> Outputs:
        """The outputs by name, float32 (B, ...) each, of images (B, C, H, W) float32."""
        x = torch.from_numpy(images).cuda()
        parts = [self._run(part) for part in x.split(self.batch_size)]
        return {n: torch.cat([part[n] for part in parts]).numpy() for n in self.outputs}

    def _run(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        count = len(part)
        if self.fixed_batch is not None and self.fixed_batch > count:
            part = torch.cat([part, part.new_zeros(self.fixed_batch - count, *part.shape[1:])])
        part = part.contiguous()
        # The runner has a stream of its own, which does not wait for torch's.
        torch.cuda.current_stream().synchronize()
        with quiet_polygraphy():
            found = self.runner.infer({self.input: part}, check_inputs=False, copy_outputs_to_host=False)
        # The runner's buffers are its own again at the next call.
        return {name: found[name][:count].float().cpu() for name in self.outputs}

    def graphed(self, images: FloatArray) -> Callable[[], None] | None:
        """One execution of a batch (B, C, H, W) as a CUDA graph, to be replayed and waited for: what the GPU takes, no copies.

        None where the batch is not what the engine takes at once.
        """
        if len(images) > self.batch_size or len(images) != (self.fixed_batch or len(images)):
            return None
        context = self.engine.create_execution_context()
        tensors = {self.input: torch.from_numpy(images).cuda().contiguous()}
        context.set_input_shape(self.input, tuple(images.shape))
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            # As wide as any element type that an engine of ours returns.
            tensors[name] = torch.empty(shape, dtype=torch.float32, device="cuda")
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first calls allocate, which a graph cannot hold.
            for _ in range(_WARM_UP):
                context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

        def replay(held: tuple[object, ...] = (context, tensors)) -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay
