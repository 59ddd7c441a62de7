"""Gradients under the constraint without a Trainer, whole or sharded over two ranks.

``fully_shard`` shards parameters and rows. As DTensors, block inputs are sharded themselves.
"""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import implicit_replication
from transformers import LlamaConfig, LlamaForCausalLM

from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError

ROWS, TOKENS = 4, 10
PLACEMENTS = {
    "replicated": Replicate(),
    "rows": Shard(0),
    "tokens": Shard(1),
    "width": Shard(2),
    "partial": Partial(),
}


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).double().train()


torch.manual_seed(1)
UNIT = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
IDS = torch.randint(0, 64, (ROWS, TOKENS))
EMBEDS = torch.randn(ROWS, TOKENS, 32).double().requires_grad_()
ANCHORS, MASK = torch.randn(ROWS, TOKENS, 3), torch.randint(0, 2, (ROWS, TOKENS)).float()


def constraint(model: LlamaForCausalLM, fuse: str) -> ProjectionConstraint:
    return ProjectionConstraint(Directions(UNIT[:, None], torch.ones(3, 1)), penalty="squared").attach(model, fuse=fuse)


def gradient(model: LlamaForCausalLM) -> torch.Tensor:
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in gradients])


def by_fully_shard(world: int, fuse: str, checkpointed: bool) -> dict:
    """The whole batch on one rank, or a share of it on each."""
    rank = dist.get_rank() if world > 1 else 0
    model = make()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if world > 1:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    with constraint(model, fuse) as attached:
        fused = attached.fused
        attached.set_target(ANCHORS[share], MASK[share])
        output = model(input_ids=IDS[share], labels=IDS[share])
        # FSDP averages over the ranks.
        (output.loss + 3 * world * attached.penalty(tokens=MASK.sum())).backward()
    return {"fused": fused, "gradient": gradient(model)}


def by_placement(placement: Placement | None, fuse: str) -> dict:
    """All tensors of the model are DTensors, and block inputs have that placement."""
    model = make()
    embeds = EMBEDS
    if placement is not None:
        mesh = init_device_mesh("cpu", (2,))
        model = distribute_module(model, mesh)
        embeds = DTensor.from_local(embeds, mesh, [placement if placement.is_partial() else Replicate()])
        embeds = embeds.redistribute(placements=[placement])
    with implicit_replication(), constraint(model, fuse) as attached:
        fused = attached.fused
        attached.set_target(ANCHORS, MASK)
        try:
            output = model(inputs_embeds=embeds)
        except ProConError as error:
            return {"refused": str(error)}
        penalty, rest = attached.penalty(), output.logits.square().mean()
        (3 * penalty + (rest.full_tensor() if isinstance(rest, DTensor) else rest)).backward()
    return {"fused": fused, "penalty": penalty.item(), "gradient": gradient(model)}


def gradients() -> dict[tuple, dict]:
    """By how it was sharded, ``fuse``, and whether blocks were checkpointed."""
    found = {
        (f"{world} by fully_shard", fuse, checkpointed): by_fully_shard(world, fuse, checkpointed)
        for world, fuse, checkpointed in itertools.product((1, 2), ("auto", "never"), (False, True))
    }
    for (name, placement), fuse in itertools.product({"plain": None, **PLACEMENTS}.items(), ("auto", "never")):
        found[name, fuse] = by_placement(placement, fuse)
    return found
