# A PC or a workstation, with or without an NVIDIA GPU: no torch, no CUDA toolkit; NVRTC is a wheel, the driver comes from the host.
#   docker build -f examples/workstation.Dockerfile -t flashhead .
#   docker run --rm -v "$PWD/OUT:/model:ro" flashhead generate /model --prompt "Hello"                           (an export, on the CPU)
#   docker run --rm --gpus all -v "$PWD/OUT:/model:ro" flashhead generate /model --backend cuda --prompt "Hello"  (a checkpoint in 4 bits)
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# the versions are Debian 12's
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/flashhead \
    && /opt/flashhead/bin/pip install --no-cache-dir ".[onnx,serve]" "nvidia-cuda-nvrtc==13.0.*" "nvidia-ml-py==13.*"

FROM python:3.12-slim-bookworm
RUN useradd --uid 1000 --create-home flashhead
COPY --from=build /opt/flashhead /opt/flashhead
# what the container toolkit brings in from the host's driver
ENV PATH=/opt/flashhead/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /home/flashhead/.cache
USER 1000
WORKDIR /home/flashhead
ENTRYPOINT ["flashhead"]
CMD ["doctor"]
