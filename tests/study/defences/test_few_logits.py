"""A batch may ask for the logits of some tokens alone: what a defence makes of it stays the same."""

import pytest
import torch
from first_step import lora_model
from transformers import set_seed

from benchmarks.study.defences import (
    ConstrainedSFTTrainer,
    HiddenStatesTrainer,
    KLToStartTrainer,
    ProjectedGradientsTrainer,
    SafetyStepTrainer,
)
from benchmarks.study.reply_logits import reply_logits
from procon.data import padding_collator
from procon.training import ProConConfig, ProConTrainer


def trained(trainer_class, model, dataset, collator, folder, **own) -> torch.Tensor:
    """What two steps of training leave in the adapter."""
    settings = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
    set_seed(0)
    trainer = trainer_class(
        model,
        ProConConfig(str(folder), save_strategy="no", report_to=[], disable_tqdm=True, **settings),
        train_dataset=dataset,
        data_collator=collator,
        **own,
    )
    trainer.train()
    return _adapter(model)


def _adapter(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("trainer_class", "own"),
    [
        (ConstrainedSFTTrainer, {}),
        (HiddenStatesTrainer, {"alpha": 1.0}),
        (KLToStartTrainer, {"beta": 1.0}),
        (ProjectedGradientsTrainer, {"rho": 1.0}),
        (SafetyStepTrainer, {"tau": 0.1, "radius": 0.1}),
        (ProConTrainer, {}),
    ],
)
def test_training_is_that_with_all_logits(
    trainer_class, own, tiny_model, dataset, tokenizer, random_directions, tmp_path
):
    if trainer_class in (ProjectedGradientsTrainer, SafetyStepTrainer):
        own = {**own, "alignment_dataset": dataset.select([6, 7])}
    found, before = [], []
    for few in (False, True):
        model = lora_model(tiny_model())
        more = {"directions": random_directions(model), "processing_class": tokenizer}
        collate = padding_collator(tokenizer)
        collator = reply_logits(collate, model) if few else collate
        constrained = more if trainer_class is ProConTrainer else {}
        assert (collator is collate) is not few
        before.append(_adapter(model))
        found.append(trained(trainer_class, model.double(), dataset, collator, tmp_path, **own, **constrained))
    assert (found[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
