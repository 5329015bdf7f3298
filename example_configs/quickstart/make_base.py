"""Train the quickstart's small base language model (and its tokenizer) from scratch on a CPU.

The text comes from ``make_data.pretraining_documents``: docstrings and comments of the Python
standard library, NumPy and PyTorch.  Qiskit's text is left out on purpose: it is what the
quickstart fine-tunes on, so the base must not have seen it.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_data import pretraining_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SEQUENCE = 256


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, so no ``<unk>`` is needed."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join ``<s> document </s>`` sequences and cut the stream into rows of equal length."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        stream += [*encoding.ids, tokenizer.eos_token_id]
    rows = len(stream) // SEQUENCE
    return torch.tensor(stream[: rows * SEQUENCE]).view(rows, SEQUENCE)


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """Build the randomly initialised model: Llama's layout with grouped-query attention, heads of 32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss of ``rows``."""
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state
    # Dropping the last position before the head saves a copy of the (large) logits.
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1))
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: torch.Tensor, batch: int) -> float:
    """Return the mean loss over all of ``rows``."""
    model.eval()
    losses = [float(loss_of(model, part)) * len(part) for part in rows.split(batch)]
    model.train()
    return sum(losses) / len(rows)


def batches(rows: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield shuffled batches for ever; every row is seen once before any is seen again."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for part in order.split(batch):
            if len(part) == batch:
                yield rows[part]


def train(model: LlamaForCausalLM, rows: torch.Tensor, args: argparse.Namespace) -> float:
    """Train ``model`` and return the loss averaged over about the last hundred steps."""
    # Weight decay on norms would only pull their gains away from one.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    warmup = max(1, min(100, args.steps // 10))

    def schedule(step: int) -> float:
        """Warm up linearly, then follow a cosine down to two per cent."""
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, args.steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    source = batches(rows, args.batch, torch.Generator().manual_seed(args.seed))
    average = 0.0
    progress = tqdm(range(args.steps), desc="base model", unit="step", mininterval=2)
    for step in progress:
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        weight = max(0.01, 1 / (step + 1))
        average += weight * (loss.item() - average)
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
    return average


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return ``prompt`` and a sampled continuation."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main() -> None:
    """Train the tokenizer and the model, save both, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "base", help="folder to save to")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps (default 2200)")
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens per step (8)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (4e-3)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokenizer size (2048)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 64 (128)")
    parser.add_argument("--layers", type=int, default=4, help="transformer layers (4)")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random (42)")
    args = parser.parse_args()
    if args.hidden <= 0 or args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: no multiple of 64. What works: 128, 192, 256, 384, 512, ...")
    torch.manual_seed(args.seed)

    documents = pretraining_documents()
    random.Random(args.seed).shuffle(documents)
    held_out = len(documents) // 50
    tokenizer = train_tokenizer(documents[held_out:], args.vocabulary)
    validation = pack(documents[:held_out], tokenizer)
    rows = pack(documents[held_out:], tokenizer)
    model = build_model(tokenizer, args.hidden, args.layers)
    print(
        f"{len(documents)} texts, {sum(map(len, documents)) / 1e6:.1f} MB, "
        f"{rows.numel() / 1e6:.2f} M training tokens, {model.num_parameters()} parameters"
    )

    start = time.perf_counter()
    train_loss = train(model, rows, args)
    seconds = time.perf_counter() - start
    speed = args.steps * args.batch * SEQUENCE / seconds
    print(f"trained for {seconds:.0f} s at {speed:.0f} tokens/s")
    print(f"train loss {train_loss:.3f}")
    print(f"validation loss {validation_loss(model, validation, args.batch):.3f}")

    model.eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"saved to {args.out}: {size / 2**20:.2f} MiB")
    for prompt in ("Return the", "This function is used to"):
        print("---\n" + complete(model, tokenizer, prompt))


if __name__ == "__main__":
    main()
