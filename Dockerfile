# The image of a job on a cluster: `torchx run -s kubernetes ... --image REGISTRY/torchrec_qr:1` (docs/launch.md).
#
#     docker build -t REGISTRY/torchrec_qr:1 .
#     docker build --build-arg DEVICE=cpu -t REGISTRY/torchrec_qr:1-cpu .
#
# Docker has not built it yet, and its CUDA set has not run in a container. Its commands were run for the CPU set in a
# bare Debian 12, and a job trained there as user 1000. tests/release/test_dockerfile.py runs them in a folder.

# The CUDA libraries come with torch's wheel, so the base needs none. The driver is the host's.
FROM debian:bookworm-slim

# cuda or cpu: the set of requirements/ that is installed.
ARG DEVICE=cuda

# gcc and python3-dev: Triton compiles its driver at the first launch of a job on a GPU. g++: builds the CPU kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv

# Exact versions first, because this layer has the gigabytes: it is built anew only if one of these files changes.
WORKDIR /opt/torchrec_qr
COPY requirements/base.txt requirements/cpu.txt requirements/cuda.txt requirements/torchrec.txt \
    requirements/trio-2.13.txt requirements/
RUN python -m pip install -r requirements/$DEVICE.txt -c requirements/trio-2.13.txt \
    && python -m pip install --no-deps -r requirements/torchrec.txt -c requirements/trio-2.13.txt

# The library, whose CPU kernels are compiled here.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY torchrec_qr/ torchrec_qr/
RUN python -m pip install --no-deps --no-build-isolation --editable .

# The job, its configs and the benchmarks that launch/components.py starts. They are last, since they change most.
COPY launch/ launch/
COPY benchmarks/ benchmarks/
COPY configs/ configs/

# A user of its own, which must be able to write to the mount of --runs. Where only root can, build with JOB_UID=0.
ARG JOB_UID=1000
RUN useradd --create-home --non-unique --uid $JOB_UID job
USER $JOB_UID

CMD ["torchrec-qr", "doctor"]
