"""Multiple-choice items: format, likelihoods as transformers computes them, accuracies."""

import json
import random

import numpy as np
import pytest
import torch
from networks import save, tiny
from runs import TINY, assert_same, flags_of, read_metrics, write_characters

import convert
import report
import sample
import train
from onecard import UserError, checkpoint, choices
from onecard.choices import Item, choose, read_items, rows_of
from onecard.tokenizer import from_state, load_tokenizer

EOT = 50256
ITEMS = [
    dict(prompt="The card has", choices=["twelve gigabytes of memory.", "a", "no name, and nobody asked"], answer=0),
    dict(prompt="def f(x):\n   ", choices=["return x", "zebra"], answer=1),
    dict(prompt="word " * 70, choices=["end", "word word word"], answer=1),  # longer than the context
    dict(prompt="One", choices=["two three", "2"], answer=0),
]
HELLASWAG = dict(activity_label="Removing ice", ctx_a="[header] How to go [title] Start  early.", ctx_b="the man")
HELLASWAG |= dict(endings=["walks away.", "scrapes [step] the ice."], label="1")


@pytest.fixture(scope="module")
def items_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@pytest.mark.parametrize("separator", [True, False])
def test_the_likelihoods_are_those_of_transformers_item_by_item(separator, items_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    convert.main([str(save(model, tmp_path / "run")), "--to=hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    expected = dict(choice=[], choice_norm=[])
    for item in ITEMS:
        prompt = "<|endoftext|>" * separator + item["prompt"].rstrip()
        likelihoods = []
        for choice in item["choices"]:  # by the recipe of lm-evaluation-harness: one text at a time, cut on the left
            whole = tokenizer(f"{'<|endoftext|>' * separator}{item['prompt']} {choice}")["input_ids"]
            n = len(whole) - len(tokenizer(prompt)["input_ids"])
            whole = torch.tensor([whole[-65:]])
            with torch.no_grad():
                logp = theirs(whole[:, :-1]).logits.double().log_softmax(-1)
            picked = logp[0].gather(1, whole[0, 1:, None])[-n:]
            likelihoods.append(picked.sum().item())
        expected["choice"].append(int(np.argmax(likelihoods)))
        lengths = [len(choice) for choice in item["choices"]]
        expected["choice_norm"].append(int(np.argmax(np.array(likelihoods) / lengths)))
    found = choose(model, load_tokenizer(), read_items(items_file), batch_size=3, separator=separator)
    assert {name: found[name] for name in expected} == expected
    answers = [item["answer"] for item in ITEMS]
    for name, chosen in (("acc", "choice"), ("acc_norm", "choice_norm")):
        right = np.equal(expected[chosen], answers)
        assert found[name] == right.mean()
        assert found[f"{name}_error"] == pytest.approx(right.std(ddof=1) / np.sqrt(len(right)))


def test_hellaswags_texts_are_cleaned_and_an_item_is_encoded_as_lm_evaluation_harness_does(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text(json.dumps(HELLASWAG) + "\n\n")
    prompt = "Removing ice: How to go. Start early. The man"
    assert read_items(path) == [Item(prompt, ["walks away.", "scrapes the ice."], 1)]
    tokenizer = load_tokenizer()
    ids, count = rows_of(Item("The card ", ["is here"], 0), tokenizer, separator=True)[0]
    assert ids[0] == EOT and tokenizer.decode(ids[1:]) == "The card  is here"
    assert tokenizer.decode(ids[-count:]) == "  is here"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "is empty"),
        ("{", "line 1"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "line 1.*answer"),
        ('\n{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2.*no choice 2"),
        ('{"prompt": "a\u2028", "choices": ["b", ""], "answer": 0}', "line 1.*empty"),
        ('{"prompt": " ", "choices": ["b", "c"], "answer": 0}', "line 1.*empty"),
        ("[1]", "line 1"),
    ],
)
def test_a_file_that_is_no_test_is_named_with_its_line(content, reason, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_items(path)


def test_sample_py_prints_both_accuracies_with_and_without_the_separator(items_file, tmp_path, capsys):
    run = save(tiny(), tmp_path / "run")
    sample.main([str(run), f"--choices={items_file}", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("4 items" in line and "+-" in line for line in lines)
    sample.main([str(run), f"--choices={items_file}", "--device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["acc"] == float(lines[0].split()[1]) and "acc_norm" in result["without_separator"]


def test_a_run_measures_its_items_at_evaluations_and_the_report_draws_them(tmp_path, capsys, monkeypatch):
    characters = [chr(32 + i) for i in range(95)]
    text = "".join(random.Random(0).choices(characters, k=2000))
    write_characters(tmp_path / "data" / "d", text, characters)
    items = [dict(prompt="a b", choices=["c", "dd"], answer=0), dict(prompt="x", choices=["y", "z"], answer=1)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    keys = TINY | dict(dataset="d", vocab_size=0, data_dir=tmp_path / "data", max_iters=4, eval_interval=2)
    train.main(flags_of(**keys, out_dir=tmp_path / "plain"))
    train.main(flags_of(**keys, out_dir=tmp_path / "run", choices_file=path))
    rows = read_metrics(tmp_path / "run", "eval")
    model, about = checkpoint.load_model(tmp_path / "run" / "ckpt.pt")
    found = choose(model, from_state(about["tokenizer"]), read_items(path))
    assert rows[-1]["choices_acc"] == found["acc"] and rows[-1]["choices_acc_norm_error"] == found["acc_norm_error"]
    assert len(rows) == 3 and ", choices " in capsys.readouterr().out
    assert_same(*(checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("plain", "run")))
    report.main([str(tmp_path / "run"), f"--out={tmp_path / 'page.html'}"])
    assert "accuracy by length" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="nowhere"):
        train.main(flags_of(**keys, out_dir=tmp_path / "none", choices_file="nowhere.jsonl"))
    monkeypatch.setattr(choices, "choose", lambda *_: 1 / 0)
    train.main(flags_of(**keys, out_dir=tmp_path / "broken", choices_file=path))
    assert "not measured" in capsys.readouterr().out
