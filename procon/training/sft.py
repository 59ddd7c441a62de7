"""TRL's SFTTrainer under the projection constraint."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from procon.chat import marked_template
from procon.data import to_conversations, tokenize_conversations
from procon.training.config import ProConArguments
from procon.training.trainer import ProConMixin


@dataclass
class ProConSFTConfig(ProConArguments, SFTConfig):
    """TRL's SFTConfig with the settings of the constraint."""


class ProConSFTTrainer(ProConMixin, SFTTrainer):
    """TRL's SFTTrainer with the constraint in its loss, and otherwise the SFTTrainer that it extends::

        trainer = ProConSFTTrainer(
            "model", ProConSFTConfig(procon_schedule="procon_wu:1@4ep"), train_dataset=dataset, peft_config=LoraConfig()
        )

    Packing, padding-free batches, completion and assistant masks: the constrained tokens follow the labels TRL makes.
    If TRL has no training template for a model, where it would refuse ``assistant_only_loss``, conversations get the
    labels of :func:`procon.data.tokenize_conversations`. ``args`` is a :class:`ProConSFTConfig`. The rest is said at
    :class:`procon.training.ProConMixin`.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *trainer_args: Any,
        **trainer_kwargs: Any,
    ) -> None:
        given = (data_collator, train_dataset, eval_dataset, processing_class, *trainer_args)
        self._labels_by_itself = _is_beyond_trl(model, args, train_dataset, processing_class)
        self._labels_chat = trainer_kwargs.get("chat")
        try:
            if self._labels_by_itself:
                args.assistant_only_loss = False  # TRL raises before it prepares data
            super().__init__(model, args, *given, **trainer_kwargs)
        finally:
            if self._labels_by_itself:
                args.assistant_only_loss = True

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        if self._labels_by_itself and "messages" in next(iter(dataset)):
            dataset = tokenize_conversations(to_conversations(dataset), processing_class, chat=self._labels_chat)
        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)


def _is_beyond_trl(model: Any, args: Any, dataset: Any, tokenizer: Any) -> bool:
    """Whether conversations are to be masked by a chat template that has no marks, and for which TRL has none."""
    if not getattr(args, "assistant_only_loss", False) or args.chat_template_path is not None:
        return False
    columns = set(next(iter(dataset or ()), ()))
    if "messages" not in columns or columns & {"input_ids", "image", "images", "chat_template_kwargs"}:
        return False
    if tokenizer is None:  # as TRL finds it
        by_name = isinstance(model, str)
        name, settings = (model, args.model_init_kwargs) if by_name else (model.config._name_or_path, None)
        revision = (settings or {}).get("revision")
        tokenizer = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.chat_template is None:
        return False
    return marked_template(tokenizer) is None
