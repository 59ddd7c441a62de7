"""What each source of anchors costs: plain functions of a job's size. Bytes, seconds, and shares of training time.

Nothing is measured here. What was, such as seconds per look-up, comes in as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.shapes import SHAPES
from procon.settings import AnchorSettings

#: Bytes of an anchor: one fp32 number per token, site and direction.
ANCHOR_BYTES = 4

#: Bytes of a sequence's entry in a file's index: two keys, an offset and a checksum.
INDEX_BYTES_ON_DISK = 32

#: Bytes of a sequence's entry in the index of an opened store: the same, with its length and its file; its key twice.
INDEX_BYTES_IN_MEMORY = 48

#: Probes as a trainer has them by default: prompts, those of them that one run takes, and steps from one run to the
#: next. Each has so many tokens, as a short request in a chat template.
PROBES, PROBE_BATCH, PROBE_EVERY = AnchorSettings.probe_count, AnchorSettings.probe_batch, AnchorSettings.probe_every
PROBE_TOKENS = 40

#: Of a step's work in units of one forward: backward through activations alone, or to the weights as well.
BACKWARD_FORWARDS = {"lora": 1, "full": 2}


@dataclass(frozen=True)
class Model:
    """A decoder's size.

    Attributes:
        blocks: L, and of sites at most as many: all block inputs but the first, and the last output.
        width: D.
        decoder: parameters of the blocks, which every token passes.
        embedding: of the embedding of tokens, which no token is multiplied with.
        head: of the LM head: those of the embedding, if they are tied.
        tied: whether embedding and head are one.
        attention: width in and width out of each attention projection of a block.
    """

    name: str
    blocks: int
    width: int
    decoder: int
    embedding: int
    head: int
    tied: bool
    attention: tuple[tuple[int, int], ...]

    @classmethod
    def llama(cls, name: str, shape: dict) -> Model:
        """Of a Llama's configuration, as :data:`benchmarks.harness.shapes.SHAPES` has them."""
        blocks, width, inner = shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]
        narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
        attention = ((width, width), (width, narrow), (width, narrow), (width, width))
        per_block = sum(a * b for a, b in attention) + 3 * width * inner + 2 * width
        vocabulary = shape["vocab_size"] * width
        return cls(
            name=name,
            blocks=blocks,
            width=width,
            decoder=blocks * per_block + width,
            embedding=vocabulary,
            head=vocabulary,
            tied=shape["tie_word_embeddings"],
            attention=attention,
        )

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.decoder + self.embedding + (0 if self.tied else self.head)

    def adapter(self, rank: int = 8) -> int:
        """Parameters of a LoRA adapter of that rank on the four attention projections."""
        return self.blocks * sum(rank * (a + b) for a, b in self.attention)


MODELS = (
    Model.llama("SmolLM2-135M", SHAPES["SmolLM2-135M"]),
    Model.llama("Llama-3-8B", SHAPES["Llama-3-8B"]),
    Model.llama(
        "Llama-3-70B",
        {
            **SHAPES["Llama-3-8B"],
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
)


@dataclass(frozen=True)
class Ranks:
    """How a job is spread.

    Attributes:
        count: processes, one per GPU.
        per_host: of them on one host, at most.
        shared: whether all hosts see one file system.
    """

    count: int
    per_host: int = 8
    shared: bool = True

    @property
    def hosts(self) -> int:
        return -(-self.count // self.per_host)

    @property
    def on_a_host(self) -> int:
        """Ranks on one host, at most."""
        return min(self.count, self.per_host)


def recorded_bytes(tokens: int, sites: int, sequences: int = 0, directions: int = 1) -> int:
    """Bytes of recorded anchors on the disk, the headers of files aside (a few hundred bytes for each 64 MiB).

    Args:
        tokens: constrained ones of the data set; epochs do not count.
        sites: constrained places per token.
        sequences: that the tokens are in.
        directions: K per site.
    """
    return tokens * sites * directions * ANCHOR_BYTES + sequences * INDEX_BYTES_ON_DISK


def copies(ranks: Ranks) -> int:
    """How many file systems end up with all recorded anchors: one, or that of each host."""
    return 1 if ranks.shared else ranks.hosts


def exchanged_bytes(stored: int, ranks: Ranks) -> int:
    """Bytes that all ranks together receive once recorded: each file goes to every rank but the one that has it.

    0 if all see one file system. Ranks of one host each receive the file that one of them writes.

    Args:
        stored: bytes of the whole store.
    """
    return 0 if copies(ranks) == 1 else stored * (ranks.count - 1)


def exchange_seconds(stored: int, ranks: Ranks, bytes_per_second: float) -> float:
    """Seconds of that, as files are sent one after the other.

    Args:
        bytes_per_second: of one sender to all others.
    """
    return 0.0 if copies(ranks) == 1 else stored / bytes_per_second


def index_bytes(sequences: int, ranks: Ranks) -> int:
    """Bytes of memory on one host for the index of recorded anchors: one per rank, which its forked workers share."""
    return sequences * INDEX_BYTES_IN_MEMORY * ranks.on_a_host


def forward_share(model: Model, training: str) -> float:
    """A forward without the LM head, as a share of a training step: what a live anchor, or recording, costs.

    In multiplications with weights: those of attention itself and of an adapter are left out, and so is the optimiser.

    Args:
        training: ``"lora"``, whose backward passes activations alone, or ``"full"``.
    """
    return model.decoder / ((model.decoder + model.head) * (1 + BACKWARD_FORWARDS[training]))


def recording_share(forward: float, passes: int) -> float:
    """Time of the recording as a share of training, which passes the data ``passes`` times: epochs, over all runs.

    Args:
        forward: time to record the data over that of a plain epoch.
    """
    return forward / passes


def probe_share(count: int, tokens: int, every: int, step_tokens: int) -> float:
    """Time of the probes as a share of plain training: their tokens over those that one rank trains on in these steps.

    Args:
        count: prompts.
        tokens: of each.
        step_tokens: tokens of one rank per optimiser step.
    """
    return count * tokens / (every * step_tokens)


def probe_bytes(count: int, tokens: int, model: Model, directions: int = 1) -> int:
    """Bytes of the probes' file: ids and length as int64, projections at one token and the last state there in fp32."""
    return count * (8 * (tokens + 1) + ANCHOR_BYTES * (model.blocks * directions + model.width))


def copied_bytes(trainable: int, itemsize: int) -> int:
    """Bytes of memory per rank that live anchors take for a copy of what trains; 0 trainable for a fresh adapter."""
    return trainable * itemsize


def tokens_within(capacity: float, sites: int, tokens_per_sequence: int, directions: int = 1) -> float:
    """Constrained tokens whose recorded anchors take ``capacity`` bytes of disk."""
    per_sequence = recorded_bytes(tokens_per_sequence, sites, 1, directions)
    return capacity / per_sequence * tokens_per_sequence
