"""Log-probabilities by PEFT; runs in the environment `peft`, as `python in_peft.py JOB ANSWERS`: see clients.py."""

import sys

sys.modules["axolotl_qtha"] = None  # its import fails, as where it is not installed, in whatever environment this runs

import torch  # noqa: E402
from answering import JOB, answer  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def logprobs(_: str, model: str, lora: str | None, merge: bool = False) -> list[list[float]]:
    """Return the log-probability of each token of each prompt but the first."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if lora is not None:
        loaded = PeftModel.from_pretrained(loaded, lora)
        if merge:
            loaded = loaded.merge_and_unload()
    loaded.eval()
    found = []
    with torch.no_grad():
        for ids in JOB["prompts"]:
            given = torch.tensor([ids])
            of_all = loaded(given).logits.log_softmax(-1)[0, :-1]
            found.append(of_all.gather(-1, given[0, 1:, None])[:, 0].tolist())
    return found


answer(logprobs)
assert not any(name.startswith("axolotl_qtha.") for name in sys.modules)
