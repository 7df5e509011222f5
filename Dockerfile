# CPU:  docker build -t kv-lm-eval --build-arg TORCH_INDEX=<PyTorch's CPU index> .
# CUDA: docker build -t kv-lm-eval --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
# Run:  docker run --rm -v "$PWD/out:/work" kv-lm-eval quickstart
#       docker run --rm --gpus all -v "$PWD/out:/work" -v "$HOME/.cache/huggingface:/cache" kv-lm-eval run ...
ARG BASE=ubuntu:24.04
# hadolint ignore=DL3006
FROM ${BASE}

# An index with another build of torch, such as the CPU one (pytorch.org names it); empty: PyPI's, which is for CUDA.
ARG TORCH_INDEX=""

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/kv \
    && useradd --create-home --uid 10001 kv \
    && mkdir -p /work /cache \
    && chown kv /work /cache
ENV PATH=/opt/kv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache

WORKDIR /src
# torch alone, so that a change of ours does not fetch it again
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY . .
RUN pip install --no-cache-dir -c constraints.txt . \
    && kv-lm-eval methods > /dev/null

USER 10001
WORKDIR /work
ENTRYPOINT ["kv-lm-eval"]
CMD ["--help"]
