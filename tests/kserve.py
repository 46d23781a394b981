"""A small server of the KServe v2 protocol with Triton's extensions: it serves a model repository with ONNX Runtime, over HTTP.

JSON and binary tensors, health, metadata, the configuration; batches larger than `max_batch_size` are refused as Triton does.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from ospq_export.world.processor import PRECISE_KERNELS

HEADER = "Inference-Header-Content-Length"


class Model:
    """A folder of the repository."""

    def __init__(self, folder):
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        self.versions = [p.name for p in folder.iterdir() if p.is_dir()]
        path = folder / max(self.versions) / self.config.default_model_filename
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # As on a processor with VNNI; Triton has no parameter for it.
        options.add_session_config_entry(PRECISE_KERNELS, "1")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.ready = True

    def tensors(self, described):
        front = [-1] if self.config.max_batch_size else []
        return [
            {"name": t.name, "datatype": DataType.Name(t.data_type)[5:], "shape": [*front, *t.dims]}
            for t in described
        ]

    def metadata(self):
        inputs, outputs = self.tensors(self.config.input), self.tensors(self.config.output)
        about = {"name": self.config.name, "versions": self.versions, "platform": self.config.platform}
        return {**about, "inputs": inputs, "outputs": outputs}

    def infer(self, feeds, wanted):
        (images,) = feeds.values()
        if self.config.max_batch_size and len(images) > self.config.max_batch_size:
            raise ValueError(f"inference request batch-size must be <= {self.config.max_batch_size}")
        found = self.session.run(wanted, feeds)
        shaped = {t.name: t.HasField("reshape") for t in self.config.output}
        return {n: v[:, None] if shaped[n] else v for n, v in zip(wanted, found, strict=True)}


def parsed(body, length):
    """The request, and its tensors: binary ones lie behind the JSON, one after the other."""
    request, place, feeds = json.loads(body[:length]), length, {}
    for tensor in request["inputs"]:
        dtype, size = (
            triton_to_np_dtype(tensor["datatype"]),
            tensor.get("parameters", {}).get("binary_data_size"),
        )
        values = tensor.get("data") if size is None else np.frombuffer(body[place : place + size], dtype)
        place += size or 0
        feeds[tensor["name"]] = np.asarray(values, dtype).reshape(tensor["shape"])
    return request, feeds


def packed(request, outputs):
    """The answer as JSON, and what lies behind it."""
    binary = {
        o["name"]: o.get("parameters", {}).get("binary_data", False) for o in request.get("outputs", [])
    }
    described, behind = [], b""
    for name, values in outputs.items():
        entry = {"name": name, "datatype": np_to_triton_dtype(values.dtype), "shape": list(values.shape)}
        if binary.get(name):
            entry["parameters"] = {"binary_data_size": values.nbytes}
            behind += np.ascontiguousarray(values).tobytes()
        else:
            entry["data"] = values.flatten().tolist()
        described.append(entry)
    return json.dumps({"outputs": described}).encode(), behind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, head=b"", behind=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(head) + len(behind)))
        if behind:
            self.send_header(HEADER, str(len(head)))
        self.end_headers()
        self.wfile.write(head + behind)

    def model(self, name):
        return self.server.models[name]

    def do_GET(self):
        match self.path.strip("/").split("/"):
            case ["v2"]:
                found = {"name": "small", "version": "1.0", "extensions": ["binary_tensor_data"]}
            case ["v2", "health", _]:
                return self.answer(200)
            case ["v2", "models", name, *_] if name not in self.server.models:
                found = {"error": f"Request for unknown model: '{name}' is not found"}
                return self.answer(400, json.dumps(found).encode())
            case ["v2", "models", name, "ready"]:
                return self.answer(200 if self.model(name).ready else 400)
            case ["v2", "models", name, "config"]:
                found = json_format.MessageToDict(self.model(name).config, preserving_proto_field_name=True)
            case ["v2", "models", name]:
                found = self.model(name).metadata()
            case _:
                return self.answer(404, b'{"error": "not found"}')
        return self.answer(200, json.dumps(found).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.strip("/").split("/")[2]
        request, feeds = parsed(body, int(self.headers.get(HEADER) or len(body)))
        wanted = [o["name"] for o in request.get("outputs", [])] or None
        try:
            head, behind = packed(request, self.model(name).infer(feeds, wanted))
        except Exception as error:
            return self.answer(400, json.dumps({"error": str(error)}).encode())
        self.server.requests.append(len(next(iter(feeds.values()))))
        return self.answer(200, head, behind)


@contextlib.contextmanager
def served(repository):
    """Serve every model of a repository; yields the server, whose `url` is its address and `requests` the batches so far."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models = {p.name: Model(p) for p in repository.iterdir() if p.is_dir()}
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
