"""Two ranks of gloo give the gradient of one."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

WORKER = textwrap.dedent(
    """
    import sys, torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from transformers.data.data_collator import DataCollatorWithFlattening
    from procon.directions import RefusalDirections
    from procon.training import ProConConfig, ProConTrainer

    folder, batch_size = sys.argv[1], int(sys.argv[2])
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (12, 7, 23, 5, 9, 16, 3, 30):
        ids = torch.randint(5, 60, (length,), generator=generator).tolist()
        prompt = length - length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})

    class Gradient(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            moved = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.05 * torch.randn(p.shape, generator=moved, dtype=p.dtype)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.flat = torch.cat([p.grad.flatten() for p in model.parameters()])

    def gradient(schedule):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2)).double()
        unit = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
        ones = torch.ones(3)
        callback = Gradient()
        config = ProConConfig(
            output_dir=folder, procon_schedule=schedule, max_steps=1, max_grad_norm=0, save_strategy="no", report_to=[],
            disable_tqdm=True, per_device_train_batch_size=batch_size, use_cpu=True, ddp_backend="gloo")
        trainer = ProConTrainer(
            model, config, directions=RefusalDirections(unit, ones, ones, ones, ones), callbacks=[callback],
            train_dataset=Dataset.from_list(rows), data_collator=DataCollatorWithFlattening(return_tensors="pt"))
        trainer.train()
        return callback.flat, trainer.args

    (constrained, args), (plain, _) = gradient("procon_s:2"), gradient("0")
    if args.process_index == 0:
        torch.save({"aux": constrained - plain, "world": args.world_size}, f"{folder}/gradient.pt")
    """
)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        result = subprocess.run(
            [*command, str(script), str(folder), str(8 // ranks)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found[ranks] = torch.load(folder / "gradient.pt")
    assert found[2]["world"] == 2
    one, two = found[1]["aux"], found[2]["aux"]
    assert one.norm() > 1e-3
    assert (two - one).norm() <= 1e-5 * one.norm()
