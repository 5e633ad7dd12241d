"""Remote blocks as a torch module: gradients are those of the same function held locally."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning
from petalnode.training.modules import (
    DeepPrompts,
    LoraParameters,
    RemoteBlocks,
    SoftPrompt,
    TrainedParameters,
)

H, BLOCKS = 6, 2


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compute(x, lengths, tuning):
    """Two blocks in which each token depends on those before it in its row."""
    rows, kept = x.split(list(lengths)), []
    for index in range(BLOCKS):
        block = tuning.blocks.get(index, BlockTuning())
        weight = numbers(H, H, seed=index)
        after = []
        for row in rows:
            if block.prompt is not None:
                n = min(len(row), len(block.prompt))
                row = torch.cat([row[:n] + block.prompt[:n], row[n:]])
            for low in block.lora.values():
                row = row + low.scale * (row @ low.a.T) @ low.b.T
            after.append(row + torch.tanh(row.cumsum(0) @ weight))
        rows = after
        kept.append(torch.cat(rows))
    return kept


class Record:
    def __init__(self, *fields):
        self.x, self.lengths, self.tuning, self.hidden_states = fields


class Session:
    """What ``open_training`` gives; ``records`` are those that somebody still holds."""

    def __init__(self):
        self.records = weakref.WeakSet()
        self.told = []

    async def forward(self, hidden, lengths, *, tuning=NOTHING, keep_blocks=False, backward=True):
        self.told.append(backward)
        assert not hidden.requires_grad
        assert min(lengths) > 0
        assert not any(tensor.requires_grad for _, tensor in tuning.named())
        with torch.no_grad():
            kept = compute(hidden.float(), lengths, tuning)
        record = Record(hidden, lengths, tuning, [hidden, *kept] if keep_blocks else [])
        self.records.add(record)
        return kept[-1], record

    async def backward(self, record, grad):
        with torch.enable_grad():
            leaves = record.tuning.map(lambda tensor: tensor.clone().requires_grad_())
            x = record.x.float().clone().requires_grad_()
            y = compute(x, record.lengths, leaves)[-1]
            named = dict(leaves.named())
            inputs = [x, *named.values()]
            gx, *grads = torch.autograd.grad(y, inputs, grad.float(), materialize_grads=True)
        return gx, dict(zip(named, grads, strict=True))


class Inline:
    """A node, and its session, that run what needs no loop."""

    def __init__(self):
        self.value = self
        self.checkpoint = SimpleNamespace(config=SimpleNamespace(hidden_size=H))
        self.session = Held()

    def open_training(self, report):
        return self.session

    def hold(self, session):
        return session


class Held:
    def __init__(self):
        self.value = Session()
        self.released = 0

    def release(self):
        self.released += 1

    def run(self, function, *args):
        try:
            function(*args).send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("it waits")


def trained(kind):
    low = LowRank(numbers(2, H, seed=5), numbers(H, 2, seed=6), 0.5)
    blocks = {
        "nothing": {},
        "lora": {0: BlockTuning({"attn.q": low}), 1: BlockTuning({"attn.q": low})},
        "deep prompts": {1: BlockTuning(prompt=numbers(2, H, seed=7))},
    }
    return TrainedParameters(Tuning(blocks[kind]))


def test_the_session_is_told_whether_backward_may_follow():
    node, hidden = Inline(), numbers(1, 3, H)
    blocks = RemoteBlocks(node, trained("lora"))
    blocks(hidden)
    with torch.no_grad():
        blocks(hidden)
    blocks.trained.requires_grad_(False)
    blocks(hidden)
    blocks(hidden.requires_grad_())
    assert node.session.value.told == [True, False, False, True]


def local(parameters, hidden, mask):
    """The same function of the same parameters, in autograd, row by row without padding."""
    named = parameters.named()

    def block(index, one):
        lora = {
            site: LowRank(named[f"{index}.{site}.a"], named[f"{index}.{site}.b"], low.scale)
            for site, low in one.lora.items()
        }
        return BlockTuning(lora, named.get(f"{index}.prompt"))

    tuning = Tuning({i: block(i, one) for i, one in parameters.tuning().blocks.items()})
    rows = torch.zeros_like(hidden)
    for row, real in enumerate(mask.bool()):
        if real.any():
            states = compute(hidden[row][real], [int(real.sum())], tuning)[-1]
            rows = rows.index_put((torch.tensor(row), real.nonzero()[:, 0]), states)
    return rows


def gradients(output, hidden, parameters):
    loss = (output * numbers(*output.shape, seed=9)).sum()
    return torch.autograd.grad(loss, [hidden, *parameters.named().values()], allow_unused=True)


MASKS = {
    "none": [[1, 1, 1, 1]] * 3,
    "right": [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]],
    "left": [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]],
    "a hole and an empty row": [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["nothing", "lora", "deep prompts"])
def test_outputs_and_gradients_are_those_of_autograd(kind, mask):
    mask, parameters = torch.tensor(MASKS[mask]), trained(kind)
    blocks = RemoteBlocks(Inline(), parameters)
    hidden = numbers(3, 4, H).requires_grad_()
    got, want = blocks(hidden, mask), local(parameters, hidden, mask)
    torch.testing.assert_close(got, want)
    for one, other in zip(
        gradients(got, hidden, parameters), gradients(want, hidden, parameters), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_gradients_of_several_forwards_add_up_in_any_order():
    parameters = trained("lora")
    blocks = RemoteBlocks(Inline(), parameters)
    batches = [numbers(2, 3, H, seed=seed) for seed in range(3)]
    losses = [blocks(batch).square().sum() for batch in batches]
    for loss in reversed(losses):
        loss.backward()
    added = [parameter.grad.clone() for parameter in parameters.parameters()]
    parameters.zero_grad()
    local(parameters, torch.cat(batches), torch.ones(6, 3)).square().sum().backward()
    for one, parameter in zip(added, parameters.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-4, rtol=1e-4)


def test_backward_twice_gives_the_same_and_a_third_time_is_over():
    blocks = RemoteBlocks(Inline(), trained("lora"))
    hidden = numbers(2, 3, H).requires_grad_()
    loss = blocks(hidden).square().sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


def test_records_live_as_long_as_autograd_needs_them():
    node = Inline()
    blocks, records = RemoteBlocks(node, trained("lora")), node.session.value.records
    loss = blocks(numbers(2, 3, H)).sum()
    assert len(records) == 1
    loss.backward()
    assert len(records) == 0  # though the loss is still there
    dropped = blocks(numbers(2, 3, H))
    assert len(records) == 1
    del dropped
    assert len(records) == 0
    with torch.no_grad():
        assert not blocks(numbers(2, 3, H)).requires_grad
    assert not RemoteBlocks(node)(numbers(2, 3, H)).requires_grad
    assert len(records) == 0


def test_the_session_is_closed_when_neither_blocks_nor_graphs_need_it():
    node, parameters = Inline(), trained("lora")
    loss = RemoteBlocks(node, parameters)(numbers(2, 3, H)).sum()
    assert node.session.released == 0
    loss.backward()
    assert next(parameters.parameters()).grad is not None
    del loss
    assert node.session.released == 1


def test_a_step_between_forward_and_backward_does_not_change_the_gradient():
    parameters = trained("lora")
    blocks, hidden = RemoteBlocks(Inline(), parameters), numbers(2, 3, H)
    want = torch.autograd.grad(blocks(hidden).sum(), list(parameters.parameters()))
    loss = blocks(hidden).sum()
    for parameter in parameters.parameters():
        parameter.data.mul_(3.0)
    for one, other in zip(
        torch.autograd.grad(loss, list(parameters.parameters())), want, strict=True
    ):
        assert torch.equal(one, other)


def test_second_derivatives_are_refused():
    hidden = numbers(1, 2, H).requires_grad_()
    loss = RemoteBlocks(Inline())(hidden).square().sum()
    with pytest.raises(UsageError, match="Second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_checkpointing_around_them_is_refused():
    hidden = numbers(1, 2, H).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss = RemoteBlocks(Inline())(hidden).sum()
    with pytest.raises(UsageError, match="saved-tensor hooks"):
        loss.backward()


def test_outputs_of_every_block():
    blocks, mask = RemoteBlocks(Inline()), torch.tensor(MASKS["left"])
    collected = []
    hidden = numbers(3, 4, H).requires_grad_()
    output = blocks(hidden, mask, collected)
    assert torch.equal(collected[-1], output)
    assert len(collected) == BLOCKS
    assert not collected[0].requires_grad
    assert output.requires_grad
    assert not collected[0][1, :3].any()


def test_bfloat16_goes_in_and_comes_out():
    parameters = trained("lora")
    hidden = numbers(1, 2, H).bfloat16().requires_grad_()
    output = RemoteBlocks(Inline(), parameters.float())(hidden)
    output.sum().backward()
    assert output.dtype == hidden.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in parameters.parameters()} == {torch.float32}


def test_what_does_not_fit_is_said():
    blocks = RemoteBlocks(Inline())
    for hidden, mask in (
        (numbers(2, H), None),
        (numbers(2, 0, H), None),
        (numbers(2, 3, H), torch.ones(2, 4)),
        (numbers(2, 3, H), torch.ones(2, 1, 3, 3)),
        (numbers(2, 3, H), torch.zeros(2, 3)),
        (numbers(2, 3, H), [[1, 1, 1], [1, 1, 1]]),
        ([[[1.0] * H]], None),
    ):
        with pytest.raises(UsageError):
            blocks(hidden, mask)
    assert not blocks.session.value.told


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 1, 1]])])
def test_a_size_that_is_not_the_models_is_told_as_it_was_given(mask):
    with pytest.raises(UsageError, match=r"shape \(1, 3, 7\) are not the model's.*tokens, 6\]"):
        RemoteBlocks(Inline())(numbers(1, 3, 7), mask)


@pytest.fixture
def config(tiny_checkpoint):
    return open_checkpoint(str(tiny_checkpoint())).config


def test_lora_by_the_words_of_peft(config):
    lora = LoraParameters(config, rank=4, alpha=8, targets=["o_proj"])
    names = [name for name, _ in lora.named_parameters()]
    assert names[:2] == ["0.self_attn.o_proj.a", "0.self_attn.o_proj.b"]
    assert len(names) == 2 * config.num_blocks
    assert lora.tuning().blocks[3].lora["self_attn.o_proj"].scale == 2.0
    assert LoraParameters(config, rank=4, targets="o_proj").named().keys() == set(names)
    usual = LoraParameters(config)
    assert set(usual.tuning().blocks[0].lora) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert torch.equal(next(usual.parameters()), next(LoraParameters(config).parameters()))
    assert not torch.equal(
        next(usual.parameters()), next(LoraParameters(config, seed=1).parameters())
    )
    for wrong in ({"targets": ["nothing"]}, {"targets": []}, {"rank": 0}):
        with pytest.raises(UsageError):
            LoraParameters(config, **wrong)


def test_prompts(config):
    size = config.hidden_size
    soft = SoftPrompt(config, 3, start=numbers(3, size))
    assert torch.equal(soft.prompt, numbers(3, size))
    drawn = SoftPrompt(config, 3, seed=4).prompt
    assert torch.equal(SoftPrompt(config, 3, seed=4, scale=0.04).prompt, 2 * drawn)
    assert 0.01 < drawn.std() < 0.03
    assert not soft.tuning().blocks
    deep = DeepPrompts(config, 3)
    assert len(deep.tuning().blocks) == config.num_blocks
    assert not deep.tuning().blocks[1].prompt.any()
    assert deep.prompt.shape == (3, size)
    assert "soft" in deep.state_dict()
    for wrong in ((0, None), (config.max_positions, None), (2, numbers(3, size)), (2, [[1.0]])):
        with pytest.raises(UsageError):
            SoftPrompt(config, wrong[0], start=wrong[1])


def test_a_state_dict_comes_back(config):
    lora, other = LoraParameters(config, seed=1), LoraParameters(config, seed=2)
    other.load_state_dict(lora.state_dict())
    for (name, one), (_, two) in zip(lora.tuning().named(), other.tuning().named(), strict=True):
        assert torch.equal(one, two), name
