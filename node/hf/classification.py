"""A sequence classifier of transformers, with the blocks on other machines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from petalnode.blocking import BlockingNode
from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.hf.inputs import ID_DTYPES, IGNORED, read_inputs, refuse_attentions
from petalnode.hf.model import RemoteModel
from petalnode.training.inputs import check_tensor


class PetalnodeForSequenceClassification(RemoteModel):  # type: ignore[no-untyped-call]
    """A score of each label for a row, made of its last token by ``score``, which is trained.

    ``score`` begins at random, by ``torch.manual_seed``, or with what was trained; it has
    ``num_labels`` rows.
    """

    accepts_loss_kwargs = False
    """Losses are means over a batch: ``Trainer`` divides those that it accumulates by itself."""

    def __init__(
        self, config: PreTrainedConfig, node: BlockingNode, report: Report = ignore
    ) -> None:
        super().__init__(config, node, report)
        self.num_labels = config.num_labels or 2
        size = self.local.embeddings.weight.shape[1]  # what the head is given
        self.score = nn.Linear(size, self.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=getattr(config, "initializer_range", 0.02))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **rest: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As transformers' own. A row's last token is the last that the attention mask leaves
        and that is not ``config.pad_token_id``, where that is set and ids are given.

        Raises ``UsageError`` for several rows where nobody says what padding is.
        """
        refuse_attentions(output_attentions)
        if rest.get("past_key_values") is not None:
            raise UsageError("A classifier goes on from no cache.", "Give it whole rows.")
        inputs = read_inputs(input_ids, inputs_embeds, attention_mask, position_ids, None)
        tokens = self._no_padding(input_ids, attention_mask, inputs.mask)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden(inputs, collect=states)
        scores = self.score(self.local.normed(_last(hidden, tokens)).to(self.score.weight))
        loss = None
        if labels is not None:
            check_labels(labels, *scores.shape)
            loss = self.loss_function(
                logits=scores, labels=labels, pooled_logits=scores, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=scores,
            hidden_states=None if states is None else tuple(states),  # type: ignore[arg-type]
        )

    def _no_padding(self, ids: Tensor | None, given: Tensor | None, mask: Tensor) -> Tensor:
        """Which columns [B, T] are no padding, by the mask and by what the token ids are."""
        padding = self.config.pad_token_id
        if ids is None:
            return mask
        if padding is not None:
            return mask & ids.cpu().ne(padding)
        if given is None and len(ids) > 1:
            raise UsageError(
                "Several rows are given, and nobody says which tokens are padding.",
                "Give an attention_mask, or set model.config.pad_token_id.",
            )
        return mask


# By the names in this table the text classification pipeline knows what it can take.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["petalnode"] = (
    PetalnodeForSequenceClassification.__name__
)


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
