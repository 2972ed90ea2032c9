"""The data collator: a padded batch of tokenised sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux_trainers.data.tokenization import IGNORE_INDEX, TokenizedSequence


@dataclass(frozen=True)
class DataCollator:
    """Pads sequences on the right, to the longest of a batch."""

    pad_token_id: int

    def __call__(self, sequences: Sequence[TokenizedSequence]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, all [sequences, longest] int64."""
        longest = max(len(each.input_ids) for each in sequences)
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(sequences), longest), value) for name, value in padding.items()}
        for index, each in enumerate(sequences):
            length = len(each.input_ids)
            batch["input_ids"][index, :length] = torch.tensor(each.input_ids)
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.tensor(each.labels)
        return batch
