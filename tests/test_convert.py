"""Weights that go out to other programs and come back. Those programs read what convert.py wrote: transformers,
safetensors, gguf, and llama.cpp where llama-cpp-python is installed (pip install llama-cpp-python builds it)."""

import functools
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, TINY, assert_same, save, text_ids, tiny

import convert
from configurator import ConfigError
from convert import ConvertError
from model import GPT2_IDS, GPTConfig
from onecard import checkpoint, pretrained
from onecard.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
EOT = 50256


@torch.no_grad()
def greedy(model, ids, n):
    """The n most likely ids, one after the other, after the list `ids`."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1, :GPT2_IDS].argmax().item())
    return ids[start:]


@pytest.fixture(scope="module", autouse=True)
def fast_exports():
    """Merges of the same vocabulary are computed once (1 s each), and gguf reads an array, not a slow memory map."""
    compute = functools.cache(lambda items, merges=convert.merges: merges(dict(items)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "merges", lambda ids: compute(tuple(ids.items())))
        patch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))
        yield


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """-> (a network, the folder of its run, in which convert.py made hf/)."""
    pytest.importorskip("transformers")
    model = tiny(**NETWORKS[request.param])
    run = save(model, tmp_path_factory.mktemp("run") / "run")
    convert.main([str(run), "--to=hf"])
    return model, run


# ---- Hugging Face


@torch.no_grad()
def test_transformers_has_our_logits_and_our_greedy_text(exported):
    transformers = pytest.importorskip("transformers")
    ours, run = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == GPT2_IDS
    idx = text_ids(64)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[..., :GPT2_IDS], atol=1e-4, rtol=0)
    text = theirs.generate(idx[:1, :8], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert text[0, 8:].tolist() == greedy(ours, idx[0, :8].tolist(), 20)


def test_a_folder_has_the_files_that_other_programs_ask_for_and_comes_back_bit_for_bit(exported, tmp_path):
    (ours, run), safetensors = exported, pytest.importorskip("safetensors")
    folder, c = run / "hf", ours.config
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names | {"README.md"}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == EOT
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    missing = 0 if c.bias or c.arch == "qwen3" else c.n_layer * (3 + 1 + 4 + 1 + 1 + 1) * c.n_embd + c.n_embd
    assert parameters == ours.num_params() - (c.vocab_size - GPT2_IDS) * c.n_embd + missing
    assert f"{parameters:,}" in (folder / "README.md").read_text()
    convert.main([str(folder), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, about = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert_same(ours, back)
    assert about["iter_num"] == 7


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
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported[1] / "hf"), load_tokenizer()
    assert len(theirs) == 50257 and theirs.eos_token_id == theirs.bos_token_id == EOT
    for text in hard_strings():
        ids = theirs(text, split_special_tokens=True, verbose=False)["input_ids"]
        assert ids == ours.encode(text).tolist(), repr(text)
        assert theirs.decode(ids) == text
    assert theirs("<|endoftext|>Hello world")["input_ids"] == [EOT, 15496, 995]  # as OpenAI published them


def test_the_card_reports_the_loss_with_its_error(tmp_path):
    rows = [dict(kind="eval", step=step, val_loss=loss, val_error=0.1291) for step, loss in ((0, 9.0), (7, 3.3))]
    path, data = tmp_path / "metrics.jsonl", dict(train_tokens=12345)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "ev')
    about = convert.last_evaluation(path, 7) | dict(iter_num=7, sequences=70, data=data)
    about["config"] = dict(dataset="fineweb", data_dir="/home/me/data")
    card = convert.model_card(GPTConfig(**TINY), about, "tiny", 1000)
    assert "3.3000 +- 0.1291" in card and "12,345" in card and "4,480 tokens in 7 steps" in card
    assert "fineweb" in card and "/home/me" not in card


# ---- nanoGPT


@pytest.mark.parametrize("bias, gelu", [(False, "none"), (True, "none"), (True, "tanh")])
def test_nanogpts_checkpoint_has_its_keys_and_comes_back_bit_for_bit(bias, gelu, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tiny(bias=bias, gelu=gelu)
    convert.main([str(save(ours, tmp_path / "run")), "--to=nanogpt"])
    path = tmp_path / "run" / "nanogpt" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    assert set(saved["model_args"]) == {*TINY, "vocab_size", "bias"}  # the fields of nanoGPT's GPTConfig
    names = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2)).state_dict()
    assert set(saved["model"]) == {name for name in names if bias or not name.endswith(".bias")}
    convert.main([str(path), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, _ = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert_same(ours, back)
    assert torch.equal(back.lm_head.weight, ours.lm_head.weight)  # the padded rows too


# ---- GGUF


@pytest.fixture(scope="module")
def gguf_file(exported):
    pytest.importorskip("gguf")
    convert.main([str(exported[1]), "--to=gguf"])
    return exported[1] / "run.gguf"


@pytest.mark.parametrize("exported", ["gpt2", "qwen3"], indirect=True)
def test_a_gguf_file_has_llama_cpps_keys_and_the_tensors_of_the_hugging_face_folder(exported, gguf_file):
    gguf, safetensors = pytest.importorskip("gguf"), pytest.importorskip("safetensors.torch")
    network, reader = exported[0].config.arch, gguf.GGUFReader(gguf_file)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_output.weight", "blk.1.ffn_up.weight"} < set(tensors)
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[network]
    table = gguf.get_tensor_name_map(arch, 2)  # by the names that transformers gives
    for name, weight in safetensors.load_file(exported[1] / "hf" / "model.safetensors").items():
        transposed = network == "gpt2" and ".c_" in name and weight.dim() == 2  # Conv1D has (in, out)
        there = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert torch.equal(tensors.pop(there), weight.t() if transposed else weight), name
    assert not tensors
    keys = {name: field.contents() for name, field in reader.fields.items()}
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 2}
    sizes |= {"attention.head_count": 2, "feed_forward_length": 128}
    if network == "gpt2":
        sizes |= {"attention.layer_norm_epsilon": pytest.approx(1e-5)}
    else:
        sizes |= {"attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "rope.freq_base": 10_000.0}
        sizes |= {"attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16}
    expected = {f"{network}.{name}": size for name, size in sizes.items()}
    expected |= {"general.architecture": network, "general.name": "run"}
    expected |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    expected |= {"tokenizer.ggml.bos_token_id": EOT, "tokenizer.ggml.eos_token_id": EOT}
    assert {name: keys[name] for name in expected} == expected
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    assert len(tokens) == 50257 and tokens[15496] == "Hello" and tokens[995] == "Ġworld"
    first = ["Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s"]  # of OpenAI's vocab.bpe
    assert len(merges) == 50_000 and merges[:9] == first
    assert keys["tokenizer.ggml.token_type"][EOT] == gguf.TokenType.CONTROL


@pytest.mark.parametrize("exported", ["gpt2", "qwen3"], indirect=True)
def test_llama_cpp_has_our_ids_and_the_same_greedy_text(exported, gguf_file):
    """llama.cpp takes GELU from a float16 table. In our own network too, that rounding moves the logits of this random
    GPT-2 by 1.7e-3; the most likely token stays."""
    llama_cpp, ours, tokenizer = pytest.importorskip("llama_cpp"), exported[0], load_tokenizer()
    options = dict(n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    options |= dict(type_k=0, type_v=0, flash_attn=False)  # keys and values in float32
    llama = llama_cpp.Llama(str(gguf_file), **options)
    for prompt in ("The", "A card with", "In 1969", " x", "def f(", "日本", "\n\n", "Once upon a time", "a<b", "don't"):
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


# ---- the commands in README.md and docs/


def test_each_convert_command_of_the_pages_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    for package in ("transformers", "gguf"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    save(tiny(), Path("out/run"))
    commands = {line.split("#")[0].strip() for line in re.findall(r"python convert\.py ([^`\n]+)", PAGES)}
    commands = {command for command in commands if command.split()[0] not in pretrained.HUB_NAMES}  # need a network
    for command in sorted(commands, key=lambda command: "--to=onecard" in command):  # these read what the others wrote
        command = command.replace("path/to/ckpt.pt", "out/run/nanogpt/ckpt.pt").replace("FOLDER", "out/run/hf")
        convert.main(command.split())
    made = re.findall("^(.+) is written$", capsys.readouterr().out, re.M)
    assert len(made) == len(commands) and all(Path(path).exists() for path in made)
    assert {"out/run/hf", "out/run/run.gguf", "out/run/nanogpt", "out/hf"} <= set(made)


# ---- what is refused, and what stays behind


def refused(run, to, reason):
    """convert.py stops with this reason and leaves nothing behind."""
    with pytest.raises(ConvertError, match=reason):
        convert.main([str(run), f"--to={to}"])
    assert [path.name for path in run.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize(
    "network, to, reason",
    [
        (dict(gelu="none"), "gguf", "llama.cpp computes GPT-2 with the tanh form alone"),
        (dict(arch="qwen3", bias=False), "nanogpt", "nanoGPT has only GPT-2's network"),
        (dict(vocab_size=65), "hf", "vocab_size=65 is fewer than the 50257 ids"),
    ],
)
def test_what_the_other_program_cannot_compute_is_refused_with_the_reason(network, to, reason, tmp_path):
    pytest.importorskip("gguf")
    refused(save(tiny(**network), tmp_path / "run"), to, reason)


def test_logits_that_differ_fail_the_export(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(pretrained, "LAYER_NORM_EPS", 1e-2)  # a mistake in config.json, as one could make it
    refused(save(tiny(), tmp_path / "run"), "hf", "logits differ by")


@pytest.mark.parametrize("package, extra", [("transformers", "hf"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(save(tiny(), tmp_path / "run"), extra, rf"pip install -e '\.\[{extra}\]'")


def test_a_call_without_a_source_is_refused_and_nothing_is_written_over(tmp_path):
    run, there = save(tiny(), tmp_path / "run"), tmp_path / "there"
    with pytest.raises(ConfigError, match=r"give one source: python convert.py out/run --to=hf"):
        convert.main([])
    there.mkdir()
    with pytest.raises(ConvertError, match="there is there already"):
        convert.main([str(run), "--to=nanogpt", f"--out={there}"])
    assert not list(there.iterdir())


@pytest.mark.parametrize("to, package", [("hf", "transformers"), ("gguf", "gguf"), ("nanogpt", ""), ("onecard", "")])
def test_a_full_disk_leaves_nothing_behind(to, package, small_disk, tmp_path):
    if package:
        pytest.importorskip(package)
    run, disk = save(tiny(), tmp_path / "run"), small_disk("3m")
    with pytest.raises((ConvertError, checkpoint.CheckpointError), match="could not be written"):
        convert.main([str(run), f"--to={to}", f"--out={disk / 'new'}"])
    assert not list(disk.iterdir())
