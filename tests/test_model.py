import math

import pytest
import torch
from torch.nn import functional as F

import model as model_module
from model import GPT, ChunkedCrossEntropy, GPTConfig, ModelError

TINY = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=32)


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY, **changes}))


def random_ids(*shape, high=96, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes, parameters, without_positions",  # nanoGPT's and FACTS' counts
    [
        ({}, 124_475_904, 123_689_472),
        ({"bias": False}, 124_373_760, 123_587_328),
        ({"bias": False, "n_embd": 384}, 40_953_216, 40_560_000),
    ],
)
def test_parameter_counts_are_those_of_gpt2(changes, parameters, without_positions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**changes))
    assert model.num_params() == parameters
    assert model.num_params(positions=False) == without_positions


def test_flops_give_the_utilisation_of_the_founding_run():
    with torch.device("meta"):
        flops = GPT(GPTConfig(bias=False, n_embd=384)).flops_per_token()
    assert flops == 6 * 40_560_000 + 12 * 12 * 384 * 1024
    assert 134.1e3 * flops / 58.3e12 == pytest.approx(0.69, abs=0.005)  # 3.91 s a step of 524,288 on an RTX 4070


def to_transformers(model):
    """The same weights in transformers' GPT2LMHeadModel, whose linear layers are stored transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu_new" if c.gelu == "tanh" else "gelu",
        attn_implementation="eager",
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name not in ours:
                assert name.endswith("bias") and not c.bias
                parameter.zero_()
            else:
                weight = ours[name]
                parameter.copy_(weight.t() if ".c_" in name and weight.dim() == 2 else weight)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_logits_equal_those_of_transformers(bias, gelu):
    model = tiny(bias=bias, gelu=gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the zeros and ones of the initialisation
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        idx = random_ids(3, 32)
        torch.testing.assert_close(model(idx), to_transformers(model)(idx).logits, atol=1e-5, rtol=0)


def test_the_two_gelus_differ():
    idx = random_ids(1, 8)
    a, b = tiny(gelu="tanh"), tiny(gelu="none")
    b.load_state_dict(a.state_dict())
    assert not torch.equal(a(idx), b(idx))


def test_first_loss_is_that_of_even_odds():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=256))
    idx, targets = random_ids(4, 64, high=50257), random_ids(4, 64, high=50257, seed=2)
    with torch.no_grad():
        assert model(idx, targets).item() == pytest.approx(math.log(50304) + 0.0002 * 256, abs=0.05)


def test_loss_is_float32_and_the_mean_of_the_targets_log_probabilities():
    model, idx, targets = tiny(), random_ids(2, 16), random_ids(2, 16, seed=2)
    expected = -model(idx).double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx, targets).dtype == torch.float32
    torch.testing.assert_close(model(idx, targets, reduction="none").double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(idx, targets).double(), expected.mean(), atol=1e-5, rtol=0)


def test_a_token_sees_no_later_one():
    model, idx = tiny().eval(), random_ids(1, 32)
    changed = idx.clone()
    changed[0, 20:] = 0
    torch.testing.assert_close(model(idx)[0, :20], model(changed)[0, :20])


def test_one_batch_is_overfitted():
    model = tiny()
    (optimizer,) = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), "cpu")
    idx, targets = random_ids(4, 32), random_ids(4, 32, seed=2)
    for _ in range(300):
        loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = tiny(bias=True)
    (optimizer,) = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decay, other = optimizer.param_groups
    assert (decay["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    assert all(p.dim() >= 2 for p in decay["params"]) and all(p.dim() < 2 for p in other["params"])
    assert sum(p is model.lm_head.weight for p in decay["params"]) == 1
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for p in decay["params"]]
    assert order == [name for name, p in model.named_parameters() if p.dim() >= 2]


def test_residual_projections_start_smaller():
    model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_too_long_a_sequence_and_bad_shapes_are_sentences():
    with pytest.raises(ModelError, match="block_size=32"):
        tiny()(random_ids(1, 33))
    with pytest.raises(ModelError, match="n_head=3"):
        GPTConfig(n_embd=32, n_head=3)
    with pytest.raises(ModelError, match="gelu"):
        GPTConfig(gelu="relu")


def plain_loss(model, idx, targets):
    """The loss by torch's own cross entropy on full logits."""
    return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(model_module, "chunk_rows", lambda rows, V, device: 13)  # 64 rows: four chunks and a rest


@pytest.mark.parametrize(
    "dtype, scale, tolerance",
    [(torch.float32, 1.0, 1e-5), (torch.bfloat16, 1.0, 1e-2), (torch.float16, 65536.0, 1e-2)],
)
def test_chunked_loss_has_the_value_and_the_gradients_of_the_plain_loss(small_chunks, dtype, scale, tolerance):
    idx, targets = random_ids(2, 32), random_ids(2, 32, seed=2)
    targets[0, 5:9] = -100
    expected, ours = tiny(bias=True), tiny(bias=True)
    reference = plain_loss(expected, idx, targets)
    reference.backward()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = ours(idx, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference.item(), rel=tolerance)
    (loss * scale).backward()
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert relative(a.grad / scale, b.grad) < tolerance, name


def test_head_gradients_alone_are_exact_to_the_precision_of_their_products(small_chunks):
    """Without the blocks' own 16-bit products: the 50,304 small probabilities of a first step survive float16."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(40, 48), 0.02 * torch.randn(50304, 48), random_ids(40, high=50257)
    a = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [x.double().requires_grad_(), weight.double().requires_grad_()]
    (ChunkedCrossEntropy.apply(*a, targets, torch.float16) * 65536.0).backward()
    F.cross_entropy(b[0] @ b[1].t(), targets).backward()
    for ours, exact in zip(a, b, strict=True):
        assert relative(ours.grad / 65536.0, exact.grad) < 2e-3


def test_gradients_add_up_over_micro_batches(small_chunks):
    whole, parts = tiny(), tiny()
    idx, targets = random_ids(4, 32), random_ids(4, 32, seed=2)
    whole(idx, targets).backward()
    for i in range(4):
        (parts(idx[i : i + 1], targets[i : i + 1]) / 4).backward()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-4)


def test_compiled_loss_keeps_no_logits_for_backward(monkeypatch):
    monkeypatch.setattr(model_module, "chunk_rows", lambda rows, V, device: 128)
    model, eager = tiny(vocab_size=960), tiny(vocab_size=960)
    idx, targets = random_ids(16, 32), random_ids(16, 32, seed=2)  # 512 rows, four chunks
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        loss = torch.compile(model, dynamic=False, fullgraph=True)(idx, targets)
    loss.backward()
    assert (960, 32) in saved  # the head's gradient, made in forward
    assert not [shape for shape in saved if 960 in shape[1:]]
    eager(idx, targets).backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-5


def test_a_chunk_is_never_larger_than_its_budget_and_chunks_cover_all_rows():
    for rows in (1, 7, 1000, 16384, 100_000):
        for device, budget in (("cpu", 2**26), ("cuda", 2**27)):
            n = model_module.chunk_rows(rows, 50304, device)
            assert 1 <= n <= rows and (n - 1) * 50304 <= budget


def test_float16_with_the_default_scaler_skips_no_step_of_a_healthy_model():
    model = tiny(n_embd=64)
    (optimizer,) = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    scaler = torch.amp.GradScaler("cpu")
    for step in range(100):
        idx = random_ids(8, 33, seed=step)
        with torch.autocast("cpu", torch.float16):
            loss = model(idx[:, :-1], idx[:, 1:])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 65536.0  # it falls with the first skip


def qwen3(**changes):
    return tiny(**{"arch": "qwen3", "bias": False, **changes})


def shaken(model):
    """The model with all weights moved away from the zeros and ones of the initialisation."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def to_transformers_qwen3(model):
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_head,
        head_dim=c.n_embd // c.n_head,
        max_position_embeddings=c.block_size,
        rope_theta=model_module.ROPE_THETA,
        rms_norm_eps=model_module.NORM_EPS,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn": "attn",
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "o_proj": "c_proj",
        "gate_proj": "c_gate",
        "up_proj": "c_fc",
        "down_proj": "c_proj",
        "model.norm": "transformer.ln_f",
    }
    ours, used = model.state_dict(), set()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            for a, b in names.items():
                name = name.replace(a, b)
            parameter.copy_(ours[name])
            used.add(name)
    assert used == {name for name, _ in model.named_parameters()}
    return theirs


@pytest.mark.parametrize("n_head", [1, 2])
def test_qwen3_logits_equal_those_of_transformers(n_head):
    model, idx = shaken(qwen3(n_head=n_head)), random_ids(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), to_transformers_qwen3(model)(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_embd, n_inner", [(384, 1024), (768, 2048)])
def test_qwen3_has_gpt2s_size_and_the_first_loss_of_even_odds(n_embd, n_inner):
    sizes = dict(n_layer=2, n_head=n_embd // 64, n_embd=n_embd, block_size=64, bias=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch="qwen3", **sizes))
    with torch.device("meta"):
        same = GPT(GPTConfig(**sizes)).num_params(positions=False)
    assert model.config.n_inner == n_inner and model.num_params() == pytest.approx(same, rel=1e-3)
    idx = random_ids(4, 65, high=50257)
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(50304), abs=0.1)


def test_qwen3_refuses_what_it_has_not():
    with pytest.raises(ModelError, match="no biases"):
        GPTConfig(arch="qwen3")


@pytest.mark.parametrize("make", [tiny, qwen3])
@pytest.mark.parametrize("pads", [None, [0, 3, 7]])
def test_the_cache_gives_the_hidden_states_of_the_whole(make, pads):
    model, idx = shaken(make().double()), random_ids(3, 30)
    pads = pads and torch.tensor(pads)
    cache = model.new_cache(3, 32)
    with torch.no_grad():
        pieces = [model.hidden(part, cache, pads) for part in idx.split([12, 1, 5, 1, 11], dim=1)]
        ours = torch.cat(pieces, dim=1)
        for i, pad in enumerate([0, 0, 0] if pads is None else pads.tolist()):
            whole = model.hidden(idx[i : i + 1, pad:])  # the same tokens without padding, at once
            torch.testing.assert_close(ours[i : i + 1, pad:], whole, atol=1e-10, rtol=0)
    assert cache.filled == 30


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = qwen3()
    muon, adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon")
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    in_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert in_muon == [n for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    assert sorted(in_muon + in_adamw) == sorted(names.values())
    assert "transformer.wte.weight" in in_adamw
    with pytest.raises(ModelError, match="arch='qwen3'"):
        tiny().configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon")
