"""The constraint on a model: right value and gradient in every mode, and never silently absent."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import is_kernels_available

from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.constraint.input_norm import find_norm
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder
from procon.ops.autograd import RmsNormConstrain

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")
WITHOUT_RMS_NORM = ("gpt2", "gpt_neox")

both_ways = pytest.mark.parametrize("fuse", ["auto", "never"])


def random_directions(model, seed: int = 0) -> Directions:
    decoder = find_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(
        torch.randn(len(decoder.blocks), decoder.hidden_size, generator=generator), dim=1
    )
    gap = torch.rand(len(decoder.blocks), generator=generator) + 0.5
    return Directions(unit[:, None], gap[:, None])


def random_batch(blocks: int, rows: int = 2, length: int = 9) -> tuple[dict, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    anchors = torch.randn(rows, length, blocks, generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < 0.6).float()
    return {"input_ids": ids, "labels": ids}, anchors, mask


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_definition(model, directions, batch, anchors, mask):
    """CE + penalty from ``output_hidden_states``: the input of block l is its entry l."""
    model.zero_grad()
    output = model(**batch, output_hidden_states=True)
    error = torch.stack(
        [h @ r for h, r in zip(output.hidden_states, directions.basis[:, 0].to(model.dtype), strict=False)], -1
    ) - anchors.to(model.dtype)
    penalty = (error.square().mean(-1) * mask).sum() / mask.sum()
    (output.loss + 3 * penalty).backward()
    return penalty.detach(), gradients(model)


def constrained(model, directions, batch, anchors, mask, *, fuse="auto", **settings):
    with ProjectionConstraint(directions, **{"penalty": "squared", **settings}).attach(model, fuse=fuse) as constraint:
        return constrained_by(constraint, model, batch, anchors, mask)


def constrained_by(constraint, model, batch, anchors, mask):
    model.zero_grad()
    constraint.set_target(anchors, mask)
    loss = model(**batch).loss
    penalty = constraint.penalty()
    (loss + 3 * penalty).backward()
    return penalty.detach(), gradients(model)


def assert_same(one, two, *, relative=1e-5):
    torch.testing.assert_close(one[0], two[0], rtol=relative, atol=0)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        difference = (gradient - two[1][name]).norm()
        assert difference <= relative * gradient.norm() + 1e-9, name


@both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_by_definition(tiny_model, family, fuse):
    model = tiny_model(family).eval()  # GPT-2 has dropout
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    assert_same(
        by_definition(model, directions, batch, anchors, mask),
        constrained(model, directions, batch, anchors, mask, fuse=fuse),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_carry_the_constraint(tiny_model, family, caplog):
    model = tiny_model(family)
    with (
        caplog.at_level("INFO", "procon"),
        ProjectionConstraint(random_directions(model), penalty="squared").attach(model) as constraint,
    ):
        assert constraint.fused == (() if family in WITHOUT_RMS_NORM else (0, 1, 2))
        (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("procon")]
        why = " (its blocks have no RMSNorm)" if family in WITHOUT_RMS_NORM else ""
        assert line.endswith(f", {'none' if why else 'all'} fused into the blocks' norms{why}")
    assert constraint.fused == ()
    assert ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse="never").fused == ()


@both_ways
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_or_is_refused(tiny_model, reentrant, fuse):
    model = tiny_model().train()
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    plain = constrained(model, directions, batch, anchors, mask, fuse=fuse)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Norms lie inside the checkpoint, where a reentrant one has no gradients; so do hooks on blocks up to
    # transformers 5.17.
    if reentrant and (fuse == "auto" or "__call__" in vars(GradientCheckpointingLayer)):
        with pytest.raises(ProConError, match="use_reentrant=False"):
            constrained(model, directions, batch, anchors, mask, fuse=fuse)
    else:
        assert_same(plain, constrained(model, directions, batch, anchors, mask, fuse=fuse))


def test_tokens_of_the_whole_step_divide(tiny_model):
    model = tiny_model()
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    with ProjectionConstraint(directions, penalty="squared").attach(model) as constraint:
        constraint.set_target(anchors, mask)
        model(**batch)
        half = constraint.penalty(tokens=2 * mask.sum()).item()
        assert half == pytest.approx(0.5 * constraint.penalty().item())


@both_ways
def test_attach_and_detach_leave_no_trace(tiny_model, fuse):
    model = tiny_model()
    batch, _, _ = random_batch(3)

    def state() -> list[tuple]:
        return [(name, set(vars(module)), list(module._forward_pre_hooks)) for name, module in model.named_modules()]

    before, loss = state(), model(**batch).loss
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse):
        assert state() != before
    assert state() == before
    assert torch.equal(model(**batch).loss, loss)


@both_ways
def test_disabled_constraint_runs_plainly(tiny_model, fuse):
    model = tiny_model().train()
    batch, _, _ = random_batch(3)
    expected = model(**batch).loss
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
        constraint.enabled = False
        assert torch.equal(model(**batch).loss, expected)


def test_a_norm_that_someone_else_has_patched_is_left_alone(tiny_model):
    model = tiny_model()
    norm = find_decoder(model).blocks[1].input_layernorm
    norm.forward = lambda hidden_states: type(norm).forward(norm, hidden_states)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model) as constraint:
        assert constraint.fused == (0, 2)


#: A package for the hub of kernels, with a layer that computes what transformers' own one does.
NORM = """import torch

class layers:
    class RMSNorm(torch.nn.Module):
        def forward(self, hidden_states):
            hidden = hidden_states.float()
            normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * normed.to(hidden_states.dtype)
"""


@pytest.fixture(params=["at once", "with the mode"])
def kernelize(request, tmp_path, monkeypatch):
    """Puts that layer in the place of each RMSNorm, as the package does, or whenever the mode changes, as transformers.

    The second model was loaded where there is no layer for it, and then moved.
    """
    kernels = pytest.importorskip("kernels")
    folder = tmp_path / "build" / "torch-universal"
    folder.mkdir(parents=True)
    about = {"name": "norm", "id": "_norm", "version": 1, "license": "Apache-2.0", "python-depends": []}
    (folder / "metadata.json").write_text(json.dumps(about | {"backend": {"type": "cpu"}}))
    (folder / "__init__.py").write_text(NORM)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)

    def put(model, *_: object) -> None:
        mode = kernels.Mode.TRAINING if model.training else kernels.Mode.INFERENCE
        kernels.kernelize(model, mode=mode, device="cpu")

    def put_with_the_mode(model) -> None:
        if not is_kernels_available():  # in a version that this transformers takes
            model._use_kernels, model.set_use_kernels = True, partial(put, model)
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            model.set_use_kernels(True)

    repository = kernels.LocalLayerRepository(tmp_path, layer_name="RMSNorm")
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": repository}}, inherit_mapping=False):
        yield put if request.param == "at once" else put_with_the_mode


def fused_calls(constraint, monkeypatch) -> list[str]:
    """Fills with a name for each norm that does the constraint's work."""
    calls, apply = [], RmsNormConstrain.apply

    def counted(*args):
        calls.append("fused")
        return apply(*args)

    monkeypatch.setattr(RmsNormConstrain, "apply", counted)
    return calls


@pytest.mark.newest  # the package marks what it has put in place since its version 0.19
@both_ways
@pytest.mark.parametrize("first", ["kernels", "constraint"])
def test_kernels_of_the_hub_and_the_constraint(tiny_model, kernelize, monkeypatch, first, fuse):
    """The op stays in the norms whichever came first, and detaching gives back what the package has put there last."""
    batch, anchors, mask = random_batch(3)
    model = tiny_model().train()
    norm = find_decoder(model).blocks[0].input_layernorm
    expected = by_definition(model, random_directions(model), batch, anchors, mask)
    if first == "kernels":
        kernelize(model.eval())
    constraint = ProjectionConstraint(random_directions(model), penalty="squared").attach(model.train(), fuse)
    calls = fused_calls(constraint, monkeypatch)
    if first == "constraint":
        kernelize(model)
    for _ in range(2):
        assert_same(constrained_by(constraint, model, batch, anchors, mask), expected)
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train()
    assert len(calls) == (6 if fuse == "auto" else 0)
    if getattr(model, "use_kernels", False):
        model.set_use_kernels(False)
        constrained_by(constraint, model, batch, anchors, mask)
    constraint.detach()
    kernel = vars(norm).get("forward")
    assert getattr(kernel, "__func__", type(norm).forward).__module__ in ("_norm", type(norm).__module__)
    assert type(kernel).__name__ != "ModuleForward"
    model(**batch)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_detaching_after_a_kernel_has_been_taken_away(tiny_model, device):
    """On a device without a mapping, the package removes the norm's own forward."""
    model = tiny_model().to(device)
    constraint = ProjectionConstraint(random_directions(model)).attach(model)
    norm = find_decoder(model).blocks[0].input_layernorm
    del norm.forward
    constraint.detach()
    assert "forward" not in vars(norm)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_loaded_model_is_fused(tiny_model, family, tmp_path, monkeypatch):
    """``from_pretrained`` switches the hub's kernels on by itself where the package ``kernels`` is installed."""
    tiny_model(family).save_pretrained(tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family).train()
    batch, anchors, mask = random_batch(3)
    expected = by_definition(model, random_directions(model), batch, anchors, mask)
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model) as constraint:
        calls = fused_calls(constraint, monkeypatch)
        for _ in range(2):
            assert_same(constrained_by(constraint, model, batch, anchors, mask), expected)
            model.zero_grad()
            model.eval().train()
        assert constraint.fusion == "all fused into the blocks' norms"
        assert len(calls) == 6
    for name, module in model.named_modules():
        assert before[name].keys() == vars(module).keys()
        assert "forward" not in vars(module) or vars(module)["forward"] == before[name]["forward"]


@both_ways
def test_evaluation_between_target_and_backward_is_left_alone(tiny_model, fuse):
    model = tiny_model().train()
    batch, anchors, mask = random_batch(3)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
        constraint.set_target(anchors, mask)
        loss = model(**batch).loss + constraint.penalty()
        model.eval()
        with torch.no_grad():
            model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.train()
        loss.backward()


@both_ways
def test_never_silently_unconstrained(tiny_model, fuse):
    model = tiny_model().train()
    batch, anchors, mask = random_batch(3)
    constraint = ProjectionConstraint(random_directions(model), penalty="squared")
    with pytest.raises(ProConError, match="attached to no model"):
        constraint.set_target(anchors, mask)
    with constraint.attach(model, fuse=fuse):
        with pytest.raises(ProConError, match="attached already"):
            constraint.attach(model)
        with pytest.raises(ProConError, match="without anchors"):
            model(**batch)
        with pytest.raises(ProConError, match="no target is set"):
            constraint.penalty()
        constraint.set_target(anchors, mask)
        with pytest.raises(ProConError, match="0 of 3 constrained blocks"):
            constraint.penalty()
        model(**batch)
        with pytest.raises(ProConError, match="ran twice for one target"):
            model(**batch)
        constraint.set_target(anchors[:, :-1], mask[:, :-1])
        with pytest.raises(ProConError, match="hidden states of shape"):
            model(**batch)
        with pytest.raises(ProConError, match="anchors have shape"):
            constraint.set_target(anchors[..., :2], mask)


@both_ways
def test_frozen_model_is_refused(tiny_model, fuse):
    model = tiny_model().train().requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    batch, anchors, mask = random_batch(3)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
        constraint.set_target(anchors, mask)
        model(**batch)
        with pytest.raises(ProConError, match="cannot act"):
            constraint.penalty()


@both_ways
@pytest.mark.parametrize(
    "first",
    [
        lambda loss, by: torch.autograd.grad(loss, by, create_graph=True),
        lambda loss, _: loss.backward(create_graph=True),
    ],
    ids=["autograd.grad", "backward"],
)
def test_a_second_derivative_is_refused(tiny_model, fuse, first):
    model = tiny_model(attn_implementation="eager").train()
    batch, anchors, mask = random_batch(3)
    with ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse) as constraint:
        constraint.set_target(anchors, mask)
        loss = model(**batch).loss + constraint.penalty()
        with pytest.raises(ProConError, match="no second derivative"):
            first(loss, [*model.parameters()])


def test_directions_of_another_model_are_refused(tiny_model):
    directions = random_directions(tiny_model())
    with pytest.raises(ProConError, match="directions are for 3 blocks of width 32, but the model has 2 blocks"):
        ProjectionConstraint(directions, penalty="squared").attach(tiny_model(num_hidden_layers=2))


@both_ways
def test_compiled_model(tiny_model, fuse):
    model = tiny_model()
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    expected = constrained(model, directions, batch, anchors, mask)
    model.zero_grad()
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        compiled = torch.compile(model, backend="aot_eager")
        constraint.set_target(anchors, mask)
        loss = compiled(**batch).loss
        penalty = constraint.penalty()
        (loss + 3 * penalty).backward()
    torch._dynamo.reset()
    assert_same(expected, (penalty.detach(), gradients(model)))


@both_ways
def test_autocast(tiny_model, fuse):
    """The op computes in float32 under autocast too: what the blocks read is all that differs."""
    model = tiny_model()
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        error = torch.stack([h.float() @ r for h, r in zip(states, directions.basis[:, 0], strict=False)], -1) - anchors
        penalty, _ = constrained(model, directions, batch, anchors, mask, fuse=fuse)
    expected = (error.square().mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=0)


def test_an_attach_that_fails_leaves_the_model_as_it_was(tiny_model, random_directions, monkeypatch):
    model = tiny_model()
    constraint = ProjectionConstraint(random_directions(model))
    found = []

    def find(decoder, index):
        if found:
            raise RuntimeError("the second block cannot be read")
        found.append(find_norm(decoder, index))
        return found[0]

    with monkeypatch.context() as patched:
        patched.setattr("procon.constraint.constraint.find_norm", find)
        with pytest.raises(RuntimeError, match="second block"):
            constraint.attach(model)
    assert found[0].module is find_decoder(model).blocks[0].input_layernorm
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert constraint.attach(model).fused == (0, 1, 2)


@both_ways
@pytest.mark.parametrize(
    ("family", "trained"),
    [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("opt", "model.decoder.final_layer_norm")],
)
def test_a_final_norm_alone_is_refused(tiny_model, random_directions, family, trained, fuse):
    """It follows all blocks. OPT's stands before them, so that only the graph tells."""
    model = tiny_model(family, **({"ffn_dim": 64, "word_embed_proj_dim": 32} if family == "opt" else {})).train()
    model.requires_grad_(False)
    model.get_submodule(trained).requires_grad_()
    model.enable_input_require_grads()
    batch, anchors, mask = random_batch(3)
    with ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse) as constraint:
        for _ in range(2):
            constraint.set_target(anchors, mask)
            model(**batch)
            with pytest.raises(ProConError, match="nothing below a constrained block trains"):
                constraint.penalty()


@both_ways
def test_a_norm_that_only_its_own_block_trains_is_no_parameter_below(tiny_model, random_directions, fuse):
    """The op has an edge to the norm's weight, and no gradient of the penalty for it."""
    model = tiny_model("llama", num_hidden_layers=1).train()
    model.requires_grad_(False)
    block = find_decoder(model).blocks[0]
    block.input_layernorm.weight.requires_grad_()
    model.model.extra = torch.nn.Linear(2, 2)  # counts as feeding the blocks, and is never called
    model.enable_input_require_grads()
    batch, anchors, mask = random_batch(1)
    with ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse) as constraint:
        constraint.set_target(anchors, mask)
        model(**batch)
        with pytest.raises(ProConError, match="nothing below a constrained block trains"):
            constraint.penalty()


@both_ways
def test_weights_that_add_up_to_less_than_one(tiny_model, random_directions, fuse):
    """The mean is weighted all the same; without any token it is 0."""
    model = tiny_model()
    directions = random_directions(model)
    batch, anchors, mask = random_batch(3)
    expected, _ = by_definition(model, directions, batch, anchors, mask)
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        for scale in (1e-3, 0.0):
            constraint.set_target(anchors, scale * mask)
            model(**batch)
            torch.testing.assert_close(constraint.penalty(), expected if scale else torch.tensor(0.0))
    found = constrained_tokens([{"constraint_mask": 1e-3 * mask}, {"constraint_mask": 0 * mask}])
    torch.testing.assert_close(found, 1e-3 * mask.sum())
    assert constrained_tokens([{"constraint_mask": 0 * mask}]) == 1


def test_anchors_are_float32_whatever_the_default(tiny_model, random_directions):
    model = tiny_model()
    with ProjectionConstraint(random_directions(model)).attach(model) as constraint:
        anchors = torch.randn(2, 9, len(constraint.blocks)).bfloat16()
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            constraint.set_target(anchors, torch.ones(2, 9))
        finally:
            torch.set_default_dtype(default)
        assert constraint._state.target.anchors.dtype == torch.float32
