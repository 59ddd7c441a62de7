# ProCon with its command line, TRL, and what the quickstart needs. From a checkout:
#
#     docker build --tag procon .
#     docker run --rm --user "$(id -u)" --volume "$PWD:/work" procon quickstart
#
# With a GPU, also `--gpus all`. Without one, torch's CPU build makes the image some GB smaller: give `docker build` also
# `--build-arg PIP_OPTIONS="..."` with the options by which PyTorch's page "Get started" has pip find it.
FROM python:3.11-slim

# Triton compiles a launcher for each kernel when it first runs. Its compiler is the distribution's own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch in a layer of its own: it is most of the image, and does not change with the code. Ranges are those of setup.py.
ARG TORCH="torch>=2.11,<3"
ARG PIP_OPTIONS=""
# hadolint ignore=DL3013,SC2086
RUN pip install --no-cache-dir ${PIP_OPTIONS} "${TORCH}"

COPY setup.py pyproject.toml README.md LICENSE /source/
COPY procon /source/procon
COPY kernels /source/kernels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "/source[demo,trl]" && useradd --create-home --uid 1000 procon

# Not as root. Models, data and what comes out are in /work, and so is what is fetched.
USER 1000
WORKDIR /work
ENV HOME=/tmp PROCON_CACHE=/work/.cache/procon HF_HOME=/work/.cache/huggingface

ENTRYPOINT ["procon"]
CMD ["--help"]
