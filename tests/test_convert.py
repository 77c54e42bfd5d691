"""Weights that go out to other programs and come back. Those programs read what convert.py wrote: transformers,
safetensors, gguf, and llama.cpp where llama-cpp-python is installed (pip install llama-cpp-python builds it)."""

import functools
import json
import math
import pickle
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from networks import NETWORKS, TINY, assert_same, save, text_ids, tiny

import convert
from configurator import ConfigError
from model import GPT2_IDS
from onecard import UserError, checkpoint, modelcard, pretrained, vocabulary
from onecard.checkpoint import check_tokenizer
from onecard.tokenizer import PATTERN, CharTokenizer, JsonTokenizer, from_state, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
EOT = 50256


@torch.no_grad()
def greedy(model, ids, n, n_ids=GPT2_IDS):
    """The n most likely ids, one after the other, after the list `ids`."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1, :n_ids].argmax().item())
    return ids[start:]


@pytest.fixture(scope="module", autouse=True)
def fast_exports():
    """Merges of the same vocabulary are computed once (1 s each), and gguf reads an array, not a slow memory map."""
    compute = functools.cache(lambda items, merges=vocabulary.merges: merges(dict(items)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "merges", lambda ids: compute(tuple(ids.items())))
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


@functools.cache
def tokenizer_of(kind):
    """gpt2, gpt2-1024, bytes; the characters of PAGES; a BPE of 400 ids of PAGES, also one that splits off digits."""
    if kind == "chars":
        return CharTokenizer(sorted(set(PAGES)), "pages")
    if kind not in ("bpe", "digits"):
        return load_tokenizer(kind)
    pytest.importorskip("tokenizers")
    content = json.loads(train_tokenizer([PAGES], 400))
    if kind == "digits":
        digits = dict(type="Digits", individual_digits=True)
        content["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[digits, content["pre_tokenizer"]])
    return JsonTokenizer(json.dumps(content), "pages", 399)


def run_with(tokenizer, folder, **network):
    """-> (a network of this vocabulary, padded to a multiple of 64 rows, the folder of its run)."""
    model = tiny(**dict(bias=False) | network, vocab_size=64 * math.ceil(tokenizer.n_vocab / 64))
    return model, save(model, folder, tokenizer=tokenizer.state(), config=dict(dataset="pages"))


# ---- Hugging Face


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


def bytes_to_unicode():
    """GPT-2's alphabet as OpenAI's encoder.py defines it: {letter: byte}."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def hard_strings():
    """Text that tokenizers trip over, and random characters of all of Unicode."""
    rng = random.Random(0)
    kinds = [(32, 127), (0, 160), (0x2000, 0x2070), (0x300, 0x700), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD800)]
    texts = ["".join(chr(rng.randrange(*kinds[i % 7])) for _ in range(200)) for i in range(70)]
    spaces = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u3000"
    texts += ["".join(rng.choice(spaces + "ab'!1") for _ in range(200)) for _ in range(30)]
    texts += ["", " ", "it's we'LL 'tis", "a<|endoftext|>b", "  x  ", "x" * 3000, " " * 3000 + "y", "1234567 ½ Ⅳ ٣"]
    return texts


def assert_same_ids(folder, ours):
    """-> transformers' tokenizer of a folder, whose ids are those of `ours`."""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == theirs.bos_token_id == ours.eot
    for text in (*hard_strings(), PAGES):
        text = "".join(character for character in text if ours.kind != "chars" or character in PAGES)
        ids = theirs(text, split_special_tokens=True, verbose=False)["input_ids"]
        assert ids == ours.encode(text).tolist(), repr(text)
        assert theirs.decode(ids) == text
    return theirs


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
def test_the_exported_tokenizer_gives_tiktokens_ids_and_its_text_back(exported):
    theirs = assert_same_ids(exported[1] / "hf", load_tokenizer())
    assert theirs("<|endoftext|>Hello world")["input_ids"] == [EOT, 15496, 995]  # as OpenAI published them


KINDS = [("gpt2", "bytes"), ("qwen3", "gpt2-1024"), ("qwen3", "bpe"), ("gpt2", "chars"), ("qwen3", "chars")]


@pytest.mark.parametrize("arch, kind", KINDS)
@torch.no_grad()
def test_every_tokenizer_goes_to_transformers_and_back_with_its_ids(arch, kind, tmp_path):
    transformers, ours = pytest.importorskip("transformers"), tokenizer_of(kind)
    model, run = run_with(ours, tmp_path / "run", arch=arch)
    convert.main([str(run), "--to=hf"])
    theirs = assert_same_ids(run / "hf", ours)
    if kind == "chars":
        assert "<|endoftext|>" not in (run / "hf" / "README.md").read_text()
        assert json.loads((run / "hf" / "generation_config.json").read_text())["eos_token_id"] is None
        with pytest.raises(Exception, match="UNK"):
            theirs("\u2603")
    prompt = ours.encode("The card").tolist()
    copy = transformers.AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    assert copy.config.vocab_size == copy.get_input_embeddings().num_embeddings == ours.n_vocab
    text = copy.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert text[0, len(prompt) :].tolist() == greedy(model, prompt, 20, ours.n_vocab)
    convert.main([str(run / "hf"), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, about = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert back.config == replace(model.config, vocab_size=ours.n_vocab)  # a mean of few rows would be a likely token
    for name, weight in model.state_dict().items():
        rows = ours.n_vocab if name in ("transformer.wte.weight", "lm_head.weight") else None
        assert torch.equal(back.state_dict()[name], weight[:rows]), name
    assert about["tokenizer"] == ours.state() | dict(name=about["tokenizer"]["name"])
    if kind == "bpe":  # transformers writes the file in its own form, and adds a post-processor
        theirs.save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again.sha256 != ours.sha256
        check_tokenizer(SimpleNamespace(dataset="pages"), ours, again, "run/hf")


def test_the_card_reports_the_run_without_its_paths(tmp_path):
    evals = [dict(kind="eval", step=step, train_loss=9.0, val_loss=9 - step, val_error=0.1291) for step in range(30)]
    rows = [dict(kind="start", step=0, expected_loss=3.21), *evals]
    about = dict(iter_num=29, sequences=70, data=dict(train_tokens=12345))
    about["config"] = dict(dataset="fineweb", data_dir="/home/me/data")
    model, tokenizer = tiny(), load_tokenizer("bytes")
    export = convert.Export(model=model, tokenizer=tokenizer, about=about, rows=rows, name="tiny", dtype="float16")
    card = modelcard.model_card(export, 1000)
    assert "-20.0000 +- 0.1291" in card and "12,345" in card and "4,480 tokens in 29 steps" in card and "3.21" in card
    assert "bytes, 257 ids" in card and "'<|endoftext|>The'" in card and "1,000, float16" in card
    curve = re.findall(r"^\| (\d+) \| 9.0000 \|", card, re.MULTILINE)
    assert curve[-1] == "29" and 10 <= len(curve) <= 12
    assert "fineweb" in card and "/home/me" not in card


@pytest.mark.parametrize("network, dtype", [("gpt2", "bfloat16"), ("qwen3", "float16"), ("qwen3", "bfloat16")])
def test_a_smaller_dtype_gives_transformers_our_rounded_weights_and_our_logits_in_that_dtype(network, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = save(tiny(**NETWORKS[network]), tmp_path / "run")
    convert.main([str(run), "--to=hf", f"--dtype={dtype}"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "hf")
    ours, _ = checkpoint.load_model(run / "ckpt.pt")
    ours.to(getattr(torch, dtype))
    assert theirs.dtype == ours.lm_head.weight.dtype
    for name, weight in pretrained.from_hf(theirs.state_dict(), vars(ours.config)).items():
        assert torch.equal(weight[:GPT2_IDS], ours.state_dict()[name][:GPT2_IDS]), name
    idx = torch.tensor([[EOT, *load_tokenizer().encode("The card").tolist()]])
    with torch.no_grad():
        a, b = ours(idx)[..., :GPT2_IDS].float(), theirs(idx).logits.float()
    assert (a - b).abs().max() < 4 * torch.finfo(theirs.dtype).eps * a.abs().max()


def test_transformers_pipeline_takes_several_prompts_at_once(exported):
    transformers, (_, run) = pytest.importorskip("transformers"), exported
    pipe = transformers.pipeline("text-generation", model=str(run / "hf"), batch_size=2)
    prompts, options = ["The", "A card with more memory"], dict(max_new_tokens=5, do_sample=False)
    together = [texts[0]["generated_text"] for texts in pipe(prompts, **options)]
    assert together == [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]


@pytest.mark.parametrize("value, dtype, remedy", [(math.nan, "float32", "earlier"), (1e6, "float16", "bfloat16")])
def test_a_context_of_one_token_is_exported_and_weights_that_give_no_text_are_refused(value, dtype, remedy, tmp_path):
    pytest.importorskip("transformers")
    model = tiny(block_size=1)
    convert.main([str(save(model, tmp_path / "good")), "--to=hf"])
    model.lm_head.weight.data[3, 3] = value
    run = save(model, tmp_path / "run")
    with pytest.raises(UserError, match=f"not finite.*{remedy}"):
        convert.main([str(run), "--to=hf", f"--dtype={dtype}"])
    assert not (run / "hf").exists()


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


def test_characters_go_to_nanogpt_with_the_meta_pkl_that_its_sample_py_reads(tmp_path, capsys):
    ours = tokenizer_of("chars")
    model, run = run_with(ours, tmp_path / "run")
    convert.main([str(run), "--to=nanogpt", f"--out={tmp_path / 'nanoGPT' / 'out'}"])
    assert "data/pages/meta.pkl" in capsys.readouterr().out
    folder = tmp_path / "nanoGPT" / "out"
    meta, saved = pickle.loads((folder / "meta.pkl").read_bytes()), torch.load(folder / "ckpt.pt", weights_only=True)
    assert saved["config"]["dataset"] == "pages"  # sample.py opens data/{dataset}/meta.pkl
    assert saved["model_args"]["vocab_size"] == meta["vocab_size"] == len(set(PAGES))  # it samples from every row
    assert [meta["stoi"][c] for c in "The card"] == ours.encode("The card").tolist()
    assert "".join(meta["itos"][i] for i in range(ours.n_vocab)) == "".join(sorted(set(PAGES)))
    (folder.parent / "data" / "pages").mkdir(parents=True)
    (folder / "meta.pkl").rename(folder.parent / "data" / "pages" / "meta.pkl")  # where the message sends it
    convert.main([str(folder / "ckpt.pt"), "--to=onecard", f"--out={tmp_path / 'back'}"])
    back, about = checkpoint.load_model(tmp_path / "back" / "ckpt.pt")
    assert from_state(about["tokenizer"]).sha256 == ours.sha256
    assert torch.equal(back.lm_head.weight, model.lm_head.weight[: ours.n_vocab])


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


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_vocabulary_of_a_gguf_file_gives_our_ids_in_tiktoken(kind, tmp_path):
    """tiktoken needs no merges: their order is that of the tokens. So they are compared with those of the tokenizer."""
    gguf, ours = pytest.importorskip("gguf"), tokenizer_of(kind)
    _, run = run_with(ours, tmp_path / "run", arch="qwen3")
    (run / "run.Modelfile").touch()
    with pytest.raises(UserError, match="there already"):
        convert.main([str(run), "--to=gguf"])
    (run / "run.Modelfile").unlink()
    convert.main([str(run), "--to=gguf"])
    keys = {name: field.contents() for name, field in gguf.GGUFReader(run / "run.gguf").fields.items()}
    tokens, alphabet = keys["tokenizer.ggml.tokens"], bytes_to_unicode()
    assert len(tokens) == ours.n_vocab and tokens[ours.eot] == "<|endoftext|>"
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == ours.eot
    assert keys["tokenizer.ggml.token_type"] == [gguf.TokenType.NORMAL] * ours.eot + [gguf.TokenType.CONTROL]
    ranks = {bytes(alphabet[letter] for letter in token): i for i, token in enumerate(tokens[: ours.eot])}
    theirs = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in hard_strings():
        assert theirs.encode_ordinary(text) == ours.encode(text).tolist(), repr(text)
    merges = [pair.split() for pair in keys["tokenizer.ggml.merges"]]
    if kind == "bpe":
        assert merges == json.loads(ours.content)["model"]["merges"] and len(merges) == 400 - 257
    else:
        assert not {part for pair in merges for part in pair} & set(tokens[:256])  # one that joins no two bytes


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
    """convert.py stops for this reason and leaves nothing behind."""
    with pytest.raises(UserError, match=reason):
        convert.main([str(run), f"--to={to}"])
    assert [path.name for path in run.iterdir()] == ["ckpt.pt"]


BYTE_LEVEL = "only byte-level BPE with GPT-2's splitting of text can be written, and the tokenizer pages"
NANOGPTS = "sample.py has GPT-2's tokenizer or characters, and this tokenizer is "


@pytest.mark.parametrize(
    "kind, network, to, reason",
    [
        ("gpt2", dict(gelu="none"), "gguf", "llama.cpp computes GPT-2 with the tanh form alone"),
        ("gpt2", dict(arch="qwen3"), "nanogpt", "nanoGPT has only GPT-2's network"),
        ("chars", {}, "gguf", BYTE_LEVEL),
        ("digits", {}, "gguf", BYTE_LEVEL),
        ("bytes", {}, "nanogpt", f"{NANOGPTS}bytes"),
        ("bpe", {}, "nanogpt", f"{NANOGPTS}pages"),
    ],
)
def test_what_the_other_program_does_not_have_is_refused_with_the_reason(kind, network, to, reason, tmp_path):
    pytest.importorskip("gguf")
    refused(run_with(tokenizer_of(kind), tmp_path / "run", **network)[1], to, reason)


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
    with pytest.raises(UserError, match="there is there already"):
        convert.main([str(run), "--to=nanogpt", f"--out={there}"])
    assert not list(there.iterdir())


@pytest.mark.parametrize("to, package", [("hf", "transformers"), ("gguf", "gguf"), ("nanogpt", ""), ("onecard", "")])
def test_a_full_disk_leaves_nothing_behind(to, package, small_disk, tmp_path):
    if package:
        pytest.importorskip(package)
    run, disk = save(tiny(), tmp_path / "run"), small_disk("3m")
    with pytest.raises(UserError, match="could not be written"):
        convert.main([str(run), f"--to={to}", f"--out={disk / 'new'}"])
    assert not list(disk.iterdir())
