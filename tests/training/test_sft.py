"""TRL's SFTTrainer under the constraint: what is constrained follows TRL's labels, whatever makes them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from procon.data import to_conversations, tokenize_conversations
from procon.directions import DIRECTIONS_FILE, Directions
from procon.errors import ProConError
from procon.sequences import split_batch
from procon.training import ProConMixin

pytest.importorskip("trl", reason="the extra trl")
from procon.training.sft import ProConSFTConfig, ProConSFTTrainer

#: ChatML that says which tokens are the assistant's.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversations() -> list[list[dict]]:
    return [
        [
            {"role": "user", "content": f"count to {number}"},
            {"role": "assistant", "content": " ".join(map(str, range(number)))},
        ]
        for number in range(1, 9)
    ]


def prompt_completion() -> Dataset:
    return Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]} for turns in conversations()])


@pytest.fixture
def trainer(random_directions):
    """A ProConSFTTrainer along random directions, of three steps unless told otherwise."""

    def make(
        model,
        tokenizer,
        folder,
        dataset=None,
        *,
        callbacks=(),
        directions="random",
        peft_config=None,
        eval_dataset=None,
        **settings,
    ):
        defaults = {
            "procon_terms": "tokens",
            "procon_schedule": "procon_s:1",
            "procon_scope": "response",
            "procon_penalty": "squared",
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return ProConSFTTrainer(
            model,
            ProConSFTConfig(output_dir=str(folder), **{**defaults, **settings}),
            directions=random_directions(model) if directions == "random" else directions,
            train_dataset=prompt_completion() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )

    return make


def penalties(run) -> list[float]:
    return [row["procon/penalty"] for row in run.state.log_history if "procon/penalty" in row]


class Seen(TrainerCallback):
    """Keeps each batch as the trainer hands it to the step."""

    def __init__(self):
        self.batches = []

    def watch(self, run) -> None:
        inner = run.training_step

        def step(model, inputs, *args, **kwargs):
            self.batches.append(dict(inputs))
            return inner(model, inputs, *args, **kwargs)

        run.training_step = step


@pytest.mark.parametrize("loaded", [True, False], ids=["tokenizer", "its folder"])
def test_without_a_training_template_labels_are_those_of_procon_train(trainer, tiny_model, tokenizer, tmp_path, loaded):
    """Of this tokenizer's template TRL knows none, and raises."""
    dataset = Dataset.from_list([{"messages": turns} for turns in conversations()])
    expected = tokenize_conversations(to_conversations(dataset), tokenizer)["labels"]
    model = tiny_model()
    if not loaded:
        tokenizer.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
    settings = {"assistant_only_loss": True, "eval_dataset": {"some": dataset}}
    run = trainer(model, tokenizer if loaded else None, tmp_path / "out", dataset, **settings)
    assert run.train_dataset["labels"] == expected
    assert run.eval_dataset["some"]["labels"] == expected
    assert run.args.assistant_only_loss
    run.evaluate(dataset)
    run.train()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
        {"packing": True, "max_length": 128},
        {"packing": True, "max_length": 128, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values()) or "default",
)
def test_constrained_tokens_are_the_labelled_ones(trainer, tiny_model, tokenizer, tmp_path, settings):
    tokenizer.chat_template = TEMPLATE
    dataset = prompt_completion()
    if settings.get("assistant_only_loss"):
        dataset = Dataset.from_list([{"messages": turns} for turns in conversations()])
    seen = Seen()
    run = trainer(tiny_model(), tokenizer, tmp_path, dataset, **settings)
    seen.watch(run)
    run.train()
    assert len(seen.batches) == 3
    for batch in seen.batches:
        labelled = batch["labels"] != -100
        for sequence in split_batch(batch):
            labelled[sequence.row, sequence.start] = False  # no target for the first token
        assert labelled.any()
        assert not labelled.all()
        assert torch.equal(batch["constraint_mask"].bool(), labelled)
    found = penalties(run)
    assert len(found) == 3
    assert found[0] == pytest.approx(0, abs=1e-9)  # the model is at its anchors
    assert found[2] > 1e-6


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"loss_type": "nll", "label_smoothing_factor": 0.1}])
def test_other_losses_are_constrained_too(trainer, tiny_model, tokenizer, tmp_path, settings):
    """Beside some losses TRL runs a second forward, without gradients, for its metrics."""
    strong = trainer(tiny_model(), tokenizer, tmp_path, procon_schedule="procon_s:1000", max_steps=8, **settings)
    weak = trainer(tiny_model(), tokenizer, tmp_path, procon_schedule="procon_s:1e-9", max_steps=8, **settings)
    for run in (strong, weak):
        run.train()
    assert penalties(strong)[-1] < 0.1 * penalties(weak)[-1]


@pytest.mark.gpu
def test_liger_layers(trainer, tiny_model, tokenizer, tmp_path):
    """A norm that Liger replaced is left alone, and the block's input passes through."""
    pytest.importorskip("liger_kernel", reason="the layers of Liger")
    # A GPU that ttsem plays says within backward that it is the CPU, which a checkpoint takes for another device.
    settings = {"use_liger_kernel": True, "gradient_checkpointing": False, "use_cpu": False}
    run = trainer(tiny_model().cuda(), tokenizer, tmp_path, **settings)
    run.train()
    assert run.model.model.layers[0].input_layernorm._get_name() == "LigerRMSNorm"
    assert penalties(run)[-1] > 1e-6


@pytest.mark.gpu
def test_activation_offloading(trainer, tiny_model, tokenizer, tmp_path):
    runs = [
        trainer(tiny_model(), tokenizer, tmp_path, activation_offloading=offloaded, use_cpu=False)
        for offloaded in (False, True)
    ]
    for run in runs:
        run.train()
    assert penalties(runs[1]) == pytest.approx(penalties(runs[0]), rel=1e-5)


def test_one_line_with_lora(tiny_model, tokenizer, tmp_path):
    """A model by name, an adapter by its configuration; directions are extracted from the model that it starts as."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = ProConSFTTrainer(
        str(tmp_path / "model"),
        ProConSFTConfig(
            output_dir=str(tmp_path / "out"),
            procon_terms="tokens",
            procon_schedule="procon_wu:1@1ep",
            num_train_epochs=1,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=prompt_completion(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    )
    run.train()
    assert run.state.global_step == 2
    assert penalties(run)[0] == pytest.approx(0, abs=1e-9)
    kept = Directions.load(tmp_path / "out" / "checkpoint-2" / DIRECTIONS_FILE)
    fresh = Directions.extract(tiny_model(), tokenizer, check_refusal=False, progress=False)
    assert torch.allclose(kept.basis, fresh.basis, atol=1e-5, equal_nan=True)


def test_nothing_to_extract_directions_with(trainer, tiny_model, tokenizer, tmp_path):
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"text": "one two three"}])
    with pytest.raises(
        ProConError, match=r"probes and directions take prompts in .* and its tokenizer has no chat template"
    ):
        trainer(tiny_model(), tokenizer, tmp_path, rows, directions=None)


def test_mixin_wants_its_arguments(tiny_model, tmp_path):
    class Mine(ProConMixin, Trainer):
        pass

    with pytest.raises(ProConError, match="args is a TrainingArguments: pass one that has ProConArguments"):
        Mine(tiny_model(), TrainingArguments(output_dir=str(tmp_path)))


def test_anchors_are_recorded_in_the_precision_of_training(trainer, tiny_model, tokenizer, tmp_path):
    """Weights in float32 under bfloat16 autocast, TRL's default: the model starts at its anchors there too."""
    run = trainer(tiny_model(), tokenizer, tmp_path, bf16=True)
    run.train()
    at_start, *_, at_end = penalties(run)
    assert at_end > 1e-6
    assert at_start < 1e-6 * at_end
