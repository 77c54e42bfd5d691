"""optim.py: which tensor is in which optimizer, the size of a step by the papers' formulas, states saved and loaded."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig, ModelError
from onecard.optim import configure_optimizers, load_state_dicts, state_dicts

SETTINGS = dict(optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
RECIPES = [dict(), dict(arch="qwen3", optimizer="muon")]


def tiny(arch="gpt2", **settings):
    """-> (a tiny network, its optimizers)."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes, arch=arch, bias=arch == "gpt2"))
    return model, configure_optimizers(model, SimpleNamespace(**SETTINGS | settings), "cpu")


def step(model, optimizers, seed=0):
    """One step on random tokens, the same for the same seed -> the loss before it."""
    tokens = torch.randint(96, (4, 33), generator=torch.Generator().manual_seed(seed))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return loss.item()


def names_in(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("recipe", RECIPES, ids=["adamw", "muon"])
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
    model, (muon, _) = tiny(**RECIPES[1])
    in_muon = names_in(model, muon.param_groups[0])
    assert in_muon == [name for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    assert len(in_muon) == 2 * 7 and not any("wte" in name for name in in_muon)
    with pytest.raises(ModelError, match="optimizer='muon' needs arch='qwen3'"):
        tiny(optimizer="muon")


def test_the_first_step_of_adamw_is_the_papers():
    """Loshchilov & Hutter 2019, algorithm 2: at first the two means give the sign of the gradient."""
    model, optimizers = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: gradients.update({name: gradients.get(name, 0) + g}))
    step(model, optimizers)
    for name, p in model.named_parameters():
        decay, g = 0.1 if p.dim() >= 2 else 0.0, gradients[name]
        expected = before[name] * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-4)


def test_a_step_of_muon_has_a_fifth_of_the_learning_rate_as_rms():
    """Liu et al. 2025, eq. 4: 0.2, as AdamW's updates have. Jordan's five iterations give singular values near 1."""
    model, optimizers = tiny(**RECIPES[1], weight_decay=0.0)
    for seed in range(3):  # zero matrices get no gradient before c_proj has moved
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizers, seed)
    for name in names_in(model, optimizers[0].param_groups[0]):
        rms = (model.get_parameter(name).detach() - before[name]).square().mean().sqrt()
        assert rms.item() == pytest.approx(0.2e-3, rel=0.25), name


@pytest.mark.parametrize("recipe", RECIPES, ids=["adamw", "muon"])
def test_a_batch_is_learned_by_heart(recipe):
    model, optimizers = tiny(**recipe, learning_rate=1e-2)
    assert min(step(model, optimizers) for _ in range(150)) < 0.1


def test_float16_with_the_default_scaler_skips_no_step_of_a_healthy_model():
    model, (optimizer,) = tiny()
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(60):
        tokens = torch.randint(96, (8, 33), generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.float16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 65536.0  # it falls with the first skip


@pytest.mark.parametrize("recipe", RECIPES, ids=["adamw", "muon"])
def test_a_loaded_state_continues_as_if_never_saved_with_the_new_betas_and_decay(recipe):
    model, optimizers = tiny(**recipe)
    for seed in range(3):
        step(model, optimizers, seed)
    saved = copy.deepcopy(state_dicts(optimizers))
    assert list(saved) == ["muon", "optimizer"][-len(optimizers) :]  # nanoGPT's name for AdamW's
    resumed, loaded = tiny(**recipe)
    resumed.load_state_dict(model.state_dict())
    load_state_dicts(loaded, {"model": {}, **saved})
    assert step(model, optimizers, seed=3) == step(resumed, loaded, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    _, changed = tiny(**recipe, weight_decay=0.05, beta2=0.99)
    load_state_dicts(changed, saved)
    assert changed[-1].param_groups[0]["betas"] == (0.9, 0.99)
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in changed] == [0.05] * len(changed)
    assert changed[-1].param_groups[-1]["weight_decay"] == 0.0
