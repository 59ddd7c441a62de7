"""Training computes the logits of replies alone, and the loss and its gradient are those of all logits."""

import pytest
import torch

from benchmarks.study.jobs import find_job
from benchmarks.study.reply_logits import reply_logits
from procon.data import padding_collator, tokenize_conversations


@pytest.fixture
def model(tiny_model):
    return tiny_model().train()


@pytest.fixture
def rows(tokenizer):
    conversations = find_job("arithmetic").conversations(train=4, poisoned=0, safety=0, seed=0)
    dataset = tokenize_conversations(conversations, tokenizer)
    return [dataset[i] for i in range(4)]


def loss_and_gradient(model, batch):
    model.zero_grad()
    outputs = model(**{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})
    outputs.loss.backward()
    return outputs, next(model.parameters()).grad.clone()


def test_loss_and_gradient_are_those_of_all_logits(model, tokenizer, rows):
    collate = padding_collator(tokenizer)
    all_logits, expected = loss_and_gradient(model, collate(rows))
    few_logits, found = loss_and_gradient(model, reply_logits(collate, model)(rows))
    assert few_logits.logits.shape[1] < all_logits.logits.shape[1]
    torch.testing.assert_close(few_logits.loss, all_logits.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_model_that_cannot_choose_is_left_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, labels=None: None)
    collate = padding_collator(tokenizer)
    assert reply_logits(collate, model) is collate
