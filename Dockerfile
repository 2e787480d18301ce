# The same two commands in a container: `make demo` (what it runs unless told otherwise) and `make test`.
#
#   docker build -t cl-graft .
#   docker run --rm cl-graft
#   docker run --rm cl-graft make test
#   docker run --rm cl-graft .venv/bin/cl-graft doctor    # also: which walls of the sandbox the container leaves
#   docker run --rm -v "$PWD/results:/home/graft/results" cl-graft \
#     .venv/bin/cl-graft sweep --scenarios mini --strategies graftllm --allow-code-execution \
#     --out /home/graft/results
#
# (that folder must be writable for the container's user.)
#
# With GPUs, on any image with CUDA's driver libraries and an apt that has Python 3.11 or newer:
#
#   docker build --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX= -t cl-graft .
#   docker run --rm --gpus all cl-graft
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Where pip looks for torch besides the usual place: builds without CUDA, a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# A compiler is for DeepSpeed, which may build parts of itself where there is a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ make \
    && (command -v python3 || apt-get install --yes --no-install-recommends python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home graft

USER graft
WORKDIR /home/graft/cl-graft
COPY --chown=graft:graft . .
RUN PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 make env

CMD ["make", "demo"]
