import functools
import math
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo.testing
from networks import tiny
from runs import write_characters

from onecard import UserError, generation, writing
from onecard.generation import generate
from onecard.tokenizer import load_tokenizer

GREEDY, SAMPLED = dict(temperature=0), dict(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)


def network(**changes):
    """A tiny network in float64 with large weights, so that its texts vary."""
    model = tiny(**dict(block_size=32, vocab_size=96, dropout=0.0, bias=False) | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return model.double()


def random_prompts(n, longest):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [torch.randint(96, (length,), generator=g).tolist() for length in lengths]


@torch.no_grad()
def by_hand(model, prompt, n, seed, options):
    """The definition: the id after the window, which is cut to half when it would outgrow block_size.

    It is the likeliest, or the one at which the summed probabilities exceed the next number of the seed's generator.
    """
    ids, block_size, begin = list(prompt), model.config.block_size, 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        while len(ids) - begin > block_size:
            begin += block_size - block_size // 2 + 1
        logits = model(torch.tensor([ids[begin:]]))[:, -1]
        if options is GREEDY:
            ids.append(logits.argmax().item())
        else:
            number = torch.rand((), generator=generator, dtype=torch.float64)
            ids.append((generation.logits_to_probs(logits, **options)[0].cumsum(0) <= number).sum().item())
    return ids


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 32])
def test_a_window_grows_to_block_size_and_is_then_cut_to_its_last_half(block_size):
    assert [generation.window_start(n, block_size) for n in range(1, block_size + 1)] == [0] * block_size
    for n in range(block_size, 6 * block_size):
        before, after = n - generation.window_start(n, block_size), n + 1 - generation.window_start(n + 1, block_size)
        assert after == (before + 1 if before < block_size else max(1, block_size // 2))


@pytest.mark.parametrize("arch, n", [("gpt2", 150), ("qwen3", 75)])  # the windows are cut 30 and 15 times
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_text_is_the_same_with_and_without_cache_in_a_batch_and_alone(arch, n, options):
    model, prompts = network(arch=arch, block_size=8), random_prompts(8, 20)
    assert any(len(p) < 4 for p in prompts) and any(len(p) > 8 for p in prompts)
    together = generate(model, prompts, n, seeds=range(8), **options)
    assert [len(ids) - len(prompt) for ids, prompt in zip(together, prompts, strict=True)] == [n] * 8
    assert max(len(set(ids[-n:])) for ids in together) > 10  # not all of them run in circles
    assert generate(model, prompts, n, seeds=range(8), use_cache=False, **options) == together
    assert generate(model, prompts[::-1], n, seeds=range(7, -1, -1), **options)[::-1] == together
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], n, seeds=[i], **options) == [together[i]]
    assert [by_hand(model, prompt, n, i, options) for i, prompt in enumerate(prompts[:3])] == together[:3]
    if options is SAMPLED:
        assert generate(model, prompts, n, seeds=range(1, 9), **options) != together


def test_without_seeds_texts_differ_the_shared_generator_is_not_used_and_16_bits_give_texts():
    model, before = network(), torch.get_rng_state()
    assert generate(model, [[1]], 50) != generate(model, [[1]], 50)
    assert torch.equal(torch.get_rng_state(), before)
    for dtype in (torch.bfloat16, torch.float16):
        rows = generate(network().to(dtype), [[1, 2, 3], [4]], 60, seeds=[0, 1])
        assert [len(row) for row in rows] == [63, 61]


def test_a_sequence_ends_after_the_stop_id_and_the_others_go_on_as_they_would_have():
    model, prompts = network(), random_prompts(8, 20)
    free = generate(model, prompts, 80, seeds=range(8))
    made = Counter(id for row, prompt in zip(free, prompts, strict=True) for id in set(row[len(prompt) :]))
    stop = next(id for id, n in made.items() if n == 6)  # six of eight end early, so the cache is rebuilt on the way
    expected = []
    for row, prompt in zip(free, prompts, strict=True):
        n = len(prompt)
        expected.append(row[: row.index(stop, n) + 1] if stop in row[n:] else row)
    assert generate(model, prompts, 80, seeds=range(8), stop_id=stop) == expected


def test_stream_leaves_out_what_has_ended_and_stops_when_all_have_or_no_tokens_are_asked_for():
    assert generate(network(), [[1]], 0) == [[1]]
    ended, steps = set(), []
    for new_ids in generation.stream(network(), [[1], [2], [3]], 10, seeds=[1, 2, 3], ended=ended):
        steps.append(list(new_ids))
        ended.add({1: 0, 3: 2, 6: 1}.get(len(steps), 0))
    assert steps == [[0, 1, 2], [1, 2], [1, 2], [1], [1], [1]]


FILTERS = [{}, dict(temperature=0.5), dict(top_k=1), dict(top_k=7), dict(top_k=1000), dict(top_p=0.9)]
FILTERS += [dict(top_p=0.0), dict(min_p=0.2), dict(min_p=1.0), dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.1)]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_probabilities_are_those_of_transformers(options):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if "top_p" not in options:  # where top-p cuts through ties, transformers keeps what its sort leaves
        logits = logits.round()
    names = dict(temperature="Temperature", top_k="TopK", top_p="TopP", min_p="MinP")
    expected = logits
    for key, value in options.items():
        expected = getattr(warpers, f"{names[key]}LogitsWarper")(value)(None, expected)
    ours = generation.logits_to_probs(logits, **options)
    assert torch.equal(ours > 0, expected.softmax(-1) > 0)
    torch.testing.assert_close(ours, expected.softmax(-1), atol=1e-12, rtol=0)


def test_top_p_over_a_large_vocabulary_keeps_as_many_as_it_takes():
    """Zipf's law: as many as the sums of its probabilities say, below or above 2,048. Ties of the last id stay."""
    ranks = torch.arange(1, 50258, dtype=torch.float64)
    logits = -ranks.log()[None] + 1e-9 * torch.randn(1, 50257, generator=torch.Generator().manual_seed(5)).double()
    sums = logits.softmax(-1).sort(descending=True).values.cumsum(-1)[0]
    for p in (0.1, 0.5, 0.8, 0.99):
        assert (generation.keep_top_p(logits, p) > -math.inf).sum() == (sums < p).sum() + 1
    assert (sums < 0.5).sum() < 2048 < (sums < 0.8).sum()
    assert (generation.keep_top_p(torch.zeros(1, 50257, dtype=torch.float64), 0.5) == 0).all()
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.2]], dtype=torch.float64).log()
    assert (generation.keep_top_p(logits, 0.6) == logits.masked_fill(logits < math.log(0.15), -math.inf)).all()


def test_a_temperature_near_zero_is_greedy_and_a_huge_one_gives_equal_odds():
    logits = torch.tensor([[1.0, 3.0, 2.999, -50.0], [1e30, 0.0, -1e30, 1e29]])
    assert generation.logits_to_probs(logits, 1e-6).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert generation.logits_to_probs(logits, 1e-300).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert (generation.logits_to_probs(logits[:1], 1e300) - 0.25).abs().max() < 1e-12


def test_the_sampled_id_is_the_first_whose_cumulative_probability_exceeds_the_number():
    g = torch.Generator().manual_seed(3)
    p = torch.rand(200, 40, generator=g, dtype=torch.float64) * (torch.rand(200, 40, generator=g) < 0.3)
    p[:, 17] += 0.01
    p /= p.sum(-1, keepdim=True)
    uniform = torch.rand(200, generator=g, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    for row, u, id in zip(p.tolist(), uniform.tolist(), generation.sample(p, uniform).tolist(), strict=True):
        sums = [math.fsum(row[: i + 1]) for i in range(40)]
        expected = next((i for i in range(40) if sums[i] > u), max(i for i in range(40) if row[i]))
        assert id == expected and row[id] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(UserError, match="not finite"):
        generation.next_ids(torch.tensor([[0.0, 1.0], [bad, 0.0]]), [torch.Generator()] * 2, temperature)


def test_samples_of_a_run_are_the_same_each_time_and_differ_from_each_other():
    """test_train.py has that they do not affect training."""
    model, letters = network(dropout=0.5).train(), SimpleNamespace(eot=0, decode=str)
    texts = writing.sample_texts(model, letters, n=4, max_new_tokens=20)
    assert texts == writing.sample_texts(model, letters, n=4, max_new_tokens=20) and len(set(texts)) == 4
    assert model.training


def test_only_ids_of_the_tokenizer_are_generated_even_where_padding_is_likelier():
    model, prompts = network(), [[1]] * 4
    assert tiny().n_ids == 50257 < tiny().config.vocab_size
    assert max(map(max, generate(model, prompts, 50, seeds=range(4)))) > 70
    model.n_ids = 65
    with torch.no_grad():
        model.transformer.wte.weight[65:] *= 100
    for options in (GREEDY, SAMPLED):
        assert max(map(max, generate(model, prompts, 50, seeds=range(4), **options))) < 65


def test_a_text_begins_with_the_separator_or_as_in_nanogpt_with_a_line_end(tmp_path):
    assert writing.first_id(load_tokenizer()) == 50256 and writing.first_id(load_tokenizer("bytes")) == 256
    for text, id in (("b\na ", 0), ("b\ta\n", 1), ("ab", 0)):
        write_characters(tmp_path, text)
        assert writing.first_id(load_tokenizer(tmp_path / "meta.pkl")) == id


def harness_windows(ids, block_size, stride):
    """lm-evaluation-harness's rolling windows by their definition: (what is read, what is predicted)."""
    predicted = min(block_size, len(ids))
    found = [([None, *ids[: predicted - 1]], ids[:predicted])]
    while predicted < len(ids):
        n = min(len(ids) - predicted, stride)
        predicted += n
        found.append((ids[predicted - block_size - 1 : predicted - 1], ids[predicted - n : predicted]))
    return found


@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("stride", [0, 1, 5, 31, 32, 33])
@torch.no_grad()
def test_scores_are_the_log_probabilities_in_the_harness_windows_each_led_by_the_prefix(n, stride):
    model = network()
    ids = torch.randint(96, (n,), generator=torch.Generator().manual_seed(4)).tolist()
    expected = []
    for read, predicted in harness_windows(ids, 32, min(stride or 32, 32)):
        logp = model(torch.tensor([[0, *read[1:]]]))[0, -len(predicted) :].log_softmax(-1)
        expected += [-logp[i, id].item() for i, id in enumerate(predicted)]
    for batch_size in (1, 3):
        losses = generation.score(model, ids, 0, stride, batch_size)
        assert losses.dtype == torch.float64 and losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_step_of_fixed_shape_gives_the_same_text(options, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr(generation, "COLUMNS", 8)
    prompts, options = random_prompts(3, 40), dict(options, seeds=[1, 2, 3], stop_id=7)
    for arch in ("gpt2", "qwen3"):
        model = network(arch=arch)
        assert generate(model, prompts, 60, compile=True, **options) == generate(model, prompts, 60, **options)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_text_and_is_compiled_once():
    model, counter = network(), torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = functools.partial(torch.compile, backend=counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda step, dynamic, mode: compiled(step, dynamic=dynamic))
        found = generate(model, [[1], [2, 3]], 60, seeds=[1, 2], compile=True)
    assert found == generate(model, [[1], [2, 3]], 60, seeds=[1, 2]) and counter.frame_count == 1


def test_an_empty_text_and_a_compiler_that_fails_are_reported_in_one_line(monkeypatch):
    failing = Mock(side_effect=torch._dynamo.exc.TorchDynamoException("no compiler\nat line 3"))
    monkeypatch.setattr(torch, "compile", lambda step, **_: failing)
    with pytest.raises(UserError, match="compile failed: no compiler; leave out --compile"):
        generate(network(), [[1]], 5, compile=True)
    with pytest.raises(UserError, match="empty"):
        generation.score(network(), [], 0)
