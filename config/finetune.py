"""Finetuning: trains existing weights further on other text.

    python prepare.py my_texts/ --dataset=my_texts --tokenizer=gpt2
    python train.py config/finetune.py --init_from=my_gpt2 --dataset=my_texts

init_from is gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded by transformers: pip install -e '.[hf]'), a folder in
Hugging Face format (GPT-2, or Qwen3 of our shape), a ckpt.pt of nanoGPT, or a run of onecard. The network is that of
the weights: leave out n_layer, n_head, n_embd, vocab_size, bias, gelu and arch. dropout and a smaller block_size may be
set. --init_from=resume continues a run that was stopped. To sample from the weights first:
    python convert.py my_gpt2 --to=onecard
"""

out_dir = "out/finetune"
dataset = "my_texts"
init_from = "gpt2"

block_size = 512  # half of GPT-2's 1024 positions: half the memory
dropout = 0.1  # a small text is read many times, and 124M parameters overfit to it

batch_size = 4
gradient_accumulation_steps = 16  # 32,768 tokens a step
max_iters = 300  # about 10M tokens

learning_rate = 3e-5  # at most a tenth of the rate in pretraining, so that the network keeps what it learned
decay_lr = False
weight_decay = 0.1

eval_interval = 50
eval_tokens = 2**18
always_save_checkpoint = False  # save only the best: later ones are overfitted
log_interval = 10
