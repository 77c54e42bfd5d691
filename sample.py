"""Writes text with a trained model.

    python sample.py --out_dir=out/quickstart
    python sample.py --out_dir=out/fineweb_4070 --start="The card" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out/fineweb_4070 --start=FILE:prompt.txt

Every text begins as a document of the training data does, with <|endoftext|>, and ends where the model ends it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from configurator import ConfigError, key, load_config, run_script
from runtime import DeviceError, pick_device, pick_dtype
from tokenizer import TokenizerError, load_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = key("out", "folder that train.py wrote")
    checkpoint: str = key("latest", "which of its checkpoints", choices=("latest", "best"))
    start: str = key("", "beginning of the text; FILE:name reads it from a file; empty: the model begins")
    num_samples: int = key(3, "how many texts", low=1)
    max_new_tokens: int = key(200, "longest text, in tokens", low=1)
    temperature: float = key(0.8, "below 1 bolder towards the likely, above 1 wilder; 0: always the likeliest", low=0.0)
    top_k: int = key(200, "draw among so many likeliest tokens only; 0: among all", low=0)
    seed: int = key(1337, "text i is drawn with seed + i", low=0)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "of the matrix products", choices=("auto", "float32", "bfloat16", "float16"))


def read_start(start):
    """The prompt as text: as given, or from the file that FILE: names."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"start={start}: {path} cannot be read ({error.strerror}); give the path of a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"start={start}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def main(argv=None):
    config = load_config(SampleConfig, argv)
    tokenizer = load_tokenizer()
    prompt = [tokenizer.eot, *tokenizer.encode(read_start(config.start)).tolist()]
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    name = checkpoint.LATEST if config.checkpoint == "latest" else checkpoint.BEST
    model, saved = checkpoint.load_model(Path(config.out_dir) / name)
    model.to(device)
    print(f"step {saved['iter_num']:,}, best val loss {saved['best_val_loss']:.4f}", file=sys.stderr)
    idx = torch.tensor([prompt], device=device)
    for i in range(config.num_samples):
        generator = torch.Generator(device).manual_seed(config.seed + i)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = model.generate(
                idx,
                config.max_new_tokens,
                config.temperature,
                config.top_k,
                stop_id=tokenizer.eot,
                generator=generator,
            )
        ids = [t for t in ids[0].tolist() if t != tokenizer.eot]
        print(tokenizer.decode(ids) + "\n---------------", flush=True)


if __name__ == "__main__":
    run_script(main, DeviceError, TokenizerError, checkpoint.CheckpointError)
