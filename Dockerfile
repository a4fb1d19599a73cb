# kdray and everything it needs, as two images:
#   docker build --target cpu -t registry.example.com/kdray:cpu .
#   docker build --target gpu -t registry.example.com/kdray:gpu .
# With --build-arg LOCKED=1 they hold the exact versions of requirements/*.lock, and only files whose hashes stand there.
# All nodes of a cluster need the same Python and Ray: build both from one commit.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kdray kdray
COPY actors actors
COPY cluster cluster
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Python's headers come with the image. A C++ compiler: PyTorch and Triton compile kernels as they run. ssh and rsync: Ray's
# launcher reaches nodes with them, from the head's container too. libnuma: vLLM's CPU build.
FROM python:${PYTHON}-slim-bookworm AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 openssh-client rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash kdray \
    && mkdir --parents /home/kdray/.ray /opt/kdray \
    && chown --recursive kdray:kdray /home/kdray
# Ray's launcher asks the image for HOME. No virtual environment: login shells, which Ray and KubeRay start, set PATH anew.
ENV HOME=/home/kdray PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY configs /opt/kdray/configs

FROM base AS cpu
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# As setup.sh does: PyTorch's CPU build first, and without the three packages whose builds are linked to CUDA.
ARG LOCKED=
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install "torch==${TORCH}+cpu" --extra-index-url "${TORCH_INDEX}" \
    && if [ -n "${LOCKED}" ]; then \
        pip install --require-hashes --no-deps --requirement /requirements/cpu.lock && pip install --no-deps /wheels/kdray-*.whl; \
    else \
        pip install "$(echo /wheels/kdray-*.whl)[cpu]" && pip uninstall --yes torchvision torchaudio torchcodec; \
    fi
USER kdray
WORKDIR /home/kdray
RUN kdray --version && ray --version
CMD ["kdray", "--help"]

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG LOCKED=
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=requirements,target=/requirements \
    if [ -n "${LOCKED}" ]; then \
        pip install --require-hashes --no-deps --requirement /requirements/gpu.lock && pip install --no-deps /wheels/kdray-*.whl; \
    else \
        pip install "$(echo /wheels/kdray-*.whl)[gpu]"; \
    fi
USER kdray
WORKDIR /home/kdray
RUN kdray --version && ray --version
CMD ["kdray", "--help"]
