# ospq-export on the CPU: calibrates, exports, builds TensorRT-RTX engines, validates with ONNX Runtime and OpenVINO.
#
#   docker build -t ospq-export .
#   docker run --rm -v "$PWD:/work" ospq-export validate runs/model --data validation/
#
# With a GPU, on TensorRT's own image (YY.MM is its release, with TensorRT 10.8 or later and Python 3.11 or later):
#
#   docker build -t ospq-export:gpu --build-arg BASE=nvcr.io/nvidia/tensorrt:YY.MM-py3 --build-arg EXTRAS=openvino .
#   docker run --rm --gpus all -v "$PWD:/work" ospq-export:gpu export runs/model --engine tensorrt
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG EXTRAS=openvino,tensorrt-rtx,data
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache TORCH_HOME=/cache/torch HF_HOME=/cache/huggingface

COPY . /opt/ospq-export
# A virtual environment that sees the image's packages: TensorRT's image brings its Python package along.
# Where the image has no venv module (Debian and Ubuntu split it off), it is installed first.
RUN python3 -m venv --system-site-packages /opt/venv || \
    (apt-get update && apt-get install -y --no-install-recommends python3-venv && \
    python3 -m venv --system-site-packages /opt/venv)
RUN /opt/venv/bin/pip install "/opt/ospq-export[${EXTRAS}]" -c /opt/ospq-export/constraints.txt
RUN /opt/venv/bin/ospq-export --version && /opt/venv/bin/ospq-export recipe list
RUN mkdir -p /cache /work && chmod 777 /cache

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["ospq-export"]
CMD ["--help"]
