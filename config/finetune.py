"""Finetuning: trained weights, a little further, on other text.

    python convert.py my_gpt2 --to=onecard              (only to look at it with sample.py; not needed for training)
    python train.py config/finetune.py --init_from=my_gpt2 --dataset=my_texts

init_from is gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded by transformers: pip install -e '.[hf]'), a folder in
Hugging Face format (GPT-2, or Qwen3 in our shape), a ckpt.pt of nanoGPT's, or a run of ours. The network is that of the
weights; dropout and a smaller block_size are chosen here. --init_from=resume goes on with a run that was stopped.
"""

out_dir = "out/finetune"
dataset = "my_texts"
init_from = "gpt2"

block_size = 512  # the 1024 positions of GPT-2 are cut: half the memory
dropout = 0.1  # a small text is read many times, and 124M parameters learn it by heart

batch_size = 4
gradient_accumulation_steps = 16  # 32,768 tokens a step
max_iters = 300  # about 10M tokens

learning_rate = 3e-5  # a tenth of what it was trained with, and less: what it knows is to stay
decay_lr = False
weight_decay = 0.1

eval_interval = 50
eval_tokens = 2**18
always_save_checkpoint = False  # only the best is kept, for then it learns by heart
log_interval = 10
