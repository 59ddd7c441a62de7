"""Two gloo ranks of FSDP2 give the gradient of one process, checkpointed or not, whichever way the constraint rides."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

WORKER = textwrap.dedent(
    """
    import itertools, os, sys, torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM
    from procon.constraint import ProjectionConstraint
    from procon.directions import RefusalDirections

    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if world > 1:
        dist.init_process_group("gloo")

    def gradient(fuse, checkpointed):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2)).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        unit = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
        ones = torch.ones(3)
        ids, anchors, mask = torch.randint(0, 64, (4, 9)), torch.randn(4, 9, 3), torch.ones(4, 9)
        share = slice(rank * 4 // world, (rank + 1) * 4 // world)
        if world > 1:
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        directions = RefusalDirections(unit, ones, ones, ones, ones)
        with ProjectionConstraint(directions).attach(model, fuse=fuse) as constraint:
            assert constraint.fused == ((0, 1, 2) if fuse == "auto" else ())
            constraint.target(anchors[share], mask[share])
            output = model(input_ids=ids[share], labels=ids[share])
            # FSDP averages over the ranks.
            (output.loss + 3 * world * constraint.penalty(tokens=mask.sum())).backward()
        gradients = (p.grad.full_tensor() if world > 1 else p.grad for p in model.parameters())
        return torch.cat([g.flatten() for g in gradients])

    found = {choice: gradient(*choice) for choice in itertools.product(("auto", "never"), (False, True))}
    if rank == 0:
        torch.save(found, f"{sys.argv[1]}/{world}.pt")
    if world > 1:
        dist.destroy_process_group()
    """
)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable], launch):
        result = subprocess.run([*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    expected = one["never", False]
    assert expected.norm() > 1e-2
    assert len(two) == 4
    for gradient in (*one.values(), *two.values()):
        # The fused norm computes in float64, transformers' own in float32 within a float64 model.
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
