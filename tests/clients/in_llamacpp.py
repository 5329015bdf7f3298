"""Log-probabilities by llama.cpp; runs in the environment `llamacpp`, as `python in_llamacpp.py JOB ANSWERS`: see clients.py.

Each model and adapter is converted first, as a user converts it: by the converters' own command lines. They run in forks of this
process, since importing PyTorch and transformers is most of their time.
"""

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import transformers.models.auto.tokenization_auto  # noqa: F401  once, for the forks
import xllamacpp
from answering import JOB, answer

TOOLS = Path(sys.prefix) / "llama.cpp"
sys.path.insert(0, str(TOOLS / "gguf-py"))


@contextlib.contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Have all that this process prints, C++ code included, in a file."""
    kept = os.dup(1), os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, earlier in enumerate(kept, start=1):
                os.dup2(earlier, descriptor)
                os.close(earlier)


def converted(command: list[str], log: Path) -> str | None:
    """Run a Python script with its arguments in a fork; return what it said last, or its first error, if it failed."""
    child = os.fork()
    if child == 0:
        code = 1
        with written_to(log):
            try:
                sys.argv = command
                sys.path.insert(0, str(Path(command[0]).parent))  # as `python` does
                runpy.run_path(command[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    if os.waitpid(child, 0)[1] == 0:
        return None
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:lora-to-gguf:") for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:])[0]


def server(model: Path, lora: Path | None) -> xllamacpp.Server:
    """Open a GGUF file, all in float32: the cache of keys and values, too, which is float16 otherwise."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # several wait for each other, spinning
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    log = files / "server.log"
    try:
        with written_to(log):
            return xllamacpp.Server(params)
    except RuntimeError:
        said = [line for line in log.read_text().splitlines() if " E " in line]
        raise RuntimeError(f"llama.cpp: {said[0].partition(': ')[2] if said else log.read_text()[-2000:]}") from None


def logprobs(opened: xllamacpp.Server, prompts: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of each token of each prompt but the first: the server tells those of the next token."""
    return [[of_next(opened, ids[:length], ids[length]) for length in range(1, len(ids))] for ids in prompts]


def of_next(opened: xllamacpp.Server, ids: list[int], token: int) -> float:
    # The answer has no log-probabilities where its own token prints nothing (an end, half a character): so that token is chosen
    # here. The log-probabilities are those before the choice.
    ask = {"prompt": ids, "n_predict": 1, "n_probs": JOB["vocabulary"], "logit_bias": {str(JOB["printable"]): 100.0}}
    answer = opened.handle_completions(ask)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return next(row["logprob"] for row in found if row["id"] == token)


def run(name: str, model: str, lora: str | None) -> list[list[float]]:
    """Convert, open, and ask.

    Raises:
        RuntimeError: a converter stopped; its words.
    """
    whole = files / f"{Path(model).parent.name}-{Path(model).name}.gguf"
    if not whole.exists():
        own = [str(Path(__file__).parent / "own_tokenizer.py"), str(TOOLS), "smollm", model]
        if words := converted([*own, "--outtype", "f32", "--outfile", str(whole)], whole.with_suffix(".log")):
            raise RuntimeError(f"convert_hf_to_gguf.py: {words}")
    adapter = files / f"{name}-lora.gguf"
    if lora is not None:
        command = [str(TOOLS / "convert_lora_to_gguf.py"), lora, "--base", model, "--outtype", "f32", "--outfile", str(adapter)]
        if words := converted(command, adapter.with_suffix(".log")):
            raise RuntimeError(f"convert_lora_to_gguf.py: {words}")
    return logprobs(server(whole, None if lora is None else adapter), JOB["prompts"])


files = Path(sys.argv[1]).parent / "gguf"
files.mkdir()
answer(run)
