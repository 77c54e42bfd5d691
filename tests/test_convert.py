"""Weights that go out to other programs and come back. Each program is its own witness: transformers, gguf, llama.cpp,
safetensors and a hand-written forward pass read what convert.py wrote, and say what it should have been."""

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from onecard import checkpoint
import convert
import sample
from convert import ConvertError
from model import GPT, GPT2_IDS, GPTConfig
from onecard.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## In and out\n")[2].partition("\n## ")[0]
TINY = dict(block_size=64, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
NETWORKS = {
    "gpt2": dict(bias=False),
    "gpt2 with biases and the exact GELU": dict(bias=True, gelu="none"),
    "qwen3": dict(arch="qwen3", bias=False),
}
EOT = 50256


def tiny(**changes):
    """A network with all weights away from the zeros and ones of the initialisation."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model, folder, **about):
    folder.mkdir(parents=True)
    state = dict(iter_num=7, best_val_loss=math.inf, config={}) | about
    state |= dict(model=model.state_dict(), model_args=asdict(model.config))
    checkpoint.write(folder / "ckpt.pt", state)
    return folder


def text_ids(n, seed=0):
    return torch.randint(GPT2_IDS, (2, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model, ids, n):
    """The n likeliest ids one after the other behind `ids`, a list -> a list."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1, :GPT2_IDS].argmax().item())
    return ids[start:]


def assert_same(ours, back):
    assert back.config == ours.config
    for (name, a), b in zip(ours.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a[:GPT2_IDS], b[:GPT2_IDS]), name


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """-> (a network, the folder in Hugging Face format that convert.py made of its checkpoint)."""
    pytest.importorskip("transformers")
    model = tiny(**NETWORKS[request.param])
    folder = save(model, tmp_path_factory.mktemp("run") / "run")
    convert.main([str(folder), "--to=hf"])
    return model, folder / "hf"


# ---- Hugging Face


@torch.no_grad()
def test_transformers_has_our_logits_and_our_greedy_text(exported):
    transformers = pytest.importorskip("transformers")
    ours, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == GPT2_IDS
    idx = text_ids(64)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[..., :GPT2_IDS], atol=1e-4, rtol=0)
    text = theirs.generate(idx[:1, :8], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert text[0, 8:].tolist() == greedy(ours, idx[0, :8].tolist(), 20)


def test_a_folder_comes_back_bit_for_bit(exported, tmp_path):
    ours, folder = exported
    convert.main([str(folder), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, about = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert_same(ours, back)
    assert about["iter_num"] == 7


def test_the_files_of_a_folder_are_those_that_other_programs_ask_for(exported):
    safetensors = pytest.importorskip("safetensors")
    ours, folder = exported
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names | {"README.md"}
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    c = ours.config
    missing = 0 if c.bias or c.arch == "qwen3" else c.n_layer * (3 + 1 + 4 + 1 + 1 + 1) * c.n_embd + c.n_embd
    assert parameters == ours.num_params() - (c.vocab_size - GPT2_IDS) * c.n_embd + missing
    assert f"{parameters:,}" in (folder / "README.md").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == EOT


def hard_strings():
    """Text that tokenizers trip over, and random characters of all of Unicode."""
    rng = random.Random(0)
    kinds = [(32, 127), (0, 160), (0x2000, 0x2070), (0x300, 0x700), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD800)]
    texts = ["".join(chr(rng.randrange(*kinds[i % 7])) for _ in range(200)) for i in range(70)]
    spaces = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u3000"
    texts += ["".join(rng.choice(spaces + "ab'!1") for _ in range(200)) for _ in range(30)]
    texts += ["", " ", "it's we'LL 'tis", "a<|endoftext|>b", "  x  ", "x" * 3000, " " * 3000 + "y", "1234567 ½ Ⅳ ٣"]
    return texts


def test_the_exported_tokenizer_gives_tiktokens_ids_and_its_text_back(exported):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported[1]), load_tokenizer()
    assert len(theirs) == 50257 and theirs.eos_token_id == theirs.bos_token_id == EOT
    for text in hard_strings():
        ids = theirs(text, split_special_tokens=True, verbose=False)["input_ids"]
        assert ids == ours.encode(text).tolist(), repr(text)
        assert theirs.decode(ids) == text
    assert theirs("<|endoftext|>Hi")["input_ids"] == [EOT, *ours.encode("Hi").tolist()]


def test_merges_are_those_of_openais_file():
    ids = convert.vocabulary(load_tokenizer())
    pairs = convert.merges(ids)
    assert len(pairs) == 50_000  # and the first of vocab.bpe, which OpenAI published with GPT-2
    assert pairs[:9] == ["Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s"]
    assert ids["Hello"] == 15496 and ids["Ġworld"] == 995


def test_a_padded_row_costs_no_more_than_jensens_inequality_allows():
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(50, 16, generator=generator).double(), torch.randn(100, 16, generator=generator).double()
    targets = torch.randint(100, (50,), generator=generator)
    padded = convert.pad_rows(table, 107)
    assert torch.equal(padded[:100], table)
    before, after = (F.cross_entropy(x @ rows.t(), targets, reduction="none") for rows in (table, padded))
    rise = after - before
    assert (rise > 0).all() and (rise <= math.log(1 + 7 / 100)).all()


def test_the_card_says_the_loss_with_its_error(tmp_path):
    rows = [dict(kind="eval", step=step, val_loss=loss, val_error=0.1291) for step, loss in ((0, 9.0), (7, 3.3))]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "ev')
    found = convert.last_evaluation(path, 7)
    config = dict(dataset="fineweb")
    about = found | dict(iter_num=7, sequences=70, data=dict(train_tokens=12345), config=config)
    card = convert.model_card(GPTConfig(**TINY), about, "tiny", 1000)
    assert "3.3000 +- 0.1291" in card and "12,345" in card and "4,480 tokens in 7 steps" in card and "fineweb" in card


def hf_gpt2(folder, **changes):
    """A tiny random GPT-2 as transformers itself makes and saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(**{**dict(n_positions=64, n_embd=32, n_layer=2, n_head=2), **changes})
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation, gelu", [("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu", "none")])
@torch.no_grad()
def test_a_gpt2_that_transformers_made_keeps_its_logits(activation, gelu, tmp_path):
    theirs = hf_gpt2(tmp_path / "theirs", activation_function=activation)
    ours, _ = convert.read(str(tmp_path / "theirs"))
    assert ours.config == GPTConfig(**{**TINY, "vocab_size": GPT2_IDS, "bias": True, "gelu": gelu})
    idx = text_ids(64)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_finetuning_start_has_another_dropout_and_fewer_positions(tmp_path):
    theirs = hf_gpt2(tmp_path / "theirs")
    ours = convert.start(str(tmp_path / "theirs"), block_size=32, dropout=0.25)
    assert ours.training and ours.config.dropout == 0.25 and ours.config.block_size == 32
    assert ours.transformer.h[0].mlp.dropout.p == 0.25
    idx = text_ids(32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(idx), theirs(idx).logits, atol=1e-5, rtol=0)
    with pytest.raises(ConvertError, match=r"block_size=65: .* has 64 positions"):
        convert.start(str(tmp_path / "theirs"), block_size=65, dropout=0.0)


def test_a_qwen3_of_another_shape_is_refused_with_all_that_differs(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60000)
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=32, rope_theta=1e6)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConvertError) as error:
        convert.read(str(tmp_path / "theirs"))
    for key in ("num_key_value_heads=1", "head_dim=32 (ours: 16)", "rope_theta=1000000.0", "tie_word_embeddings=False"):
        assert key in str(error.value)


def test_what_is_no_whole_gpt2_folder_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    hf_gpt2(tmp_path / "part")
    weights = safetensors.load_file(tmp_path / "part" / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    safetensors.save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=r"missing .* transformer\.h\.1\.mlp\.c_fc\.weight"):
        convert.read(str(tmp_path / "part"))
    hf_gpt2(tmp_path / "other words")
    ids = {token: (i + 1) % 50256 for token, i in convert.vocabulary(load_tokenizer()).items()}
    (tmp_path / "other words" / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(ConvertError, match="not GPT-2's tokenizer"):
        convert.read(str(tmp_path / "other words"))
    (tmp_path / "other words" / "vocab.json").write_text('{"half')
    with pytest.raises(ConvertError, match="no vocabulary can be read from it"):
        convert.read(str(tmp_path / "other words"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConvertError, match="llama; gpt2 and qwen3 are known"):
        convert.read(str(tmp_path / "other"))


def test_gpt2_by_name_comes_from_the_cache_of_the_hub_or_is_missed_in_one_sentence(tmp_path):
    hub = tmp_path / "hub" / "models--gpt2"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0123")
    theirs = hf_gpt2(hub / "snapshots" / "0123")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import convert\n"
        "convert.main(['gpt2', '--to=onecard'])\n"
        "convert.run_script(lambda: convert.main(['gpt2-medium', '--to=onecard']), convert.ConvertError)"
    )
    env = os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    ours, _ = checkpoint.load_model(tmp_path / "out" / "gpt2" / "ckpt.pt")
    assert torch.equal(ours.transformer.wpe.weight, theirs.transformer.wpe.weight)
    assert done.returncode == 2 and "gpt2-medium: transformers cannot load it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(list(tmp_path.glob("out/*"))) == 1


# ---- nanoGPT


def forward_by_hand(args, weights, idx):
    """GPT-2 with the exact GELU, as nanoGPT computes it, from the tensors of a ckpt.pt alone. -> logits (T, V)."""
    w, heads = {name: tensor.double() for name, tensor in weights.items()}, args["n_head"]

    def linear(x, name):
        return x @ w[name + ".weight"].t() + w.get(name + ".bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    T = len(idx)
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for layer in range(args["n_layer"]):
        h = f"transformer.h.{layer}."
        q, k, v = (
            z.view(T, heads, -1).transpose(0, 1) for z in linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, 1)
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), h + "attn.c_proj")
        z = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        x = x + linear(z * (1 + torch.erf(z / math.sqrt(2))) / 2, h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].t()


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_checkpoint_has_its_keys_and_gives_its_logits(bias, tmp_path):
    ours = tiny(bias=bias, gelu="none")
    convert.main([str(save(ours, tmp_path / "run")), "--to=nanogpt"])
    saved = torch.load(tmp_path / "run" / "nanogpt" / "ckpt.pt", weights_only=True)
    fields = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}  # of nanoGPT's GPTConfig
    assert set(saved["model_args"]) == fields
    idx = text_ids(64)[0]
    logits = forward_by_hand(saved["model_args"], saved["model"], idx)
    torch.testing.assert_close(ours(idx[None])[0].double(), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_nanogpts_checkpoint_comes_back_bit_for_bit(gelu, tmp_path):
    ours = tiny(bias=True, gelu=gelu)
    convert.main([str(save(ours, tmp_path / "run")), "--to=nanogpt"])
    convert.main([str(tmp_path / "run" / "nanogpt" / "ckpt.pt"), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, _ = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert_same(ours, back)
    assert torch.equal(back.lm_head.weight, ours.lm_head.weight)  # the padded rows too


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_that_nanogpt_wrote_is_read_as_it_is(prefix, tmp_path):
    model = tiny(bias=False, gelu="none", vocab_size=65, dropout=0.0)  # characters of Shakespeare
    args = {k: v for k, v in asdict(model.config).items() if k not in ("arch", "gelu")}
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    weights[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the mask that old ones have
    saved = dict(model=weights, optimizer={}, model_args=args, iter_num=5000, best_val_loss=torch.tensor(1.5))
    torch.save(saved | dict(config={"dataset": "shakespeare_char"}), tmp_path / "ckpt.pt")
    ours, about = convert.read(str(tmp_path / "ckpt.pt"))
    assert_same(model, ours)
    assert about == dict(iter_num=5000, best_val_loss=1.5)


def test_nothing_of_an_attackers_file_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(dict(model={}, model_args=Attack()), tmp_path / "ckpt.pt")
    with pytest.raises(ConvertError, match="tensors and plain values alone"):
        convert.read(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "owned").exists()


# ---- GGUF


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def run_with_gguf(request, tmp_path_factory):
    """-> (a network, the folder of its run, in which run.gguf lies)."""
    pytest.importorskip("gguf")
    model = tiny(**NETWORKS[request.param])
    folder = save(model, tmp_path_factory.mktemp("gguf") / "run")
    convert.main([str(folder), "--to=gguf"])
    return model, folder


def test_a_gguf_file_has_the_keys_of_llama_cpp_and_the_tensors_of_the_hugging_face_folder(run_with_gguf):
    """Which tensor is which is gguf's own table, which goes by the names that transformers gives them."""
    gguf, safetensors = pytest.importorskip("gguf"), pytest.importorskip("safetensors.torch")
    (model, run), network = run_with_gguf, run_with_gguf[0].config.arch
    convert.main([str(run), "--to=hf"])
    reader = gguf.GGUFReader(run / "run.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[network]
    table = gguf.get_tensor_name_map(arch, model.config.n_layer)
    theirs = safetensors.load_file(run / "hf" / "model.safetensors")
    for name, weight in theirs.items():
        turned = network == "gpt2" and ".c_" in name and weight.dim() == 2  # Conv1D has (in, out)
        there = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert torch.equal(tensors.pop(there), weight.t() if turned else weight), name
    assert not tensors
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == network
    expected = dict(context_length=64, embedding_length=32, block_count=2)
    expected |= {"attention.head_count": 2, "feed_forward_length": 128}
    if network == "gpt2":
        expected |= {"attention.layer_norm_epsilon": pytest.approx(1e-5)}
    else:
        expected |= {"attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "rope.freq_base": 10_000.0}
        expected |= {"attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16}
    assert {name: keys[f"{network}.{name}"] for name in expected} == expected
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(keys["tokenizer.ggml.tokens"]) == 50257 and len(keys["tokenizer.ggml.merges"]) == 50_000
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == EOT
    assert keys["tokenizer.ggml.token_type"][EOT] == gguf.TokenType.CONTROL


PROMPTS = ("The", "A card with", "In 1969", " x", "def f(", "日本", "\n\n", "Once upon a time", "a<b", "don't")


def test_llama_cpp_has_our_ids_and_the_same_greedy_text(run_with_gguf):
    """Where llama-cpp-python is installed, which builds from source. It takes GELU from a table in float16: rounding so
    moves the logits of this random GPT-2 by 1.7e-3 in our own network too; the likeliest token stays."""
    llama_cpp, (ours, run), tokenizer = pytest.importorskip("llama_cpp"), run_with_gguf, load_tokenizer()
    options = dict(n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    options |= dict(type_k=0, type_v=0, flash_attn=False)  # keys and values in float32
    llama = llama_cpp.Llama(str(run / "run.gguf"), **options)
    for prompt in PROMPTS:
        ids = llama.tokenize(prompt.encode(), add_bos=True, special=False)
        assert ids == [EOT, *tokenizer.encode(prompt).tolist()]
        llama.reset()
        stream = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in range(50)] == greedy(ours, ids, 50)
    idx, atol = text_ids(64)[:1], 1e-4 if ours.config.arch == "qwen3" else 5e-3
    llama.reset()
    llama.eval(idx[0].tolist())
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(llama.scores[:64]), ours(idx)[0, :, :GPT2_IDS], atol=atol, rtol=0)


# ---- the README's section


def test_each_command_of_the_readmes_table_is_taken_as_it_stands(tmp_path, monkeypatch):
    for package in ("transformers", "gguf"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    save(tiny(), Path("out/run"))
    commands = re.findall(r"`python convert\.py ([^`]+)`", SECTION)
    for command in commands:
        command = command.replace("path/to/ckpt.pt", "out/run/nanogpt/ckpt.pt").replace("FOLDER", "out/run/hf")
        convert.main(command.split())
    made = {"out/run/hf", "out/run/run.gguf", "out/run/nanogpt/ckpt.pt", "out/old/ckpt.pt", "out/hf/ckpt.pt"}
    assert len(commands) == len(made) and all(Path(path).exists() for path in made)


TASK = """
task: my_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


def test_lm_evaluation_harness_gives_the_loss_of_sample_py(tmp_path, capsys):
    """Where lm_eval is installed: the README's line, with a task that needs no network. The network has no padded
    rows, which sample.py counts (at most 0.0009) and the exported folder no longer has."""
    pytest.importorskip("lm_eval")
    run, text = save(tiny(vocab_size=GPT2_IDS), tmp_path / "run"), "It's a small text,\nwith a “quote” in it."
    convert.main([str(run), "--to=hf"])
    (tmp_path / "my_text.txt").write_bytes(text.encode())
    (tmp_path / "my_text.jsonl").write_text(json.dumps(dict(text=text)))
    (tmp_path / "my_text.yaml").write_text(TASK.format(path=tmp_path / "my_text.jsonl"))
    line = next(line for line in SECTION.splitlines() if line.startswith("lm_eval "))
    line = line.replace("out/run/hf", str(run / "hf")).replace("hellaswag", "my_text").removeprefix("lm_eval ")
    more = ["--include_path", tmp_path, "--output_path", tmp_path / "results", "--device", "cpu"]
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-m", "lm_eval", *line.split(), *more], env=env, check=True, capture_output=True)
    (results,) = (tmp_path / "results").rglob("*.json")
    theirs = json.loads(results.read_text())["results"]["my_text"]["bits_per_byte,none"]
    capsys.readouterr()
    sample.main([f"--out_dir={run}", f"--score={tmp_path / 'my_text.txt'}", "--json=true", "--device=cpu"])
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(theirs, rel=1e-6)


# ---- what is refused, and what stays behind


@pytest.mark.parametrize(
    "network, to, reason",
    [
        ("gpt2 with biases and the exact GELU", "gguf", "llama.cpp computes GPT-2 with the tanh form alone"),
        ("qwen3", "nanogpt", "nanoGPT has GPT-2's network alone"),
    ],
)
def test_what_the_other_program_cannot_compute_is_refused_with_the_reason(network, to, reason, tmp_path):
    pytest.importorskip("gguf")
    run = save(tiny(**NETWORKS[network]), tmp_path / "run")
    with pytest.raises(ConvertError, match=reason):
        convert.main([str(run), f"--to={to}"])
    assert [path.name for path in run.iterdir()] == ["ckpt.pt"]


def test_nothing_is_written_over(tmp_path):
    run = save(tiny(), tmp_path / "run")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConvertError, match="there is there already"):
        convert.main([str(run), "--to=nanogpt", f"--out={tmp_path / 'there'}"])
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("to, package", [("hf", "transformers"), ("gguf", "gguf"), ("nanogpt", ""), ("onecard", "")])
def test_a_full_disk_leaves_nothing_behind(to, package, small_disk, tmp_path):
    if package:
        pytest.importorskip(package)
    run, disk = save(tiny(), tmp_path / "run"), small_disk("3m")
    with pytest.raises((ConvertError, checkpoint.CheckpointError), match=r"could not be written|cannot be written"):
        convert.main([str(run), f"--to={to}", f"--out={disk / 'new'}"])
    assert not list(disk.iterdir())


def test_logits_that_differ_fail_the_export(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    run = save(tiny(), tmp_path / "run")
    monkeypatch.setattr(convert, "LAYER_NORM_EPS", 1e-2)  # a mistake in config.json, as one could make it
    with pytest.raises(ConvertError, match="logits differ by"):
        convert.main([str(run), "--to=hf"])
    assert [path.name for path in run.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("package, extra", [("transformers", "hf"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConvertError, match=rf"pip install -e '\.\[{extra}\]'"):
        convert.main([str(save(tiny(), tmp_path / "run")), f"--to={extra}"])


def test_the_script_says_in_a_line_what_it_was_not_given(tmp_path):
    whole, cut, flipped = save(tiny(), tmp_path / "run"), tmp_path / "cut.pt", tmp_path / "flipped.pt"
    data = bytearray((whole / "ckpt.pt").read_bytes())
    cut.write_bytes(data[:100_000])
    data[100_000] ^= 1
    flipped.write_bytes(data)
    torch.save(dict(model={}, model_args=5), tmp_path / "no.pt")
    words = {"nowhere": "nowhere: there is no such file", tmp_path: "ckpt.pt: there is no such file"}
    words |= {
        cut: "no whole checkpoint",
        tmp_path / "no.pt": "no whole checkpoint",
        flipped: "damaged",
        ROOT / "README.md": "no whole checkpoint",
    }
    for source, message in words.items():
        with pytest.raises((ConvertError, checkpoint.CheckpointError), match=message):
            convert.main([str(source), f"--out={tmp_path / 'new'}"])
    assert not list(tmp_path.glob("new*"))
    done = subprocess.run([sys.executable, "convert.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "convert.py: give one source: python convert.py out/run --to=hf"
    ]


def finetune(tiny_data, out_dir, *arguments):
    data_dir, dataset = tiny_data
    settings = dict(out_dir=out_dir, data_dir=data_dir, dataset=dataset, device="cpu", compile="false", block_size=32)
    settings |= dict(batch_size=4, gradient_accumulation_steps=1, eval_interval=25, eval_tokens=512, learning_rate=1e-2)
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", "config/finetune.py", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_finetuning_from_a_folder_lowers_the_loss_and_is_resumed_with_its_network(tiny_data, tmp_path):
    theirs = hf_gpt2(tmp_path / "theirs")
    begin, out_dir = f"--init_from={tmp_path / 'theirs'}", tmp_path / "run"
    code, said = finetune(tiny_data, out_dir, begin, "--max_iters=50", "--n_layer=3")
    assert code == 2 and "have n_layer=2: leave n_layer out" in said
    code, said = finetune(tiny_data, out_dir, begin, "--plan_only=True")
    assert code == 0 and f"{theirs.num_parameters() / 1e6 - 64 * 32 / 1e6:.2f}M parameters without positions" in said
    assert finetune(tiny_data, out_dir, begin, "--max_iters=50")[0] == 0
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if row["kind"] == "eval"}
    assert losses[0] == pytest.approx(math.log(GPT2_IDS), abs=0.5) and losses[50] < 0.7 * losses[0]
    ours, about = checkpoint.load_model(out_dir / "ckpt.pt")
    assert ours.config == GPTConfig(**TINY | dict(vocab_size=GPT2_IDS, bias=True, block_size=32))
    assert about["began_from"] == str(tmp_path / "theirs") and theirs.config.n_positions == 64
    assert finetune(tiny_data, out_dir, "--init_from=resume", "--max_iters=52")[0] == 0
    assert checkpoint.load_model(out_dir / "ckpt.pt")[1]["iter_num"] == 52
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    assert {row["config"]["init_from"] for row in rows if row["kind"] == "start"} == {begin.split("=")[1]}
    code, planned = finetune(tiny_data, out_dir, "--init_from=resume", "--plan_only=True")
    assert code == 0 and [line for line in planned.splitlines() if line.startswith("model ")] == [
        line for line in said.splitlines() if line.startswith("model ")
    ]
    assert f"not with the weights of {tmp_path / 'theirs'}" in planned
    code, said = finetune(tiny_data, out_dir, "--init_from=nowhere")
    assert code == 2 and "init_from='nowhere' is no file or folder" in said
    assert len(said.splitlines()) == 1
