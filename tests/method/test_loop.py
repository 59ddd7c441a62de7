"""The object in a plain loop: what a failure, a skipped step and other ranks leave of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from procon import ProCon, ProConError, ProConSettings
from procon.data import padding_collator
from procon.integrations import ProConCallback
from procon.method import Run, Term
from procon.method.tokens import TokenTerm


@pytest.fixture
def loop(tiny_model, tokenizer, samples, random_directions, tmp_path):
    """Makes the object and the loader of a loop."""

    def make(run=None, **settings):
        model = tiny_model().train()
        run = (run or Run)(model, tokenizer, folder=tmp_path / "anchors", progress=False)
        loader = DataLoader(samples, 2, collate_fn=padding_collator(tokenizer))
        settings = ProConSettings(**{"terms": "both", **settings})
        return ProCon(run, None, settings, random_directions(model)), loader

    return make


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def step(procon, batch, optimizer) -> None:
    procon.begin(batch)
    (procon.run.model(**batch).loss + procon.loss()).backward()
    procon.end(optimizer)


def test_one_rank_writes_what_a_checkpoint_has(loop, tmp_path):
    class Other(Run):
        """A rank that is not the main one."""

        def once(self, call, *, all_call=False):
            return call() if self.main else None

        main = True

    procon, loader = loop(Other, terms="tokens")
    procon.prepare(loader)
    procon.run.main = False
    procon.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    procon.run.main = True
    procon.save(tmp_path / "main")
    assert (tmp_path / "main" / "procon.json").is_file()


def test_a_step_that_the_optimizer_skips_is_over(loop):
    """As one of a GradScaler is whose gradients overflow: no step of a term, and the next one begins."""

    class Counts(Term):
        name = "counts"
        steps = ()

        def after_optimizer(self, step, run):
            self.steps = (*self.steps, step.number)

    procon, loader = loop(probe_every=1)
    counts = Counts()
    procon.terms.append(counts)
    batches = iter(procon.prepare(loader))
    optimizer = torch.optim.SGD(procon.run.model.parameters(), lr=1e-3)
    for number in range(3):
        step(procon, next(batches), optimizer)
        if number != 1:
            optimizer.step()
        optimizer.zero_grad()
    assert counts.steps == (0, 2)
    assert procon.step.number == 3
    assert procon.evidence.constrained_steps == 3
    assert not optimizer._optimizer_step_post_hooks
    procon.close()


def test_a_loop_that_stops_before_the_optimizer_leaves_no_hook(loop):
    procon, loader = loop()
    batches = iter(procon.prepare(loader))
    optimizer = torch.optim.SGD(procon.run.model.parameters(), lr=1e-3)
    step(procon, next(batches), optimizer)
    procon.close()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("verb", ["attach", "prepare"])
def test_a_start_that_fails_leaves_the_model_and_the_loader_as_they_were(loop, verb):
    class Fails(Term):
        name = "fails"

    def fail(*_):
        raise ProConError("it fails")

    procon, loader = loop()
    procon.terms.append(Fails())
    setattr(procon.terms[-1], verb, fail)
    collate = loader.collate_fn
    with pytest.raises(ProConError, match=r"^it fails"):
        procon.prepare(loader)
    assert not hooks(procon.run.model)
    assert loader.collate_fn is collate
    procon.terms.pop()
    procon.prepare(loader)
    procon.detach()


def test_a_callback_whose_start_fails_leaves_the_model_as_it_was(make_trainer, random_directions):
    trainer = make_trainer("Trainer", None)
    before = hooks(trainer.model)
    trainer.add_callback(ProConCallback(random_directions(trainer.model), terms="tokens"))
    with torch.no_grad():
        next(trainer.model.model.layers[1].parameters()).fill_(torch.nan)
    with pytest.raises(ProConError, match="are NaN"):
        trainer.train()
    assert hooks(trainer.model) == before


def test_an_epoch_has_the_steps_that_the_ranks_share(loop):
    """Accelerate shares the loader out after it was prepared."""

    class Two(Run):
        groups = 2

    procon, loader = loop(Two, schedule="1@1ep,0", terms="tokens")
    procon.prepare(loader)
    assert procon.steps_per_epoch == 2


def test_directions_that_no_term_uses_are_told_of(tiny_model, tokenizer, random_directions, caplog):
    model = tiny_model()
    assert ProCon(model, tokenizer, directions=random_directions(model)).directions is None
    assert "directions are given, and terms 'probes' use none: the paper's method is terms 'tokens'" in caplog.text
    with pytest.raises(ProConError, match="nowhere"):
        ProCon(model, tokenizer, directions="nowhere.safetensors")
    # Until a term is added that does.
    procon = ProCon(model, tokenizer, directions=random_directions(model))
    procon.terms.append(TokenTerm(ProConSettings(terms="tokens")))
    procon.find()
    assert procon.directions is not None
    assert procon.directions.hash == random_directions(model).hash


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_that_does_not_end_its_steps_is_stopped(loop, accumulation):
    procon, loader = loop(terms="probes")
    batches = iter(procon.prepare(loader, accumulation=accumulation))
    for _ in range(accumulation):
        procon.begin(next(batches))
        assert procon.loss() == 0  # the probes begin with the second step
    procon.begin(next(batches))
    with pytest.raises(ProConError, match=f"^an optimiser step of {accumulation} micro-batches has begun another one"):
        procon.loss()


@pytest.mark.parametrize(("schedule", "acts"), [("0@3steps,1@1steps,0", True), ("1@1steps,0@1steps,1@1steps,0", False)])
def test_probes_act_in_their_own_steps(loop, schedule, acts):
    procon, _ = loop(terms="probes", schedule=schedule)
    if acts:
        procon.check_acts(8)
        return
    with pytest.raises(
        ProConError, match=r"^in none of the 2 steps under the constraint, of 8, would probes act: probe_e"
    ):
        procon.check_acts(8)


def test_prompts_of_ones_own_are_not_asked_for_refusals(loop, tmp_path, recwarn):
    file = tmp_path / "honest.txt"
    file.write_text("What do you not know?\n")
    procon, loader = loop(terms="probes", probes=str(file))
    procon.prepare(loader)
    assert "refuses" not in procon.summary()[0] + "".join(str(found.message) for found in recwarn)


def test_another_term_is_named_when_a_checkpoint_is_resumed(loop, tmp_path):
    procon, loader = loop(terms="probes")
    procon.prepare(loader)
    procon.save(tmp_path / "saved")
    other, loader = loop(terms="both")
    other.directions = None
    with pytest.raises(ProConError, match="was trained with terms 'probes', not 'both'"):
        other.prepare(loader, resume=tmp_path / "saved")


def test_a_stream_needs_no_length(tiny_model, tokenizer, samples):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples)

    model = tiny_model().train()
    loader = DataLoader(Stream(), 2, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match=r"^schedule '1@1ep,0' counts in epochs, which a stream does not have"):
        ProCon(model, tokenizer, ProConSettings(schedule="1@1ep,0"), progress=False).prepare(loader)
    procon = ProCon(model, tokenizer, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in procon.prepare(loader):
        step(procon, batch, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    procon.close()
    assert procon.evidence.constrained_steps == 2  # of four
