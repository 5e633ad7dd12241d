"""A sequence classifier of transformers, with the blocks on other machines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from petalnode.blocking import BlockingNode
from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.hf.inputs import (
    ID_DTYPES,
    IGNORED,
    read_inputs,
    refuse_attentions,
)
from petalnode.hf.model import RemoteModel
from petalnode.training.modules import check_tensor


class PetalnodeForSequenceClassification(RemoteModel):  # type: ignore[no-untyped-call]
    """A score of each label for a row, made of its last token by ``score``, which is trained.

    ``score`` begins at random, by ``torch.manual_seed``, or with what was trained; it has
    ``num_labels`` rows.
    """

    def __init__(
        self, config: PreTrainedConfig, node: BlockingNode, report: Report = ignore
    ) -> None:
        super().__init__(config, node, report)
        self.num_labels = config.num_labels or 2
        size = self.local.embeddings.weight.shape[1]  # what the head is given
        self.score = nn.Linear(size, self.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=getattr(config, "initializer_range", 0.02))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """As transformers' own. A row's last token is the last that the attention mask leaves
        and that is not ``config.pad_token_id``, where that is set and ids are given.

        Raises ``UsageError`` for several rows where nobody says what padding is.
        """
        refuse_attentions(output_attentions)
        padding = self.config.pad_token_id
        inputs = read_inputs(input_ids, inputs_embeds, attention_mask, position_ids, None)
        unsaid = padding is None and attention_mask is None
        if unsaid and input_ids is not None and len(input_ids) > 1:
            raise UsageError(
                "Several rows are given, and nobody says which tokens are padding.",
                "Give an attention_mask, or set model.config.pad_token_id.",
            )
        collect: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden(inputs, None, inputs.tokens.shape[1], collect)
        normed = self.local.normed(hidden)
        tokens = inputs.mask
        if input_ids is not None and padding is not None:
            tokens = tokens & (input_ids.cpu() != padding)
        scores = self.score(_last(normed, tokens).to(self.score.weight))
        loss = None
        if labels is not None:
            check_labels(labels, *scores.shape)
            loss = self.loss_function(
                logits=scores, labels=labels, pooled_logits=scores, config=self.config
            )
        states = None if collect is None else (*collect[:-1], normed)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=scores,
            hidden_states=states,  # type: ignore[arg-type]  # transformers says FloatTensor
        )
        return output.to_tuple() if return_dict is False else output


def check_labels(labels: Tensor, batch: int, num_labels: int) -> None:
    """Raise ``UsageError`` unless there is one for each row: a whole number below ``num_labels``,
    or numbers to come near."""
    check_tensor("The labels", labels)
    if labels.ndim == 0 or len(labels) != batch:
        raise UsageError(
            f"Labels of shape {tuple(labels.shape)} do not fit {batch} rows.", "Give each row one."
        )
    classes = labels[labels != IGNORED]
    whole = labels.dtype in ID_DTYPES and num_labels > 1
    if whole and bool(((classes < 0) | (classes >= num_labels)).any()):
        raise UsageError(
            "A label is none of the model's.",
            f"Labels go from 0 to {num_labels - 1}: num_labels=… says how many there are.",
        )


def _last(hidden: Tensor, tokens: Tensor) -> Tensor:
    """The state [B, H] of each row's last column where ``tokens`` [B, T] is true."""
    last = (torch.arange(tokens.shape[1]) * tokens).argmax(1)
    return hidden[torch.arange(len(hidden)), last]
