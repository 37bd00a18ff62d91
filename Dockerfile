# The demo in a container. Not built by the project's own checks, so it may lag behind: see CONTRIBUTING.md.
#
#   docker build -t salt-vla .
#   docker run --rm -v "$PWD/out:/work" salt-vla              the demo on the CPU; report in out/runs/demo/
#   docker run --rm --gpus all -v "$PWD/out:/work" salt-vla   the same on a GPU
#
# The registry's own torch for Linux runs on both, at several GB. An image for the CPU alone is much smaller:
# build it with --build-arg TORCH_INDEX=URL, the index of CPU builds that pytorch.org names under "Get started".
# The same argument takes an index of builds for another CUDA version. `out` must be writable by user 1000.
FROM python:3.11-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/salt-vla
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt .

RUN useradd --create-home --uid 1000 salt && mkdir /work && chown salt:salt /work
USER salt
WORKDIR /work
ENV SALT_VLA_ROOT=/work
ENTRYPOINT ["salt-vla"]
CMD ["demo"]
