"""Log-probabilities by PEFT; runs in the environment `peft`, as `python in_peft.py JOB ANSWERS`: see clients.py."""

import json
import sys
from pathlib import Path

sys.modules["axolotl_qtha"] = None  # its import fails, as where it is not installed, in whatever environment this runs

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def logprobs(model: str, lora: str | None, prompts: list[list[int]], merge: bool = False) -> list[list[float]]:
    """Return the log-probability of each token of each prompt but the first."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if lora is not None:
        loaded = PeftModel.from_pretrained(loaded, lora)
        if merge:
            loaded = loaded.merge_and_unload()
    loaded.eval()
    found = []
    with torch.no_grad():
        for ids in prompts:
            given = torch.tensor([ids])
            of_all = loaded(given).logits.log_softmax(-1)[0, :-1]
            found.append(of_all.gather(-1, given[0, 1:, None])[:, 0].tolist())
    return found


job = json.loads(Path(sys.argv[1]).read_text())
answers = {}
for name, run in job["runs"].items():
    try:
        answers[name] = {"logprobs": logprobs(prompts=job["prompts"], **run)}
    except Exception as error:  # whatever a client says is what the test is about
        answers[name] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[2]).write_text(json.dumps(answers))
assert not any(name.startswith("axolotl_qtha.") for name in sys.modules)
