"""QTHAPlugin: Axolotl's hooks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftModel, get_peft_model
from torch import nn

from . import quantization
from .args import adapter_config, adapter_settings
from .config import SIMULATION_KEYS, QTHAConfig, differences
from .guards import RefuseUntrainedEvaluation
from .layer import QTHALayer
from .plan import describe

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from transformers import PreTrainedModel, Trainer, TrainerCallback

LOG = get_logger(__name__)

NOT_OF_THE_ADAPTER = ("target_modules", "seed", "dropout", *SIMULATION_KEYS)  # keys a trained one may be loaded without


class QTHAPlugin(BasePlugin):
    """Makes `adapter: qtha` known to Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self._inference = False
        self._training = False

    def register(self, cfg: dict[str, Any]) -> None:
        """Keep what Axolotl's validation drops: whether this is `axolotl inference`."""
        self._inference = bool(cfg.get("inference"))

    def get_input_args(self) -> str:
        """Name the class that holds the `qtha:` block."""
        return "axolotl_qtha.args.QTHAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapter."""
        return [AdapterCapabilities(name="qtha")]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Load nothing; only `axolotl train` comes here without `preprocess`."""
        self._training = not preprocess

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Complete the base's quantisation, now that its type and dtype are known, and show what a training will need."""
        if cfg.adapter != "qtha":
            return
        quantization.complete(cfg)
        if self._training and is_main_process():
            self._training = False  # once: DPO and the like may load a second model
            _show_plan(cfg)

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Refuse a full-precision base where a quantised one was asked for."""
        if cfg.adapter == "qtha" and (count := quantization.check_base(cfg, model)):
            LOG.info(f"quantised base: {count} layers, {model.get_memory_footprint() / 2**20:,.1f} MiB of weights in all.")

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, QTHAConfig] | None:
        """Return the model with a new adapter, or with the one of `lora_model_dir`; for DPO the configuration alone."""
        if cfg.adapter != "qtha":
            return None
        settings, config = adapter_settings(cfg), adapter_config(cfg)
        if self._inference and not cfg.lora_model_dir:
            raise ValueError(
                "lora_model_dir: None gives inference no adapter. What works: `--lora-model-dir` with the output_dir."
            )
        if cfg.lora_model_dir:
            _check_saved("lora_model_dir", Path(cfg.lora_model_dir), settings)
        if config_only:
            if cfg.lora_model_dir:  # the trainer makes its own adapter, and would leave this one out without a word
                method = getattr(cfg.rl, "value", cfg.rl)
                raise ValueError(
                    f"lora_model_dir: {cfg.lora_model_dir!r} is not read with `rl: {method}`. What works: without `rl:`, "
                    "training on, evaluate and inference."
                )
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            if cfg.lora_on_cpu:
                options |= {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}}
            saved = QTHAConfig.from_pretrained(cfg.lora_model_dir)
            saved.run_as(config)
            options["config"] = saved
            trainable = not (inference or self._inference)
            peft_model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=trainable, **options)
        else:
            peft_model = cast(PeftModel, get_peft_model(model, config, **options))
        _check_targets(cfg, peft_model)
        for line in describe(peft_model.active_peft_config, _sizes(peft_model)):
            LOG.info(line)
        return peft_model, peft_model.active_peft_config

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: PreTrainedModel) -> list[TrainerCallback]:
        """Add the guard of `axolotl evaluate`."""
        return [RefuseUntrainedEvaluation()] if cfg.adapter == "qtha" else []

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Check the adapter that the trainer made itself (DPO), and the checkpoint a run continues from."""
        if cfg.adapter != "qtha":
            return
        if cfg.rl:  # else load_adapter has checked them
            _check_targets(cfg, cast(nn.Module, trainer.model))
        if checkpoint := determine_last_checkpoint(cfg):
            _check_saved("resume_from_checkpoint", Path(checkpoint), adapter_settings(cfg))


def _show_plan(cfg: DictDefault) -> None:
    """Print what `axolotl qtha-plan` prints; wrong `qtha:` settings stop here, before the weights are downloaded."""
    from .planner.base import UnknownBase
    from .planner.estimate import local_gpus, make_plan
    from .planner.show import console, show_plan

    try:
        with torch.random.fork_rng(devices=[]):
            plan = make_plan(cfg, local_gpus(), advise=False)
    except UnknownBase as error:  # the run itself may yet know how to load it
        LOG.info(f"no plan: {error}")
        return
    show_plan(plan, console())
    if plan.fits is False:
        LOG.warning("this may not fit the GPU; `axolotl qtha-plan` with this configuration says what would.")


def _check_targets(cfg: DictDefault, model: nn.Module) -> None:
    layers = {
        name.removeprefix("base_model.model."): module.get_base_layer()
        for name, module in model.named_modules()
        if isinstance(module, QTHALayer)
    }
    if full := quantization.check_targets(cfg, layers, model):
        LOG.info(f"{len(full)} of {len(layers)} adapted layers are in full precision, as llm_int8_skip_modules says.")


def _sizes(model: PeftModel) -> list[tuple[int, int]]:
    return [(module.in_features, module.out_features) for module in model.modules() if isinstance(module, QTHALayer)]


def _check_saved(key: str, folder: Path, settings: dict[str, Any]) -> None:
    """Refuse an adapter folder that is damaged or contradicts the YAML."""
    if not folder.is_dir():
        return  # a Hub name; PEFT says what is wrong with it
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {str(folder)!r} holds no adapter_config.json. What works: a folder written by `adapter: qtha`.")
    saved = QTHAConfig.from_pretrained(str(folder))  # refuses a damaged file beside it
    if not isinstance(saved, QTHAConfig):
        raise ValueError(
            f"{key}: {str(folder)!r} is a {saved.peft_type.value} adapter. What works: a folder written by `adapter: qtha`."
        )
    settings = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ADAPTER}
    if rows := differences(saved, settings):
        raise ValueError(f"{key}: {str(folder)!r} does not fit the YAML. " + "; ".join(rows) + ". What works: the same settings.")
