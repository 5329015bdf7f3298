"""Log-probabilities by vLLM; runs in the environment `vllm`, as `python in_vllm.py JOB ANSWERS`: see clients.py."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its own words arrive here
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}

from answering import JOB, answer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def logprobs(_: str, model: str, lora: str | None, **options: int) -> list[list[float]]:
    """Return the log-probability of each token of each prompt but the first."""
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        enable_lora=lora is not None,
        **options,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    request = None if lora is None else LoRARequest("adapter", 1, lora)
    found = []
    for ids in JOB["prompts"]:  # one by one: vLLM 0.32 stops at the prompt's log-probabilities of several with a LoRA on a Llama
        [answer] = llm.generate([{"prompt_token_ids": ids}], asked, lora_request=request, use_tqdm=False)
        found.append([place[token].logprob for token, place in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)])
    return found


answer(logprobs)
