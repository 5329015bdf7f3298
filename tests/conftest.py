"""Settings every test runs under: no network, no telemetry, one core for each worker of pytest-xdist."""

import os

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that share cores would wait for each other inside OpenMP
    os.environ["OMP_NUM_THREADS"] = "1"
