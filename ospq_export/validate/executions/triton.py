"""A model that a server serves: NVIDIA's Triton, or whatever speaks the KServe v2 protocol with binary tensors, over HTTP.

Protocol: https://github.com/kserve/open-inference-protocol; Triton's extensions (binary tensor data, model configuration):
https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ospq_export.errors import InputError, reason_of
from ospq_export.onnx.signature import TensorType, signature_of
from ospq_export.runs.files import QUANTIZED_ONNX, QUANTIZED_TENSORS
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import in_batches

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 600.0
_FLOATS = ("FP32", "FP16", "BF16")
# Where a server does not say how many images it takes at once.
_MOST_IMAGES = 32
_WHITE = 255.0
# Normalised pixels come back from float32 to within 1e-4 of an integer; anything further off was none.
_ROUNDING = 0.02


@dataclass(frozen=True)
class Server:
    """Where a model is served.

    Attributes:
        url: "http://host:8000", or https.
        model: its name; None takes the run directory's.
    """

    url: str
    model: str | None = None

    def name(self, run: Run) -> str:
        """What the model is called."""
        return self.model or run.path.resolve().name


class ServedBackend:
    """A served model; images go as it takes them, float32 (B, C, H, W) or uint8 (B, H, W, C), in batches that it allows.

    Args:
        name: how the report calls it.
        run: what it should be of.
        server: where it is.

    Raises:
        InputError: the package tritonclient is missing; no server, no model, or one that is not ready; other inputs or
            outputs than the run's; a model of another run.
    """

    def __init__(self, name: str, run: Run, server: Server) -> None:
        self.name, self.model, self.data = name, server.name(run), run.data
        self.where = f"`triton_model` {self.model}"
        self.client = _client(server)
        with _talking("the server does not answer", f"`url` {server.url}", "start it, or check the address"):
            alive = self.client.is_server_live()
            about = self.client.get_server_metadata() if alive else {}
        if not alive:
            raise InputError("the server is not live", where=f"`url` {server.url}", fix="wait until it is")
        metadata, config = self._described()
        self.input, self.outputs = _check_signature(run, metadata, self.where)
        _check_origin(run, config, self.where)
        self.fixed_batch = self.input.shape[0] if self.input.shape[0] > 0 else None
        self.most = self.fixed_batch or int(config.get("max_batch_size") or _MOST_IMAGES)
        self.detail = {
            "runtime": f"{about.get('name', 'server')} {about.get('version', '')}".strip(),
            "model": f"{self.model}, version {', '.join(metadata.get('versions') or ['unknown'])}",
            "platform": str(metadata.get("platform", "unknown")),
            "input": f"{self.input.dtype} {list(self.input.shape)}",
            **_file_of(run, config),
        }

    def _described(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's metadata, and its configuration where the server tells it."""
        with _talking("the server knows no such model", self.where, "give its name as `triton_model`"):
            ready = self.client.is_model_ready(self.model)
            metadata = self.client.get_model_metadata(self.model)
        if not ready:
            raise InputError("the model is not ready", where=self.where, fix="look at the server's log")
        # Triton's own extension: other servers of the protocol have none.
        with contextlib.suppress(Exception):
            return metadata, self.client.get_model_config(self.model)
        return metadata, {}

    def __call__(self, images: FloatArray) -> Outputs:
        """The outputs by name, float32 (B, ...) each, of images (B, C, H, W) float32.

        Raises:
            InputError: the server fails, or the images are no 8-bit pixels, which the model takes.
        """
        sent: NDArray[Any] = self._pixels(images) if self.input.dtype == "UINT8" else images
        if self.fixed_batch is not None:
            return in_batches(self._ask, sent, self.fixed_batch)
        parts = [self._ask(sent[start : start + self.most]) for start in range(0, len(sent), self.most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _ask(self, images: NDArray[Any]) -> Outputs:
        from tritonclient import http

        kind = np.uint8 if self.input.dtype == "UINT8" else np.float32
        tensor = http.InferInput(self.input.name, list(images.shape), self.input.dtype)
        tensor.set_data_from_numpy(np.ascontiguousarray(images, kind))
        wanted = [http.InferRequestedOutput(name, binary_data=True) for name in self.outputs]
        with _talking("the server failed", self.where, "look at its log"):
            answer = self.client.infer(self.model, [tensor], outputs=wanted)
            found = {name: np.asarray(answer.as_numpy(name), np.float32) for name in self.outputs}
        # A number for each image comes with a dimension that Triton adds.
        return {n: v.reshape(len(images), *v.shape[1:][: self.outputs[n]]) for n, v in found.items()}

    def _pixels(self, images: FloatArray) -> NDArray[np.uint8]:
        """The images before they were normalised, uint8 (B, H, W, C)."""
        mean, std = (np.asarray(v, np.float64).reshape(-1, 1, 1) for v in (self.data.mean, self.data.std))
        pixels = (images * std + mean) * _WHITE
        near = np.rint(pixels)
        if np.abs(pixels - near).max() > _ROUNDING or near.min() < 0 or near.max() > _WHITE:
            raise InputError(
                "the model takes 8-bit pixels, and these images are none",
                where=self.where,
                fix="validate on image files, or serve the file that takes float32 images",
            )
        return np.moveaxis(near.astype(np.uint8), 1, -1)


def check_server(run: Run, server: Server | None) -> None:
    """Hold a served model to the run before any work.

    Raises:
        InputError: as `ServedBackend`, or no server is given.
    """
    ServedBackend("triton", run, given(server)).client.close()


def given(server: Server | None) -> Server:
    """The server.

    Raises:
        InputError: none is given.
    """
    if server is None:
        raise InputError("where the model is served is not given", where="`url`", fix="give http://HOST:8000")
    return server


def _client(server: Server) -> Any:
    try:
        from tritonclient import http
    except ImportError as error:
        fix = "pip install 'ospq-export[triton]'"
        raise InputError(f"a server cannot be asked: {reason_of(error)}", fix=fix) from error
    parts, where = urlsplit(server.url), f"`url` {server.url}"
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError("it is no address of a server", where=where, fix="write it like http://HOST:8000")
    with _talking("the server cannot be reached", where, "check the address"):
        return http.InferenceServerClient(
            parts.netloc + parts.path,
            ssl=parts.scheme == "https",
            connection_timeout=_CONNECT_SECONDS,
            network_timeout=_ANSWER_SECONDS,
        )


@contextlib.contextmanager
def _talking(what: str, where: str, fix: str) -> Iterator[None]:
    """Whatever goes wrong between client and server is one line."""
    try:
        yield
    except Exception as error:
        # Sockets, timeouts, the client's own errors and JSON have no common base.
        raise InputError(f"{what}: {reason_of(error)}", where=where, fix=fix) from error


def _check_signature(run: Run, metadata: dict[str, Any], where: str) -> tuple[TensorType, dict[str, int]]:
    """The model's input, and its outputs with how many dimensions each has for an image, held to the run's file.

    Raises:
        InputError: they differ.
    """
    expected, channels = signature_of(run.file(QUANTIZED_ONNX)), run.data.input_size[0]
    inputs, outputs = (_tensors(metadata.get(side), where) for side in ("inputs", "outputs"))
    if len(inputs) != 1:
        raise _other(f"it has {len(inputs)} inputs, the run takes images alone", where)
    first, size = next(iter(inputs.values())), run.data.input_size[1:]
    shapes = {"FP32": (channels, *size), "UINT8": (*size, channels)}
    if first.dtype not in shapes or not _fits(first.shape[1:], shapes[first.dtype]):
        takes = ", or ".join(f"{kind} {list(shape)}" for kind, shape in shapes.items())
        raise _other(f"it takes {first.dtype} {list(first.shape[1:])}, the run {takes} for an image", where)
    for tensor in expected.outputs:
        found, own = outputs.get(tensor.name), tensor.shape[1:]
        if found is None:
            raise _other(f"it has no output {tensor.name}, only {', '.join(outputs)}", where)
        if found.dtype not in _FLOATS or not _fits(found.shape[1:], own or (1,)):
            text = f"its {tensor.name} is {found.dtype} {list(found.shape[1:])}, the run's FP32 {list(own)}"
            raise _other(text, where)
    return first, {tensor.name: len(tensor.shape) - 1 for tensor in expected.outputs}


def _tensors(described: Any, where: str) -> dict[str, TensorType]:
    try:
        found = (TensorType(t["name"], t["datatype"], tuple(map(int, t["shape"]))) for t in described)
        return {tensor.name: tensor for tensor in found}
    except (KeyError, TypeError, ValueError) as error:
        raise _other("the server does not say what it takes and returns", where) from error


def _fits(found: Sequence[int], expected: Sequence[int]) -> bool:
    return len(found) == len(expected) and all(
        a == b or min(a, b) < 0 for a, b in zip(found, expected, strict=True)
    )


def _other(what: str, where: str) -> InputError:
    return InputError(what, where=where, fix="serve what `export` wrote of this run")


def _parameters(config: dict[str, Any]) -> dict[str, str]:
    held = config.get("parameters") or {}
    return {key: str(value.get("string_value", "")) for key, value in held.items() if isinstance(value, dict)}


def _check_origin(run: Run, config: dict[str, Any], where: str) -> None:
    said = _parameters(config).get("quantized_sha256")
    if said is not None and said != run.manifest.files[QUANTIZED_TENSORS]:
        raise _other("the served model is of another run", where)


def _file_of(run: Run, config: dict[str, Any]) -> dict[str, str]:
    """Which of the run's files is served, where the configuration says so."""
    said = _parameters(config)
    file = said.get("file", "")
    return {"file": file} if file and run.manifest.files.get(file) == said.get("file_sha256") else {}
