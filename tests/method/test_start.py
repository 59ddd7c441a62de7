"""Are probes held to the start of this very model, as it trains? Elsewhere a line says so, or training stops."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader

from procon import ProCon, ProConError, ProConSettings
from procon.data import padding_collator
from procon.method import Probes
from procon.method.probes import PROBES_FILE, ProbeTerm
from procon.models import DecoderForward
from procon.models.noise import Noise

#: Families by what draws random numbers in their training.
NOISE = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gpt_bigcode": {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1},
    "phimoe": {
        "router_jitter_noise": 0.3,
        "input_jitter_noise": 0.3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
SILENT = {
    name: {key: 0.0 if isinstance(value, float) else value for key, value in kinds.items()}
    for name, kinds in NOISE.items()
}


@pytest.fixture
def loop(tokenizer, samples, tmp_path):
    """Makes the object and the loader of a loop that keeps few tokens of three probes."""

    def make(model, **settings):
        file = tmp_path / "prompts.txt"
        file.write_text("count to three\nsay it again\nwhy\n")
        given = {"probes": str(file), "probe_reply_tokens": 4, "probe_every": 1, **settings}
        procon = ProCon(model, tokenizer, ProConSettings(**given), folder=tmp_path / "anchors", progress=False)
        return procon, DataLoader(samples, 2, shuffle=True, collate_fn=padding_collator(tokenizer))

    return make


def peaked(model):
    """With predictions as sharp as those of a trained model."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def penalty_of(procon, model, batch) -> float:
    procon.begin(batch)
    loss = model(**batch).loss
    added = procon.loss()
    (loss + added).backward()
    procon.release()
    return float(added)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("family", NOISE)
def test_dropout_and_jitter_are_none_of_the_probes(tiny_model, loop, caplog, family, checkpointing):
    """Value 0 at the start and, moved, value and gradient of a model without; the task's forward keeps its own."""
    model, quiet = (peaked(tiny_model(family, **kinds[family])).train() for kinds in (NOISE, SILENT))
    quiet.load_state_dict(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    procon, loader = loop(model)
    procon.prepare(loader)
    batch = next(iter(loader))
    with caplog.at_level(logging.WARNING, "procon"):
        assert abs(penalty_of(procon, model, batch)) < 1e-6
    assert "before the first step" not in caplog.text
    assert Noise(model).settings
    probes = procon.term(ProbeTerm).probes
    with torch.no_grad():
        for one, other in zip(model.parameters(), quiet.parameters(), strict=True):
            one += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
            other.copy_(one)
    found, gradients = [], []
    for each in (model, quiet):
        each.zero_grad()
        departure = probes.departure(DecoderForward(each))
        if checkpointing and each is model:  # a task with dropout, whose blocks run again in the same backward
            state = torch.get_rng_state()
            departure = departure + 0.0 * each(**batch).loss
            torch.set_rng_state(state)
        departure.backward()
        found.append(float(departure))
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_probes_draw_nothing(tiny_model, loop, family):
    """Losses, their order and the random state are those of training without them."""
    losses = {}
    for weight in (None, 1e-12):
        torch.manual_seed(7)
        model = tiny_model(family, **NOISE[family]).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        procon, loader = loop(
            model,
            **(
                {"probe_weight": weight}
                if weight
                else {"schedule": "0", "probes": "builtin", "probe_reply_tokens": 48, "probe_every": 2}
            ),
        )
        loader = procon.prepare(loader)
        torch.manual_seed(3)
        losses[weight] = []
        for batch in (batch for _ in range(2) for batch in loader):
            procon.begin(batch)
            loss = model(**batch).loss
            (loss + procon.loss()).backward()
            procon.end(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            losses[weight].append(loss.item())
        losses[weight].append(float(torch.rand(())))
    assert losses[None] == pytest.approx(losses[1e-12], rel=1e-4)
    assert losses[None][-1] == losses[1e-12][-1]


def autocast_later(model, run):
    with torch.autocast("cpu", torch.bfloat16):
        run()


def cast_later(model, run):
    model.to(torch.bfloat16)
    run()


def other_weights(model, run):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    run()


def noise_of_its_own(model, run):
    block = model.model.layers[0]
    handle = block.register_forward_hook(lambda _module, _args, hidden: hidden + 0.05 * torch.randn_like(hidden))
    run()
    handle.remove()


def as_recorded(model, run):
    run()


@pytest.mark.parametrize("head", [1, 30])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (as_recorded, None),
        (autocast_later, "recorded in float32, and training runs in bfloat16"),
        (cast_later, "recorded in float32, and training runs in bfloat16"),
        (other_weights, "other weights or other kernels"),
        (noise_of_its_own, "two forwards differ in training"),
    ],
)
@pytest.mark.parametrize("reply_tokens", [4, 0])
def test_a_start_that_is_not_what_was_recorded_is_said(tiny_model, loop, caplog, change, reason, head, reply_tokens):
    model = tiny_model().train()
    model = peaked(model) if head == 30 else model
    procon, loader = loop(model, probe_every=2, probe_reply_tokens=reply_tokens)
    loader = procon.prepare(loader, accumulation=2)
    batch = next(iter(loader))
    with caplog.at_level(logging.WARNING, "procon"):
        for _ in range(2):
            change(model, lambda: penalty_of(procon, model, batch))
    said = [record.getMessage() for record in caplog.records if "before the first step" in record.getMessage()]
    assert len(said) == (reason is not None)
    assert reason is None or (reason in said[0] and "nats away from its recorded predictions" in said[0])


def test_recorded_as_it_trains_nothing_is_said(tiny_model, loop, caplog):
    """Under autocast all along, in bfloat16, with an adapter's dropout."""
    for dtype in (torch.float32, torch.bfloat16):
        model = peaked(tiny_model().to(dtype)).train()
        procon, loader = loop(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loader = procon.prepare(loader)
            penalty_of(procon, model, next(iter(loader)))
    assert "before the first step" not in caplog.text


def test_an_alpha_of_0_at_first_is_no_way_round(tiny_model, loop, caplog):
    model = tiny_model().train()
    procon, loader = loop(model, schedule="0@2steps,0.2")
    loader = procon.prepare(loader)
    other_weights(model, lambda: None)
    batch = next(iter(loader))
    procon.begin(batch)
    procon.loss()
    assert "other weights" in caplog.text


def saved(loop, model, folder):
    procon, loader = loop(model)
    procon.prepare(loader)
    procon.save(folder)
    procon.detach()
    return procon


def test_probes_of_another_start_are_refused(tiny_model, loop, tmp_path):
    """Whole by themselves, but not those that the checkpoint's record names."""
    model = tiny_model().train()
    saved(loop, model, tmp_path / "own")
    other = tiny_model()
    other_weights(other, lambda: None)
    theirs = saved(loop, other, tmp_path / "other")
    (tmp_path / "own" / PROBES_FILE).write_bytes((tmp_path / "other" / PROBES_FILE).read_bytes())
    procon, loader = loop(model)
    with pytest.raises(ProConError, match="are those of another run: resume from a whole checkpoint"):
        procon.prepare(loader, resume=tmp_path / "own")
    procon, loader = loop(other)
    procon.prepare(loader, resume=tmp_path / "other")
    assert procon.term(ProbeTerm).probes.hash == theirs.term(ProbeTerm).probes.hash


def test_tokens_beyond_the_vocabulary_are_refused(tiny_model, loop, tmp_path):
    model = tiny_model().train()
    saved(loop, model, tmp_path / "own")
    smaller = tiny_model(vocab_size=100)
    procon, loader = loop(smaller)
    with pytest.raises(ProConError, match="have tokens that the model, of 100, does not"):
        procon.prepare(loader, resume=tmp_path / "own")


def test_an_encoder_decoder_is_refused_by_name(tiny_model, tokenizer, samples, monkeypatch):
    model = tiny_model()
    model.config.is_encoder_decoder = True
    procon = ProCon(model, tokenizer, progress=False)
    loader = DataLoader(samples, 2, collate_fn=padding_collator(tokenizer))
    with pytest.raises(ProConError, match="is an encoder-decoder"):
        procon.prepare(loader)


def test_replies_end_where_positions_do(tiny_model, tokenizer):
    """GPT-2 has learned so many."""
    settings = ProConSettings(probe_reply_tokens=40)
    lengths = {}
    for positions in (64, 256):
        model = tiny_model("gpt2", max_position_embeddings=positions)
        lengths[positions] = int(Probes.record(model, tokenizer, ["why"], settings=settings, progress=False).lengths[0])
    assert lengths[256] == lengths[64] or lengths[64] == 64
    model = tiny_model("gpt2", max_position_embeddings=8)
    with pytest.raises(ProConError, match="the model takes 8 positions, prompt and reply together"):
        Probes.record(model, tokenizer, ["why"], settings=settings, progress=False)


def test_two_optimizers_that_end_a_step_each_are_told(tiny_model, loop):
    model = tiny_model().train()
    procon, loader = loop(model)
    loader = procon.prepare(loader)
    parameters = [*model.parameters()]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (parameters[:3], parameters[3:])]
    batch = next(iter(loader))
    procon.begin(batch)
    (model(**batch).loss + procon.loss()).backward()
    procon.end(optimizers[0])
    optimizers[0].step()
    with pytest.raises(ProConError, match="call end once per step, also if several optimisers take it"):
        procon.end(optimizers[1])
