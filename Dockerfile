# ProCon with its command line, TRL and the quickstart's model reader. From a checkout:
#
#     docker build --tag procon .
#     docker run --rm --volume "$PWD/work:/work" procon quickstart
#     docker run --rm --volume "$PWD/work:/work" --gpus all procon train --model MODEL --data data.jsonl
#
# Without a GPU, TORCH="torch==VERSION+cpu" and --build-arg PIP_OPTIONS (the index that has it) make it a few GB smaller.
FROM python:3.11-slim

# Triton compiles the launcher of each kernel with a C compiler when it first runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch in a layer of its own: it is most of the image, and does not change with the code.
ARG TORCH="torch>=2.11,<3"
ARG PIP_OPTIONS=""
RUN pip install --no-cache-dir ${PIP_OPTIONS} "${TORCH}"

COPY setup.py pyproject.toml README.md LICENSE /source/
COPY procon /source/procon
COPY kernels /source/kernels
RUN pip install --no-cache-dir ${PIP_OPTIONS} "/source[demo,trl]"

# Not as root. Models, data and what comes out are in /work; downloads are kept there, too.
RUN useradd --create-home --uid 1000 procon && install --directory --owner procon /work
USER procon
WORKDIR /work
ENV PROCON_CACHE=/work/.cache/procon HF_HOME=/work/.cache/huggingface

ENTRYPOINT ["procon"]
CMD ["--help"]
