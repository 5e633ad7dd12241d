"""A causal language model of transformers, with the blocks on other machines.

model = PetalnodeForCausalLM.from_pretrained(MODEL, join="pn1:…")
model.generate(**tokenizer("def fibonacci(n):", return_tensors="pt"), max_new_tokens=40)

model.enable_lora(rank=8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(**batch, labels=labels).loss.backward()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from petalnode.blocking import BlockingNode
from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.hf.cache import RemoteCache
from petalnode.hf.inputs import ID_DTYPES, IGNORED, read_inputs, refuse_attentions
from petalnode.hf.local import VocabularyTable
from petalnode.hf.model import RemoteModel, read_generation_config
from petalnode.training.inputs import check_tensor


class PetalnodeForCausalLM(RemoteModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """``forward`` gives logits, loss and hidden states; ``generate`` is that of transformers."""

    def __init__(
        self, config: PreTrainedConfig, node: BlockingNode, report: Report = ignore
    ) -> None:
        super().__init__(config, node, report)
        own = read_generation_config(node.value.checkpoint.name)
        if own is not None:
            self.generation_config = own

    def get_output_embeddings(self) -> VocabularyTable:
        """The head; where the model ties the two, the token embeddings."""
        return self.local.head

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' own, for ids [B, T] or embeddings [B, T, H].

        Without a cache, gradients reach whatever is trained. Outputs at padding mean nothing;
        labels there do not count, nor those of a row's first token, which nothing foretells:
        the loss of a row is the same with and without padding. Of ``hidden_states`` the first and
        the last alone have gradients; attention weights never leave the hops. Raises
        ``UsageError`` for what cannot be had.
        """
        refuse_attentions(output_attentions)
        cache = self._cache(past_key_values, use_cache, output_hidden_states)
        cached = None if cache is None else cache.mask
        inputs = read_inputs(input_ids, inputs_embeds, attention_mask, position_ids, cached)
        states: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.local.logits(self.hidden(inputs, cache, logits_to_keep, states))
        loss = None
        if labels is not None:
            counted = counted_labels(labels, inputs.mask, logits)
            loss = self.loss_function(logits, counted, vocab_size=logits.shape[-1], **rest)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,  # type: ignore[arg-type]  # transformers says FloatTensor
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),  # type: ignore[arg-type]
        )

    def _cache(
        self, given: RemoteCache | None, wanted: bool | None, hidden_states: bool | None
    ) -> RemoteCache | None:
        """The cache to compute with, if any: a new one where it is asked for."""
        if given is None and not wanted:
            return None
        if hidden_states:
            raise UsageError(
                "Hidden states of every block are not to be had with a cache.",
                "Use use_cache=False.",
            )
        cache = given if given is not None else self.new_cache()
        if not isinstance(cache, RemoteCache):
            raise UsageError(
                f"A {type(cache).__name__} cannot be used: the caches are on the hops.",
                "Leave past_key_values out, or give a model.new_cache().",
            )
        return cache

    def _prepare_cache_for_generation(  # type: ignore[override]  # it says bool, and gives None
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *rest: Any,
    ) -> None:
        """What ``generate`` calls to get its cache, once it knows the attention mask."""
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise UsageError(
                "A prompt ends with padding, and no text can go on from there.",
                'Pad on the left: tokenizer.padding_side = "left".',
            )
        if generation_config.cache_implementation is not None:
            raise UsageError(
                f"A cache of kind {generation_config.cache_implementation!r} cannot be had: the "
                "caches are on the hops.",
                "Leave cache_implementation out.",
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache()


# By the names in this table Trainer knows whose labels to shift where it smooths them, and the
# text generation pipeline what it can take.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["petalnode"] = PetalnodeForCausalLM.__name__


def counted_labels(labels: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """Return the labels [B, T] that a loss is made of, the others as ``IGNORED``.

    Those count whose token, and the one before that may foretell it, are no padding. Raises
    ``UsageError`` for labels that do not fit the logits [B, T, V].
    """
    check_tensor("The labels", labels)
    whole = labels.dtype in ID_DTYPES
    if not whole or labels.shape != mask.shape or logits.shape[:2] != mask.shape:
        raise UsageError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} do not fit logits of shape "
            f"{tuple(logits.shape)}.",
            "Give one integer for each token of the input, and leave out logits_to_keep.",
        )
    told = mask & mask.roll(1, 1)
    counted = labels.long().masked_fill(~told.to(labels.device), IGNORED)
    strange = (counted != IGNORED) & ((counted < 0) | (counted >= logits.shape[-1]))
    if bool(strange.any()):
        raise UsageError(
            f"A label is {int(counted[strange][0])}, which is no token of the model's.",
            f"Labels go from 0 to {logits.shape[-1] - 1}; {IGNORED} is not counted.",
        )
    return counted
