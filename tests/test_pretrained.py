"""Weights that come in: from folders that transformers wrote, from nanoGPT's ckpt.pt, from damaged files."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from networks import TINY, assert_same, hf_gpt2, save, text_ids, tiny
from runs import flags_of, write_characters
from torch.nn import functional as F

import convert
import train
from configurator import ConfigError
from model import GPT2_IDS, GPTConfig
from onecard import UserError, checkpoint, pretrained
from onecard.tokenizer import from_state, load_tokenizer, train_tokenizer
from onecard.vocabulary import vocabulary
from onecard.windows import Windows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """-> a GPT-2 of transformers, the folder in which transformers saved it."""
    folder = tmp_path_factory.mktemp("hugging_face") / "theirs"
    return hf_gpt2(folder), folder


def refused(source, *words):
    with pytest.raises(UserError) as raised:
        pretrained.read(str(source))
    assert all(re.search(word, str(raised.value)) for word in words), raised.value


# ---- Hugging Face


@pytest.mark.parametrize("activation, gelu", [("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu", "none")])
@torch.no_grad()
def test_a_gpt2_that_transformers_made_keeps_its_logits(activation, gelu, tmp_path):
    theirs = hf_gpt2(tmp_path / "theirs", activation_function=activation)
    ours, _ = pretrained.read(str(tmp_path / "theirs"))
    assert ours.config == GPTConfig(**{**TINY, "vocab_size": GPT2_IDS, "bias": True, "gelu": gelu})
    idx = text_ids(64)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_finetuning_start_has_another_dropout_and_fewer_positions(gpt2):
    theirs, folder = gpt2
    ours, _ = pretrained.start(str(folder), block_size=32, dropout=0.25)
    assert ours.training and ours.config.dropout == 0.25 and ours.config.block_size == 32
    assert ours.transformer.h[0].mlp.dropout.p == 0.25
    idx = text_ids(32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(idx), theirs(idx).logits, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"block_size=65: .* has 64 positions"):
        pretrained.start(str(folder), block_size=65, dropout=0.0)


def test_a_qwen3_of_another_shape_is_refused_with_all_differences(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60000)
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=32, rope_theta=1e6)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    shape = ("num_key_value_heads=1", r"head_dim=32 \(must be 16\)")
    refused(tmp_path, *shape, "rope_theta=1000000", "tie_word_embeddings=F")


def test_a_folder_with_a_missing_weight_another_tokenizer_or_another_network_is_refused(gpt2, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = shutil.copytree(gpt2[1], tmp_path / "theirs")
    ids = {token: (i + 1) % 50256 for token, i in vocabulary(load_tokenizer()).items()}
    (folder / "vocab.json").write_text(json.dumps(ids))
    refused(folder, "vocab.json: not GPT-2's tokenizer; others are read from a tokenizer.json")
    (folder / "vocab.json").write_text('{"half')
    refused(folder, "vocab.json: has no readable vocabulary")
    (folder / "vocab.json").unlink()
    weights = safetensors.load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"missing .* transformer\.h\.1\.mlp\.c_fc\.weight")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refused(folder, "type llama; onecard reads gpt2 and qwen3")


def test_another_tokenizer_json_is_carried_and_gpt2s_own_files_are_known(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    hf_gpt2(tmp_path, vocab_size=384)
    refused(tmp_path, "vocab_size=384 .* 50257 ids of gpt2: put its own tokenizer.json beside it")
    content = train_tokenizer([(ROOT / "README.md").read_text()], 300)
    (tmp_path / "tokenizer.json").write_text(content)
    model, about = pretrained.start(str(tmp_path), block_size=64, dropout=0.0)
    carried = from_state(about["tokenizer"])
    assert carried.n_vocab == 300 and model.config.vocab_size == 384 and carried.content == content
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert carried.encode("The card's 24 GB").tolist() == library.encode("The card's 24 GB").ids
    ids = vocabulary(load_tokenizer()) | {"<|endoftext|>": 50256, "<|pad|>": 50257}  # a token was added
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(model=dict(vocab=ids))))
    refused(tmp_path, "vocab_size=384 is less than the 50257 ids of gpt2")


def test_biases_that_the_config_denies_are_not_lost_silently(tmp_path):
    theirs = hf_gpt2(tmp_path)
    torch.nn.init.ones_(theirs.transformer.ln_f.bias)
    theirs.config.onecard = dict(bias=False)
    theirs.save_pretrained(tmp_path)
    refused(tmp_path, r"do not fit .*transformer\.ln_f\.bias")


def test_gpt2_by_name_comes_from_the_hub_cache_or_is_missed_in_one_line(gpt2, tmp_path):
    hub, script = tmp_path / "hub" / "models--gpt2", tmp_path / "script.py"
    shutil.copytree(gpt2[1], hub / "snapshots" / "0123")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123")
    script.write_text(f"""import runpy, sys
for name in ("gpt2", "gpt2-medium"):
    sys.argv = ["convert.py", name, "--to=onecard"]
    runpy.run_path({str(ROOT / "convert.py")!r}, run_name="__main__")
""")
    env = os.environ | dict(HF_HUB_CACHE=str(hub.parent), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    ours, _ = checkpoint.load_model(tmp_path / "out" / "gpt2" / "ckpt.pt")
    assert torch.equal(ours.transformer.wpe.weight, gpt2[0].transformer.wpe.weight)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("convert.py: gpt2-medium: transformers cannot load it")
    assert len(list(tmp_path.glob("out/*"))) == 1


def test_a_padded_row_costs_no_more_than_jensens_inequality_allows():
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(50, 16, generator=generator).double(), torch.randn(100, 16, generator=generator).double()
    targets = torch.randint(100, (50,), generator=generator)
    padded = pretrained.pad_rows(table, 107)
    before, after = (F.cross_entropy(x @ rows.t(), targets, reduction="none") for rows in (table, padded))
    rise = after - before
    assert torch.equal(padded[:100], table) and (rise > 0).all() and (rise <= math.log(1 + 7 / 100)).all()


# ---- nanoGPT, and files that are no checkpoint


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_that_nanogpt_wrote_is_read_as_it_is(prefix, tmp_path):
    model = tiny(bias=False, gelu="none", vocab_size=65, dropout=0.0)  # characters of Shakespeare
    args = {k: v for k, v in asdict(model.config).items() if k not in ("arch", "gelu")}
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    weights[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the mask that old ones have
    saved = dict(model=weights, optimizer={}, model_args=args, iter_num=5000, best_val_loss=torch.tensor(1.5))
    torch.save(saved | dict(config={"dataset": "shakespeare_char"}), tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "vocab_size=65 is less than", "shakespeare_char/meta.pkl")
    write_characters(tmp_path, "".join(map(chr, range(32, 32 + 65))))
    ours, about = pretrained.read(str(tmp_path / "ckpt.pt"))
    assert_same(model, ours)
    assert about["iter_num"] == 5000 and about["best_val_loss"] == 1.5
    assert from_state(about["tokenizer"]).decode([0, 64]) == chr(32) + chr(96)
    write_characters(tmp_path, "".join(map(chr, range(32, 32 + 66))))
    refused(tmp_path / "ckpt.pt", "vocab_size=65 is less than the 66 ids")


@pytest.mark.parametrize("converted", [False, True])
def test_ten_more_steps_of_a_nanogpt_run_are_those_of_its_own_adamw(converted, tmp_path, capsys):
    characters = [chr(32 + i) for i in range(96)]
    write_characters(tmp_path / "data" / "d", "".join(random.Random(0).choices(characters, k=4000)), characters)
    theirs = tiny(bias=False, gelu="none", vocab_size=96, dropout=0.0, block_size=16)
    groups = [[p for p in theirs.parameters() if (p.dim() >= 2) == decays] for decays in (True, False)]
    groups = [dict(params=groups[0], weight_decay=0.1), dict(params=groups[1], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))  # as nanoGPT's configure_optimizers
    windows = Windows(tmp_path / "data" / "d", "train", 16, seed=1)

    def step(first):
        rows = torch.from_numpy(windows.batch(first, 4).astype("int64"))
        theirs(rows[:, :-1], rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    for i in range(5):
        step(100 + 4 * i)
    args = {k: v for k, v in asdict(theirs.config).items() if k not in ("arch", "gelu")}
    saved = dict(model=theirs.state_dict(), optimizer=adamw.state_dict(), model_args=args, iter_num=5, config={})
    source = tmp_path / "nano" / "ckpt.pt"
    source.parent.mkdir()
    torch.save(saved | dict(best_val_loss=torch.tensor(4.0), config=dict(dataset="d")), source)
    if converted:
        convert.main([str(source), "--to=onecard", f"--out={tmp_path / 'ours'}"])
        source = tmp_path / "ours" / "ckpt.pt"
    keys = dict(init_from=source, dataset="d", data_dir=tmp_path / "data", out_dir=tmp_path / "out", seed=1)
    keys |= dict(block_size=16, batch_size=4, gradient_accumulation_steps=1, max_iters=10, decay_lr=False)
    keys |= dict(learning_rate=1e-2, eval_tokens=64, eval_interval=10, device="cpu", dtype="float32", compile=False)
    train.main([f"--{name}={value}" for name, value in keys.items()])
    assert "AdamW goes on" in capsys.readouterr().out
    for i in range(10):
        step(4 * i)
    ours = checkpoint.load(tmp_path / "out" / "ckpt.pt")["model"]
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_missing_cut_damaged_or_other_file_is_refused_by_name(tmp_path):
    data = (save(tiny(), tmp_path / "run") / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:100_000])
    (tmp_path / "end.pt").write_bytes(data[:-10])  # torch loads it all the same
    (tmp_path / "flipped.pt").write_bytes(data[:100_000] + bytes([data[100_000] ^ 1]) + data[100_001:])
    torch.save(dict(model={}, model_args=5), tmp_path / "no.pt")
    torch.save(dict(model={}, model_args=dict(n_experts=8)), tmp_path / "more.pt")
    torch.save(dict(model={}, model_args=TINY), tmp_path / "empty.pt")
    refused("nowhere", "nowhere: there is no such file")
    refused(tmp_path, "ckpt.pt: there is no such file")
    words = dict(cut="not a whole checkpoint", end="damaged", flipped="damaged", no="not a whole checkpoint")
    for name, why in (words | dict(more="the weights do not fit .*n_experts", empty="the weights do not fit")).items():
        refused(tmp_path / f"{name}.pt", f"{name}.pt: {why}")
    refused(ROOT / "README.md", "README.md: not a whole checkpoint")


# ---- train.py --init_from


@pytest.fixture
def finetune(tiny_data, tmp_path, capsys):
    """A function: arguments -> what train.py prints. Its out_dir is tmp_path / "run"."""
    keys = dict(data_dir=tiny_data[0], dataset=tiny_data[1], out_dir=tmp_path / "run", device="cpu", compile="false")
    keys |= dict(block_size=32, batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2)
    keys |= dict(eval_interval=50, eval_tokens=512)

    def run(*arguments):
        train.main([str(ROOT / "config" / "finetune.py"), *flags_of(**keys), *arguments])
        return capsys.readouterr().out

    return run


def test_finetuning_from_a_folder_lowers_the_loss_and_is_resumed_with_its_network(gpt2, finetune, tmp_path):
    (theirs, source), out_dir = gpt2, tmp_path / "run"
    with pytest.raises(ConfigError, match="have n_layer=2"):
        finetune(f"--init_from={source}", "--max_iters=50", "--n_layer=3")
    with pytest.raises(ConfigError, match="init_from='nowhere' is not a file or folder"):
        finetune("--init_from=nowhere")
    plan = finetune(f"--init_from={source}", "--plan_only=True")
    assert f"{(theirs.num_parameters() - 64 * 32) / 1e6:.2f}M parameters without positions" in plan
    finetune(f"--init_from={source}", "--max_iters=50")

    def rows(kind):
        records = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
        return [row for row in records if row["kind"] == kind]

    losses = {row["step"]: row["val_loss"] for row in rows("eval")}
    assert losses[0] == pytest.approx(math.log(GPT2_IDS), abs=0.5) and losses[50] < 0.7 * losses[0]
    ours, about = checkpoint.load_model(out_dir / "ckpt.pt")
    assert ours.config == GPTConfig(**TINY | dict(vocab_size=GPT2_IDS, bias=True, block_size=32))
    assert about["began_from"] == str(source) and theirs.config.n_positions == 64
    finetune("--init_from=resume", "--max_iters=52")
    assert checkpoint.load_model(out_dir / "ckpt.pt")[1]["iter_num"] == 52
    assert {row["config"]["init_from"] for row in rows("start")} == {str(source)}
    resumed, network = finetune("--init_from=resume", "--plan_only=True"), re.findall("^model .*", plan, re.M)
    assert network and re.findall("^model .*", resumed, re.M) == network
    assert f"not for those of {source}" in resumed  # the scaling law
