"""Two gloo ranks record what the definition says: sharded or not, on one file system or two, with uneven shares.

A folder of its own stands for a rank's file system.
"""

import textwrap

import pytest
import torch
from forked import run_ranks

pytestmark = pytest.mark.slow

COMMON = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    from procon.anchors import Anchors
    from procon.models import find_decoder
    from procon.directions import Directions

    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    ones = torch.ones(3)
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator), dim=1)
    directions = Directions(unit[:, None], ones[:, None])
    rows = [torch.randint(5, 60, (1, length), generator=generator) for length in (12, 7, 23, 5, 9, 16, 3, 30)]
    batches = [{"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < 2, -100, ids)} for ids in rows]
    share = batches[:6] if rank == 0 else batches[6:]
    calls, found = [], {}

    def make(dtype=torch.float64):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2)).to(dtype)
        model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
        return model

    def definition(model):
        with torch.no_grad():
            states = [model(input_ids=ids, output_hidden_states=True).hidden_states for ids in rows]
        return [torch.stack([each[l][0] @ unit[l].to(each[l].dtype) for l in range(3)], -1)[2:] for each in states]

    def record(name, model, share, expected, path):
        calls.clear()
        anchors = Anchors.record(model, share, directions, path, progress=False)
        found[name] = {
            "calls": list(calls),
            "files": sorted(file.name for file in path.iterdir()),
            "size": len(anchors),
            "anchors": torch.cat([anchors.annotate(batch)["anchors"][0, 2:] for batch in batches]),
            "expected": torch.cat(expected),
        }
    """
)

FULLY_SHARD = COMMON + textwrap.dedent(
    """
    import shutil
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from procon.errors import ProConError

    def adapted():
        lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        return get_peft_model(make(), lora).double()

    def shard(model):
        for block in find_decoder(model).blocks:
            fully_shard(block)
        fully_shard(model)
        return model

    base, adapter, own = definition(make()), definition(adapted()), str(rank)
    record("sharded", shard(make()), share, base, root / "sharded" / own)
    record("sharded, one rank without batches", shard(make()), batches if rank else [], base, root / "empty" / own)
    record("sharded, adapter", shard(adapted()), share, adapter, root / "adapter" / own)
    record("apart", make(), share, base, root / "apart" / own)
    record("together", make(), share, base, root / "together")
    # The second rank's host is another one now.
    if rank == 1:
        shutil.rmtree(root / "apart" / own)
    dist.barrier()
    (state,) = {file.name[:16] for file in (root / "apart" / "0").glob("*.safetensors")}
    found["reopened"] = torch.cat(
        [Anchors.reopen(root / "apart" / own, state).annotate(batch)["anchors"][0, 2:] for batch in batches])
    wrapped = torch.nn.parallel.DistributedDataParallel(make())
    record("wrapped", wrapped, share, base, root / "wrapped" / own)

    # Interrupted after the second rank's share was written, which only the first rank has kept.
    for name in ("resumed", "sharded, resumed"):
        whole = root / "sharded" / own
        alone = Anchors.record(make(), batches[6:], directions, root / "rest" / own, progress=False)
        kept = {file.name for file in alone.path.glob("*.safetensors")}
        shutil.copytree(whole, root / name / own)
        for file in (root / name / own).glob("*.safetensors"):
            if rank == 1 or file.name not in kept:
                file.unlink()
    dist.barrier()
    record("resumed", make(), share, base, root / "resumed" / own)
    model = shard(make())
    record("sharded, resumed", model, share, base, root / "sharded, resumed" / own)
    record("sharded, again", model, share, base, root / "sharded, resumed" / own)

    other = make()
    with torch.no_grad():
        other.lm_head.weight += rank
    try:
        record("other", other, share, base, root / "other" / own)
    except ProConError as error:
        found["other"] = str(error)
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()
    """
)

ZERO_3 = COMMON + textwrap.dedent(
    """
    import deepspeed

    # Ranks on one CPU would first compile a way to share memory, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    expected = definition(make(torch.float32))
    deepspeed.init_distributed("gloo")
    model = make(torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    record("sharded", engine, share, expected, root / "sharded" / str(rank))
    engine.backward(engine(**batches[0]).loss)
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()
    """
)


def run(worker: str, root) -> list[dict]:
    script = root / "worker.py"
    script.write_text(worker)
    run_ranks(2, script, root)
    return [torch.load(root / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(FULLY_SHARD, tmp_path_factory.mktemp("recording"))


CASES = [
    "sharded",
    "sharded, one rank without batches",
    "sharded, adapter",
    "apart",
    "together",
    "wrapped",
    "resumed",
    "sharded, resumed",
    "sharded, again",
]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_finds_the_projections_of_all(ranks, case):
    for found in ranks:
        # Computed in float64, kept in float32: half a unit in the last place.
        torch.testing.assert_close(
            found[case]["anchors"].double(), found[case]["expected"], rtol=torch.finfo(torch.float32).eps, atol=0
        )
        assert found[case]["size"] == 8
        assert found[case]["files"] == ranks[0][case]["files"]
        assert len(found[case]["files"]) == (2 if "without" in case else 3)


def test_a_host_that_lacks_the_store_gets_a_copy(ranks):
    for found in ranks:
        assert torch.equal(found["reopened"], found["apart"]["anchors"])


def test_ranks_of_a_sharded_model_run_as_many_forwards(ranks):
    first, second = (found["sharded"]["calls"] for found in ranks)
    # First a token, which shows the precision.
    assert first == [1, 12, 7, 23, 5, 9, 16]
    assert second == [1, 3, 30, 1, 1, 1, 1]
    assert [found["apart"]["calls"] for found in ranks] == [first, second[:3]]


def test_only_what_no_host_has_is_run(ranks):
    assert [found["resumed"]["calls"] for found in ranks] == [[1, 12, 7, 23, 5, 9, 16], [1]]
    assert [found["sharded, resumed"]["calls"] for found in ranks] == [[1, 12, 7, 23, 5, 9, 16], [1] * 7]
    assert [found["sharded, again"]["calls"] for found in ranks] == [[1], [1]]


def test_ranks_with_other_weights_are_refused(ranks):
    assert all("the ranks' models, or what is to be recorded of them, differ" in found["other"] for found in ranks)


def test_zero_3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    for found in run(ZERO_3, tmp_path):
        # Sums in float32, over rows of another number of tokens: a few units in the last place of values of order 1.
        torch.testing.assert_close(found["sharded"]["anchors"], found["sharded"]["expected"], rtol=0, atol=1e-5)
        assert found["sharded"]["size"] == 8
        assert len(found["sharded"]["calls"]) == 7
