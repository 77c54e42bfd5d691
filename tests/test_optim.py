"""optim.py: which tensor is in which optimizer, the size of a step by the papers' formulas, states saved and loaded."""

import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig, ModelError
from onecard import optim
from onecard.optim import Muon, configure_optimizers, load_state_dicts, state_dicts

SETTINGS = dict(optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
MUON = dict(arch="qwen3", optimizer="muon")
NORMUON = MUON | dict(optimizer="normuon")
RECIPES = pytest.mark.parametrize("recipe", [dict(), MUON, NORMUON], ids=["adamw", "muon", "normuon"])


def tiny(arch="gpt2", **settings):
    """-> (a tiny network, its optimizers)."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes, arch=arch, bias=arch == "gpt2"))
    return model, configure_optimizers(model, SimpleNamespace(**SETTINGS | settings), "cpu")


def step(model, optimizers):
    """One step on random tokens, always the same -> the loss before it."""
    tokens = torch.randint(96, (4, 33), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    model.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def names_in(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group["params"]]


@RECIPES
def test_every_tensor_is_in_one_group_in_the_models_order_and_only_matrices_decay(recipe):
    """The order is how a saved state finds its tensors."""
    model, optimizers = tiny(**recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    grouped = [names_in(model, group) for group in groups]
    named = dict(model.named_parameters())
    assert sorted(itertools.chain(*grouped)) == sorted(named)
    assert sum(p is model.lm_head.weight for group in groups for p in group["params"]) == 1  # the tied one
    for group, names in zip(groups, grouped, strict=True):
        assert names == [name for name in named if name in names]
        assert {named[name].dim() >= 2 for name in names} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.1, 0.0)


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else():
    model, (muon, _) = tiny(**MUON)
    in_muon = names_in(model, muon.param_groups[0])
    assert in_muon == [name for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    assert len(in_muon) == 2 * 7 and not any("wte" in name for name in in_muon)
    with pytest.raises(ModelError, match="optimizer='muon' needs arch='qwen3'"):
        tiny(optimizer="muon")


SHAPES = [(48, 24), (24, 48), (24, 24), (48, 24), (24, 24), (48, 24), (8, 40)]


def matrices_and_gradients(seed=0):
    torch.manual_seed(seed)
    matrices = [torch.randn(shape) for shape in SHAPES]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return matrices


@pytest.mark.parametrize("stack_up_to", [0, 24, 10**9], ids=["one by one", "the small ones stacked", "all stacked"])
def test_muon_steps_as_torchs_does_and_goes_on_from_its_saved_state(stack_up_to):
    """Checkpoints of earlier versions have the state of torch.optim.Muon."""
    settings = dict(lr=0.02, weight_decay=0.1)
    theirs, ours = matrices_and_gradients(), matrices_and_gradients()
    torchs = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    torchs.step()
    muon = Muon(ours, **settings, stack_up_to=stack_up_to)
    load_state_dicts([muon], {"optimizer": copy.deepcopy(torchs.state_dict())})  # which copies nothing itself
    start = [a.clone() for a in theirs]
    for a, b in zip(theirs, ours, strict=True):
        b.copy_(a)
    for seed in range(1, 4):
        for a, b, new in zip(theirs, ours, matrices_and_gradients(seed), strict=True):
            a.grad, b.grad = new.grad, new.grad.clone()
        if seed == 2:
            theirs[-1].grad = ours[-1].grad = None
        torchs.step()
        muon.step()
    for a, b, first in zip(theirs, ours, start, strict=True):
        assert (a - b).norm() < 0.04 * (a - first).norm()  # the products have 8 bits; here they are equal bit for bit
    assert [set(state) for state in muon.state.values()] == [{"momentum_buffer"}] * len(SHAPES)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
def test_normuon_is_the_algorithm_of_its_paper(shape):
    """Algorithm 1 of Li et al. 2025, one matrix at a time, with the exact orthogonal factor instead of Jordan's."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(4, *shape) * torch.logspace(-2, 0, shape[0])[:, None]
    momentum, squares, expected = torch.zeros(shape), torch.zeros(shape[0], 1), start
    stacked = [start.clone() for _ in range(2)]
    muon = Muon(stacked, 0.02, 0.1, stack_up_to=10**9, even_rows=True)
    for grad in grads:
        for matrix in stacked:
            matrix.grad = grad.clone()
        muon.step()
        momentum = 0.95 * momentum + 0.05 * grad
        u, _, v = torch.linalg.svd(0.95 * momentum + 0.05 * grad, full_matrices=False)
        squares = 0.95 * squares + 0.05 * (u @ v).square().mean(1, keepdim=True)
        even = u @ v / squares.sqrt()
        update = even * 0.2 * math.prod(shape) ** 0.5 / even.norm()  # an RMS of 0.2
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * update
    assert torch.equal(*stacked) and set(muon.state[stacked[0]]) == {"momentum_buffer", "row_squares"}
    assert (stacked[0] - expected).norm() < 0.2 * (expected - start).norm()  # Jordan's factor: 0.7 to 1.2 of it


@pytest.mark.parametrize("even_rows", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("stack_up_to", [0, 10**9], ids=["one by one", "stacked"])
def test_three_processes_that_share_the_matrices_get_the_weights_of_one_bit_for_bit(
    monkeypatch, stack_up_to, even_rows
):
    """Threads stand for the processes. There are 3, 1, 2 and 1 matrices of a shape."""
    parts, ranks, barrier = {}, threading.local(), threading.Barrier(3, timeout=30)

    def gather(shares, part):
        parts[ranks.rank] = part
        barrier.wait()
        for rank, share in enumerate(shares):
            share.copy_(parts[rank])
        barrier.wait()

    def two_steps(rank, world_size, matrices):
        ranks.rank = rank
        muon = Muon(matrices, 0.02, 0.1, stack_up_to, rank, world_size, even_rows)
        muon.step()
        muon.step()
        return matrices

    monkeypatch.setattr(optim.dist, "all_gather", gather)
    with ThreadPoolExecutor(3) as threads:
        copies = [matrices_and_gradients() for _ in range(3)]
        for shared in threads.map(two_steps, range(3), [3] * 3, copies):
            assert all(map(torch.equal, shared, two_steps(0, 1, matrices_and_gradients())))


@RECIPES
def test_a_batch_is_learned_by_heart(recipe):
    model, optimizers = tiny(**recipe, learning_rate=1e-2)
    assert min(step(model, optimizers) for _ in range(150)) < 0.1


@RECIPES
def test_a_loaded_state_keeps_the_betas_and_the_weight_decay_of_this_run(recipe):
    """test_train.py holds that a resumed run ends with the same weights."""
    model, optimizers = tiny(**recipe)
    step(model, optimizers)
    saved = state_dicts(optimizers)
    assert list(saved) == ["muon", "optimizer"][-len(optimizers) :]  # nanoGPT's name for AdamW's
    _, changed = tiny(**recipe, weight_decay=0.05, beta2=0.99)
    load_state_dicts(changed, {"model": {}, **saved})
    groups = [group for optimizer in changed for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.05] * len(changed) + [0.0]
    assert changed[-1].param_groups[0]["betas"] == (0.9, 0.99)
    for before, after in zip(optimizers, changed, strict=True):
        assert len(after.state) == len(before.state) > 0
