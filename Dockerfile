# The server, as an image:  docker build --target cpu -t era-vllm .
#                           docker run -p 8000:8000 --shm-size 1g era-vllm
# Targets: cpu (x86_64, aarch64); tools (what deploy/in_container.sh runs `make` in); cuda (not run
# here: no GPU at hand when it was written). Always name one; cuda stands last because the builder
# before BuildKit makes every stage above the target.
# Optional, beside this file and out of git: wheels/ with *.whl that pip shall prefer, and with
# ca-bundle.crt for a network with a certificate authority of its own.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# Compilers stay in every image: Inductor and Triton compile at run time and include Python.h.
# vLLM's CPU kernels are linked to libnuma.
FROM ${BASE_IMAGE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 \
    && if [ ! -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; \
       then apt-get install -y --no-install-recommends python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*

FROM base AS tools
# git: tests and reports name the commit; the mounted tree is another user's.
RUN apt-get update && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* && git config --system --add safe.directory /src

# What is installed but not ours is a layer of its own: a change of our code does not repeat it.
FROM base AS source
WORKDIR /src
COPY pyproject.toml LICENSE NOTICE ./
COPY LICENSE wheels* ./wheels/
COPY deploy/environment.sh deploy/
RUN touch README.md
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM source AS build-cpu
RUN ERA_VENV=/opt/era ERA_INSTALL=".[cpu]" deploy/environment.sh
COPY era_vllm era_vllm
COPY server server
RUN /opt/era/bin/pip install --no-deps --no-build-isolation --force-reinstall .

FROM base AS runtime
RUN useradd --create-home --uid 10001 era && install -d -o era -g era /models
ENV PATH=/opt/era/bin:$PATH PYTHONUNBUFFERED=1
USER era
WORKDIR /home/era
EXPOSE 8000
# Loading and compiling takes minutes on a small CPU; after that an answer is a few milliseconds.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# A model, and flags, follow: vLLM reads a model only where it comes first. All interfaces are its default.
ENTRYPOINT ["era-vllm", "serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/era /opt/era

# Not run here. The same steps with vLLM's CUDA wheel.
FROM source AS build-cuda
RUN if [ -e wheels/ca-bundle.crt ]; then export PIP_CERT=wheels/ca-bundle.crt; fi \
    && python3 -m venv /opt/era && /opt/era/bin/pip install --find-links wheels ".[cuda]"
COPY era_vllm era_vllm
COPY server server
RUN /opt/era/bin/pip install --no-deps --no-build-isolation --force-reinstall .

FROM runtime AS cuda
COPY --from=build-cuda /opt/era /opt/era
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
