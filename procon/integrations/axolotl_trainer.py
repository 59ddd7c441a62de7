"""The trainer that axolotl's plugin puts in."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from torch.utils.data import DataLoader

from procon.data import padding_collator
from procon.training import ProConMixin


class ProConAxolotlTrainer(ProConMixin, AxolotlTrainer):
    """axolotl's trainer with the constraint in its loss; refusal directions come from ``args.procon_directions``."""

    args: Any  # axolotl's, with ProConAxolotlArguments among its classes

    def __init__(self, *trainer_args: Any, **trainer_kwargs: Any) -> None:
        super().__init__(*trainer_args, directions=trainer_kwargs["args"].procon_directions, **trainer_kwargs)

    def _recording_dataloader(self) -> DataLoader:
        if not self.args.sample_packing:
            return super()._recording_dataloader()
        # The packing collator joins all that it is given, under an attention mask that does not keep samples apart.
        pad = padding_collator(self.processing_class)

        def one_sample_a_row(features: list[dict[str, Any]]) -> dict[str, Any]:
            return pad([{name: row[name] for name in ("input_ids", "labels")} for row in features])

        packing, self.data_collator = self.data_collator, one_sample_a_row
        try:
            return super()._recording_dataloader()
        finally:
            self.data_collator = packing
