"""What stands beside exported weights for a person: the model card of a Hugging Face folder, Ollama's Modelfile.

    text = model_card(export, parameters=124_475_904)    # export: convert.py's Export

The card holds no path of the machine that trained the network.
"""

import json
import math
from pathlib import Path
from typing import Any

from onecard import logs

CURVE_ROWS = 12  # of the table with the run's evaluations
SAMPLING = dict(do_sample=True, temperature=0.8, top_k=200)  # sample.py's defaults
PRIVATE = ("out_dir", "data_dir", "init_from", "resume_from", "choices_file", "write_config")  # keys with paths
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{table}

## Use

{use}

```python
from transformers import pipeline

generate = pipeline("text-generation", "FOLDER")
print(generate({prompt!r}, add_special_tokens=False, max_new_tokens=100)[0]["generated_text"])
```

vLLM: `vllm serve FOLDER`. llama.cpp and Ollama read a GGUF file: `python convert.py RUN --to=gguf` in onecard, then
`llama-completion -m {name}.gguf -no-cnv -p "The"`, or `ollama create {name} -f {name}.Modelfile`, `ollama run {name}`.

{curve}## Settings of the training run

```json
{config}
```
"""
CHARACTERS = "The tokens are characters. Others are an error, and there is no token that separates documents."
SEPARATOR = "Every training document began with `{eot}`, so begin each prompt with it."
MODELFILE = """FROM ./{file}
TEMPLATE {{{{ .Prompt }}}}
PARAMETER temperature {temperature}
PARAMETER top_k {top_k}
PARAMETER top_p 1
PARAMETER repeat_penalty 1
PARAMETER num_ctx {block_size}
"""


def model_card(export: Any, parameters: int) -> str:
    """The folder's README.md: network, data, loss expected and reached, use, curve, settings.

    export: model, tokenizer, about (its checkpoint without the weights), rows (of its metrics.jsonl), name, dtype.
    """
    c, tokenizer, about, rows = export.model.config, export.tokenizer, export.about, export.rows
    config, evals = about.get("config", {}), [row for row in rows if row["kind"] == "eval"]
    table = {
        "network": f"{c.arch}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}",
        "parameters": f"{parameters:,}, {export.dtype}",
        "tokenizer": f"{tokenizer.name}, {tokenizer.n_vocab:,} ids",
    }
    if about.get("data"):
        table["data"] = f"{config.get('dataset')}, {about['data']['train_tokens']:,} training tokens"
        table["trained on"] = f"{about['sequences'] * c.block_size:,} tokens in {about['iter_num']:,} steps"
    if last := next((row for row in reversed(evals) if row["step"] == about.get("iter_num")), None):
        table["val loss"] = describe_loss(last)
    elif math.isfinite(about.get("best_val_loss", math.inf)):
        table["best val loss"] = f"{about['best_val_loss']:.4f} nats per token"
    if expected := next((row["expected_loss"] for row in reversed(rows) if row.get("expected_loss")), None):
        table["val loss expected by the scaling law"] = f"{expected:.2f}"
    if about.get("began_from"):
        table["finetuned from"] = Path(about["began_from"]).name
    eot = "" if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    return CARD.format(
        name=export.name,
        table=markdown(("", ""), list(table.items())),
        use=SEPARATOR.format(eot=eot) if eot else CHARACTERS,
        prompt=f"{eot}The",
        curve=curve(evals),
        config=json.dumps({k: v for k, v in config.items() if k not in PRIVATE}, indent=1),
    )


def describe_loss(row: dict) -> str:
    error = f" +- {row['val_error']:.4f} (standard error)" if "val_error" in row else ""
    bits = f", {row['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in row else ""
    return f"{row['val_loss']:.4f}{error} nats per token{bits}"


def curve(evals: list[dict]) -> str:
    """The run's curve as a table: at most CURVE_ROWS evaluations, evenly spaced, with the last one."""
    if len(evals) < 2:
        return ""
    apart = math.ceil((len(evals) - 1) / (CURVE_ROWS - 1))
    chosen = evals[::-1][::apart][::-1]
    rows = [(f"{row['step']:,}", f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}") for row in chosen]
    return f"## Loss during training\n\n{markdown(('step', 'train loss', 'val loss'), rows)}\n\n"


def markdown(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def modelfile(file: str, block_size: int) -> str:
    """Ollama's description of a GGUF file that continues a prompt as it stands."""
    return MODELFILE.format(file=file, block_size=block_size, **SAMPLING)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; [] if there is none."""
    return list(logs.read_metrics(path.read_text(encoding="utf-8", errors="replace"), [])) if path.exists() else []
