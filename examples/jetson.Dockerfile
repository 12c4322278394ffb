# JetPack 6 in a container, with the runtime without torch: ONNX Runtime on the CPU, and the cuda and TensorRT backends on the Orin's GPU.
#   docker build -f examples/jetson.Dockerfile -t flashhead-jetson .        (on the board, or with buildx for linux/arm64)
#   docker run --runtime nvidia --rm -v "$PWD/OUT:/model:ro" flashhead-jetson generate /model --prompt "Hello"
# JetPack 7: --build-arg BASE= one of NVIDIA's images for Arm servers with TensorRT and Python 3.12 (tensorrt:NN.NN-py3), which run on Thor. Not tried.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

# hadolint ignore=DL3006
FROM ${BASE} AS build
WORKDIR /src
COPY . .
# the base's own release of Ubuntu says which versions there are
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
# TensorRT is a package of the base's Python: the environment must see it
RUN python3 -m venv --system-site-packages /opt/flashhead \
    && /opt/flashhead/bin/pip install --no-cache-dir ".[jetson,serve]"

# hadolint ignore=DL3006
FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --groups video --create-home flashhead
COPY --from=build /opt/flashhead /opt/flashhead
ENV PATH=/opt/flashhead/bin:$PATH
# compiled kernels are kept here: mount a volume, and the second start is quick
VOLUME /home/flashhead/.cache
USER 1000
WORKDIR /home/flashhead
ENTRYPOINT ["flashhead"]
CMD ["doctor"]
