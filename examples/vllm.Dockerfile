# vLLM's own image with the plugin: serves a FlashHead checkpoint mounted at /model.
#   docker build -f examples/vllm.Dockerfile -t flashhead-vllm .
#   docker run --gpus all --rm -p 8000:8000 -v "$PWD/OUT:/model:ro" flashhead-vllm
FROM vllm/vllm-openai:v0.26.0
WORKDIR /src
COPY . .
# torch and vLLM are the image's own; the versions are those of pyproject.toml
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps . \
    && pip install --no-cache-dir "cuda-core>=1.0" "cuda-bindings>=12.6" "nvidia-cuda-nvrtc>=12.6" filelock click rich gguf prometheus_client
USER 1000
ENV HOME=/tmp
CMD ["--model", "/model", "--host", "0.0.0.0"]
