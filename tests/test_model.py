"""model.py against transformers' networks, torch's own cross entropy, counts by hand and published sizes."""

import math

import networks
import pytest
import torch
from torch.nn import functional as F

import model as model_module
from model import GPT, ChunkedCrossEntropy, GPTConfig, ModelError
from onecard.generation import Cache
from onecard.pretrained import hf_name, hf_network, transposed

TINY = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
QWEN3 = dict(arch="qwen3", bias=False)


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY, **changes}))


def shaken(**changes):
    """In eval mode, with all weights away from the zeros and ones of the initialization."""
    return networks.tiny(**{**TINY, **changes})


def random_ids(*shape, high=96, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- sizes


@pytest.mark.parametrize(
    "changes, total, positions",
    [
        (dict(), 124_475_904, 786_432),  # GPT-2's published size, with 50,304 rows
        (dict(bias=False), 124_373_760, 786_432),  # the two anchor runs
        (dict(bias=False, n_embd=384), 40_953_216, 393_216),
        (dict(**QWEN3), 50304 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768 + 2 * 64) + 768, 0),
        (dict(**QWEN3, n_embd=384, n_head=6), 50304 * 384 + 12 * (4 * 384**2 + 3 * 384 * 1024 + 2 * 448) + 384, 0),
    ],
)
def test_the_number_of_parameters_is_the_published_one(changes, total, positions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**changes))
    embedding = 50304 * model.config.n_embd
    counts = dict(embedding=embedding, positions=positions, blocks=total - embedding - positions, total=total)
    assert model.parameter_counts() == counts
    assert (model.num_params(), model.num_params(positions=False)) == (total, total - positions)


def test_flops_give_the_utilization_of_the_founding_run():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False, n_embd=384))
    assert model.flops_per_token() == 6 * 40_560_000 + 12 * 12 * 384 * 1024
    assert model.flops_per_token(T=100) == 6 * 40_560_000 + 12 * 12 * 384 * 100
    assert 134.1e3 * model.flops_per_token() / 58.3e12 == pytest.approx(0.69, abs=0.005)  # tokens/s, an RTX 4070


# ---- the networks


def to_transformers(model):
    """The network of transformers with the same weights."""
    transformers = pytest.importorskip("transformers")
    arch, sizes = model.config.arch, hf_network(model.config)
    kind, vocab_size = sizes.pop("model_type"), model.config.vocab_size
    config = transformers.AutoConfig.for_model(kind, **sizes, vocab_size=vocab_size, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    weights = {hf_name(name, arch): transposed(name, w, arch) for name, w in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith(".bias") and not model.config.bias for name in missing)
    with torch.no_grad():
        for name in missing:
            theirs.get_parameter(name).zero_()
    return theirs


@pytest.mark.parametrize(
    "network",
    [dict(bias=bias, gelu=gelu) for bias in (True, False) for gelu in ("tanh", "none")]
    + [QWEN3 | dict(n_head=n_head) for n_head in (1, 2)],
    ids=str,
)
def test_logits_equal_those_of_transformers(network):
    model, idx = shaken(**network), random_ids(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), to_transformers(model)(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("network", [dict(bias=True), QWEN3], ids=["gpt2", "qwen3"])
@pytest.mark.parametrize("pads", [None, [0, 3, 7]])
def test_the_cache_gives_the_hidden_states_of_the_whole_sequence(network, pads):
    """So no token is influenced by a later one."""
    model, idx = shaken(**network).double(), random_ids(3, 30)
    pads = pads and torch.tensor(pads)
    cache = Cache(model, 3, 32)
    with torch.no_grad():
        pieces = [model.hidden(part, cache, pads) for part in idx.split([12, 1, 5, 1, 11], dim=1)]
        ours = torch.cat(pieces, dim=1)
        for i, pad in enumerate([0, 0, 0] if pads is None else pads.tolist()):
            whole = model.hidden(idx[i : i + 1, pad:])  # the same tokens without padding, at once
            torch.testing.assert_close(ours[i : i + 1, pad:], whole, atol=1e-10, rtol=0)
    assert cache.filled == 30


@pytest.mark.parametrize("network, expected", [({}, math.log(50304) + 0.0002 * 256), (QWEN3, math.log(50304))])
def test_the_first_loss_is_that_of_a_uniform_guess(network, expected):
    """gpt2: logits of variance 0.02^2 C add half of it."""
    model = tiny(**dict(block_size=64, vocab_size=50304, n_head=4, n_embd=256) | network)
    idx = random_ids(4, 65, high=50257)
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(expected, abs=0.05)


def test_residual_projections_of_gpt2_start_smaller():
    for name, parameter in tiny(block_size=16, n_layer=8, n_head=4, n_embd=256).named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(
    "network, words",
    [
        (dict(n_head=3), "n_embd=32 is not a multiple of n_head=3"),
        (dict(gelu="relu"), "gelu='relu'.*tanh"),
        (dict(arch="llama"), "arch='llama'.*qwen3"),
        (dict(arch="qwen3"), "no biases.*bias=False"),
        (QWEN3 | dict(n_embd=36, n_head=12), "even head size.*n_head"),
        (dict(), "33 tokens.*block_size=32"),
    ],
)
def test_an_impossible_network_or_input_is_refused_with_key_and_remedy(network, words):
    with pytest.raises(ModelError, match=words):
        tiny(**network)(random_ids(1, 33))


# ---- the loss in chunks


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(model_module, "chunk_rows", lambda rows, V, device: 13)  # 64 rows: four chunks and a rest


def targets_with_gaps():
    targets = random_ids(2, 32, seed=2)
    targets[0, 5:9] = -100  # does not count
    return targets


def test_without_gradients_the_loss_is_torchs_own_of_each_token_and_of_all(small_chunks):
    model, idx, targets = tiny(), random_ids(2, 32), targets_with_gaps()
    with torch.no_grad():
        logits = model(idx).double().transpose(1, 2)  # (B, V, T)
        for reduction in ("none", "mean"):
            loss, expected = model(idx, targets, reduction), F.cross_entropy(logits, targets, reduction=reduction)
            torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype, scale, tolerance",
    [(torch.float32, 1.0, 1e-5), (torch.bfloat16, 1.0, 1e-2), (torch.float16, 65536.0, 1e-2)],
)
def test_the_chunked_loss_has_the_value_and_gradients_of_torchs_own(small_chunks, dtype, scale, tolerance):
    idx, targets = random_ids(2, 32), targets_with_gaps()
    theirs, ours = tiny(bias=True), tiny(bias=True)
    expected = F.cross_entropy(theirs(idx).transpose(1, 2), targets)
    expected.backward()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = ours(idx, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    (loss * scale).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad / scale, b.grad) < tolerance, name


def test_if_no_target_counts_the_loss_is_nan_and_gradients_are_zero_as_torchs(small_chunks):
    theirs, ours, idx, targets = tiny(), tiny(), random_ids(2, 32), torch.full((2, 32), -100)
    for model, loss in ((theirs, F.cross_entropy(theirs(idx).transpose(1, 2), targets)), (ours, ours(idx, targets))):
        loss.backward()
        assert math.isnan(loss.item()) and not any(p.grad.any() for p in model.parameters())


def test_head_gradients_are_exact_to_the_precision_of_their_products():
    """Without the 16-bit products of the blocks: the 50,304 small probabilities of a first step survive float16."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(40, 48), 0.02 * torch.randn(50304, 48), random_ids(40, high=50257)
    a = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [x.double().requires_grad_(), weight.double().requires_grad_()]
    (ChunkedCrossEntropy.apply(*a, targets, torch.float16, 13) * 65536.0).backward()
    F.cross_entropy(b[0] @ b[1].t(), targets).backward()
    for ours, exact in zip(a, b, strict=True):
        assert relative_error(ours.grad / 65536.0, exact.grad) < 2e-3


def test_the_compiled_loss_keeps_no_logits_for_backward(monkeypatch):
    """The compiler chooses what to keep. Code is not generated, which is slow; test_train.py does that."""
    monkeypatch.setattr(model_module, "chunk_rows", lambda rows, V, device: 128)
    model, eager = tiny(vocab_size=960), tiny(vocab_size=960)
    idx, targets = random_ids(16, 32), random_ids(16, 32, seed=2)  # 512 rows, four chunks
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")
        loss = compiled(idx, targets)
    loss.backward()
    assert (960, 32) in saved  # the gradient of the head, computed in forward
    assert not [shape for shape in saved if 960 in shape[1:]]
    eager(idx, targets).backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("device, budget", [("cpu", 2**26), ("cuda", 2**27)])
def test_a_chunk_of_logits_is_within_its_budget_and_there_are_no_more_than_needed(device, budget):
    for rows in (1, 7, 1000, 16384, 100_000):
        n = model_module.chunk_rows(rows, 50304, device)
        assert 1 <= n <= rows and (n - 1) * 50304 <= budget
        assert math.ceil(rows / n) == math.ceil(rows * 50304 / budget)
