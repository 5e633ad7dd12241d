"""What the models of ``petalnode.hf`` share: node, local modules, remote blocks, what is trained.

``parameters()`` lists what this client trains and nothing else: the adapter, if one is enabled, and
local modules that were unfrozen. Blocks are on other machines, and frozen there; embeddings, final
norm and head are buffers until ``unfreeze``. B rows of T columns, H hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from petalnode.blocking import BlockingNode, open_blocking
from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.hf.cache import RemoteCache
from petalnode.hf.inputs import Inputs
from petalnode.hf.local import LocalModules, VocabularyTable
from petalnode.hf.saving import load_trained, save_trained
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.devices import pick_device, pick_dtype
from petalnode.models.sources import find_source
from petalnode.models.tuning.check import check_prompt
from petalnode.models.tuning.tuning import NOTHING
from petalnode.options import NodeOptions
from petalnode.routing.costs import Workload
from petalnode.training.modules import (
    DeepPrompts,
    LoraParameters,
    RemoteBlocks,
    SoftPrompt,
    TrainedParameters,
)

SETTINGS = frozenset(
    {"num_labels", "id2label", "label2id", "problem_type", "initializer_range"}
    | {"pad_token_id", "bos_token_id", "eos_token_id"}
)
"""What of a model's configuration a client may change: what is computed by the client."""

FROM_FILES = {"local_files_only": True, "trust_remote_code": False}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
)


class RemoteModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A model whose blocks are on other machines. Made by ``from_pretrained`` of its subclasses."""

    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(
        self, config: PreTrainedConfig, node: BlockingNode, report: Report = ignore
    ) -> None:
        super().__init__(config)
        checkpoint, options = node.value.checkpoint, node.value.options
        dtype = pick_dtype(options.dtype, checkpoint.config.dtype, pick_device(options.device))
        self.node, self.report = node, report
        self.local = LocalModules(checkpoint, dtype)
        self.blocks = RemoteBlocks(node, report=report)
        self.trained: TrainedParameters | None = None
        self.served = ""
        self._closing: weakref.finalize[Any, Any] | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        *,
        join: str | Sequence[str] = (),
        options: NodeOptions | None = None,
        node: BlockingNode | None = None,
        trained: str | Path | None = None,
        adapter: str = "",
        report: Report = ignore,
        **config: Any,
    ) -> Self:
        """Open MODEL, as on the command line, through a swarm.

        ``join`` are invites or addresses; ``options`` says more about the node that is opened in a
        background thread; ``node`` is one that is open already, for several models. ``trained`` is
        what ``load_trained`` takes, ``adapter`` what ``use_adapter`` does. ``report`` is called in
        that thread with what happens, such as what a call waits for. Some of the configuration may
        be given, as in transformers: ``num_labels=3``; see ``SETTINGS``. Raises what ``open_node``
        raises, and ``UsageError``.
        """
        joins = (join,) if isinstance(join, str) else tuple(join)
        if sum(map(bool, (joins, options, node))) > 1:
            raise UsageError("Two nodes are asked for.", "Give one of join, options and node.")
        checkpoint = open_checkpoint(str(model)) if node is None else checkpoint_of(node, model)
        settings = read_config(checkpoint.name, config)
        used = node or open_blocking(checkpoint, options or NodeOptions(join=joins), report)
        try:
            made = cls(settings, used, report)
            if trained is not None:
                made.load_trained(trained)
            if adapter:
                made.use_adapter(adapter)
        except BaseException:
            if node is None:
                used.leave()
            raise
        if node is None:
            made._closing = weakref.finalize(made, used.release)
        made.train(False)
        return made

    def close(self) -> None:
        """Close the node that was opened for this model."""
        if self._closing is not None:
            self.node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._closing is not None:
            self.node.leave()

    @property
    def device(self) -> torch.device:
        """Where the local modules are."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are, here and on the way."""
        return self.local.dtype

    def get_input_embeddings(self) -> VocabularyTable:
        """The token embeddings, without what a family does to them afterwards."""
        return self.local.embeddings

    def enable_lora(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> LoraParameters:
        """Train low-rank matrices in every block: see ``LoraParameters``. Returns them."""
        settings = self.node.value.checkpoint.config
        lora = LoraParameters(settings, rank=rank, alpha=alpha, targets=targets, seed=seed)
        self.enable(lora)
        return lora

    def enable_prompt(
        self, tokens: int = 16, *, deep: bool = False, text: Tensor | None = None, seed: int = 0
    ) -> TrainedParameters:
        """Train a prompt before the text, and if ``deep`` one in every block. Returns it.

        It begins at random, or as the embeddings of ``text``: ids [T], which are T tokens then.
        """
        start = None
        if text is not None:
            if not isinstance(text, Tensor) or text.ndim != 1 or not len(text):
                raise UsageError("The text is no row of tokens.", "Give a tensor of ids [tokens].")
            tokens = len(text)
            with torch.no_grad():
                start = self.local.embed(text[None], torch.arange(len(text))[None])[0].cpu()
        kind = DeepPrompts if deep else SoftPrompt
        prompt = kind(self.node.value.checkpoint.config, tokens, start=start, seed=seed)
        self.enable(prompt)
        return prompt

    def enable(self, trained: TrainedParameters) -> None:
        """Train these parameters. Raises ``UsageError`` where others are enabled, or for a prompt
        that does not fit the model."""
        self._check_free()
        if trained.prompt is not None:
            check_prompt(self.node.value.checkpoint.config, trained.prompt)
        self.trained = trained
        self.blocks.add(trained)

    def use_adapter(self, adapter: str) -> None:
        """Go on with an adapter that nodes offer, by its name; nothing of it is trained here.

        A directory, or a hub repo that nobody offers, is taken as by ``load_trained``. Raises
        ``UsageError`` or ``ModelError`` where there is none.
        """
        self._check_free()
        found = self.node.run(self.node.value.find_adapter, adapter)
        if found.served:
            self.served = found.served
        else:
            self.enable(TrainedParameters(found.tuning, found.prompt))

    def disable(self) -> None:
        """Go on without what was enabled."""
        self.trained, self.served = None, ""
        self.blocks.add(None)

    def _check_free(self) -> None:
        if self.trained is not None or self.served:
            raise UsageError("This model has an adapter already.", "Call disable() first.")

    def new_cache(self) -> RemoteCache:
        """An empty cache. It goes on with what is enabled now, as it is now."""
        tuning = NOTHING if self.trained is None else self.trained.tuning()
        prompt = None if self.trained is None else self.trained.prompt
        node, report, config = self.node, self.report, self.node.value.checkpoint.config
        if prompt is not None:
            check_prompt(config, prompt)
        served, blocks = self.served, config.num_blocks

        def open_rows(lengths: Sequence[int]) -> Any:
            workload = Workload(kv_tokens=sum(lengths), context=max(lengths))
            added = partial(node.value.open_hidden, tuning=tuning, served=served)
            return node.hold(added(0, blocks, report, workload, rows=len(lengths)))

        prompt = None if prompt is None else prompt.detach().clone()
        return RemoteCache(open_rows, self.local.dtype, prompt)

    def hidden(
        self,
        inputs: Inputs,
        cache: RemoteCache | None = None,
        kept: int | Tensor = 0,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, K, H] as the last block leaves them, of the columns ``kept``: so many
        of the last, 0 for all, or those whose numbers a tensor [K] has.

        ``collect`` gets the inputs [B, T, H] of the first block and the outputs of every one, of
        the last as the head is given them.
        """
        own = None if self.trained is None else self.trained.prompt
        prompt = own if cache is None else cache.prompt
        before, columns = 0 if prompt is None else len(prompt), inputs.tokens.shape[1]
        hidden = self.local.embed(inputs.tokens, inputs.positions + before)
        last = kept if isinstance(kept, int) and 0 < kept < columns else columns
        if cache is not None:
            output = self._through_cache(hidden, inputs.mask, cache, last)
        elif self.served:
            output = self._through_served(hidden, inputs.mask, last, collect)
        else:
            output = self._through_blocks(hidden, inputs.mask, prompt, collect)
        return output[:, kept if isinstance(kept, Tensor) else slice(-last, None)]

    def _through_blocks(
        self, hidden: Tensor, mask: Tensor, prompt: Tensor | None, collect: list[Tensor] | None
    ) -> Tensor:
        """Hidden states [B, T, H], computed behind a prompt [P, H] if there is one."""
        if collect is not None:
            collect.append(hidden)
        before = 0
        if prompt is not None:
            before = len(prompt)
            hidden = torch.cat([prompt.to(hidden).expand(len(hidden), -1, -1), hidden], 1)
            mask = torch.cat([mask.new_ones(len(mask), before), mask], 1)
        blocks: list[Tensor] | None = None if collect is None else []
        output: Tensor = self.blocks(hidden, mask, blocks)[:, before:]
        if collect is not None and blocks is not None:
            collect += [one[:, before:] for one in blocks[:-1]]
            collect.append(self.local.normed(output))
        return output

    def _through_cache(self, hidden: Tensor, mask: Tensor, cache: RemoteCache, keep: int) -> Tensor:
        """Hidden states [B, keep, H] behind what a cache has."""
        through = [hidden, *([] if self.trained is None else self.trained.parameters())]
        if torch.is_grad_enabled() and any(one.requires_grad for one in through):
            raise UsageError(
                "There are no gradients through a cache.",
                "Use it under torch.no_grad(), or leave use_cache out.",
            )
        return cache.step(hidden, mask, keep)

    def _through_served(
        self, hidden: Tensor, mask: Tensor, keep: int, collect: list[Tensor] | None
    ) -> Tensor:
        """Hidden states [B, keep, H] through an adapter that nodes offer, by a session's means."""
        if collect is not None or hidden.requires_grad:
            raise UsageError(
                "Through an adapter that nodes offer come neither gradients nor hidden states of "
                "every block.",
                "Take the adapter's files by load_trained, or call disable().",
            )
        return self._through_cache(hidden, mask, self.new_cache(), keep)

    def resize_token_embeddings(self, *args: Any, **rest: Any) -> Any:
        """There is no other vocabulary: raises ``UsageError``."""
        raise UsageError(
            "The vocabulary is the swarm's and has the size that it has.",
            "Use tokens that the model has: for padding, say, that of the end of a text.",
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers that comes with the model."""
        source = find_source(self.node.value.checkpoint.name, None, None)
        for file in TOKENIZER_FILES:
            source.optional(file)  # so that it lies beside the others
        directory = source.path("config.json").parent
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, **FROM_FILES)
        return tokenizer

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *args: Any, **rest: Any
    ) -> None:
        """Write what is trained to a directory: an adapter's files, unfrozen local modules.

        The model itself stays where it is. ``Trainer``, which gives a ``state_dict``, gets the
        file that it resumes from; what else transformers passes changes nothing.
        """
        if rest.get("push_to_hub"):
            raise UsageError("Saving uploads nothing.", "Call model.push_to_hub(…) as well.")
        save_trained(self, Path(save_directory), for_trainer="state_dict" in rest)

    def load_trained(self, place: str | Path) -> None:
        """Take what ``save_pretrained``, ``petalnode tune`` or ``peft`` wrote: a directory, or the
        name of a hub repo with an adapter."""
        load_trained(self, place)


def checkpoint_of(node: BlockingNode, model: str | Path) -> Checkpoint:
    """The checkpoint of an open node. Raises ``UsageError`` if it is another model's."""
    checkpoint = node.value.checkpoint
    if checkpoint.name != str(model):
        raise UsageError(f"The node runs {checkpoint.name}, not {model}.", "Open one for it.")
    return checkpoint


def read_config(model: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration as transformers reads it, with changes. Raises ``UsageError`` for those
    that would change nothing here."""
    if unknown := sorted(changes.keys() - SETTINGS):
        raise UsageError(
            f"{', '.join(unknown)} cannot be given here, where the model is a swarm's.",
            "Give dtype and device by options=NodeOptions(…), a revision as org/name@revision, and "
            f"of the configuration {', '.join(sorted(SETTINGS))}.",
        )
    directory = find_source(model, None, None).path("config.json").parent
    config = AutoConfig.from_pretrained(directory, **FROM_FILES, **changes)
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    text.num_labels = config.num_labels
    text.name_or_path = model
    return text


def read_generation_config(model: str) -> GenerationConfig | None:
    """What the model's authors say about generating, if they do."""
    path = find_source(model, None, None).optional("generation_config.json")
    return None if path is None else GenerationConfig.from_pretrained(path.parent)
