"""QTHAPlugin: Axolotl's hooks, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.distributed import barrier, get_world_size, is_distributed, is_main_process
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftModel, get_peft_model
from torch import nn

from .ibm.options import refuse_secrets
from .settings import quantization
from .settings.args import DIAGNOSTICS_STEPS, adapter_config, adapter_settings
from .settings.parallel import deepspeed_settings, zero_stage
from .training import checkpoints
from .training.diagnostics import Diagnostics
from .training.guards import DropOneRanksShard, RefuseUntrainedEvaluation
from .training.model_card import facts_of, make_card, write_card
from .tuner.config import SIMULATION_KEYS, QTHAConfig, differences
from .tuner.layer import QTHALayer, refuse_nonlinear_merge
from .tuner.model import synchronise
from .tuner.saving import guard
from .tuner.sizes import describe

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from huggingface_hub import ModelCard
    from transformers import PreTrainedModel, Trainer, TrainerCallback

LOG = get_logger(__name__)

# Keys that a trained adapter may have otherwise than the YAML: of one that is loaded, and of a checkpoint that a run continues.
AS_THE_YAML_SAYS = ("seed", "dropout", "param_budget", *SIMULATION_KEYS)
NOT_OF_THE_ADAPTER = ("target_modules", "seed", "dropout", *SIMULATION_KEYS)


class QTHAPlugin(BasePlugin):
    """Makes `adapter: qtha` known to Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self._inference = False
        self._training = False

    def register(self, cfg: dict[str, Any]) -> None:
        """Keep what Axolotl's validation drops: whether this is `axolotl inference`; stop at a credential before it is logged."""
        refuse_secrets(cfg.get("qtha"), "qtha")
        self._inference = bool(cfg.get("inference"))

    def get_input_args(self) -> str:
        """Name the class that holds the `qtha:` block."""
        return "axolotl_qtha.settings.args.QTHAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapter."""
        return [AdapterCapabilities(name="qtha")]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Load nothing; only `axolotl train` comes here without `preprocess`."""
        self._training = not preprocess

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Complete the base's quantisation, now that its type and dtype are known; before a training choose the checkpoint it
        continues from, and show what it will need; before merging refuse adapters that cannot be.
        """
        if cfg.adapter != "qtha":
            return
        quantization.complete(cfg)
        if cfg.merge_lora and not self._training:  # here rather than after loading the base
            trained = cfg.lora_model_dir if cfg.lora_model_dir not in (None, cfg.output_dir) else None
            yaml = f"{cfg.axolotl_config_path} --lora-model-dir {trained}" if trained else str(cfg.axolotl_config_path)
            refuse_nonlinear_merge("default", adapter_config(cfg), yaml, str(Path(cfg.output_dir) / "merged"))
        if self._training:
            self._training = False  # once: DPO and the like may load a second model
            if (config := adapter_config(cfg)).quantum_backend == "ibm":
                from .training.device_callback import refuse_untrainable  # starts Qiskit

                refuse_untrainable(config, getattr(cfg.rl, "value", cfg.rl))
            _choose_checkpoint(cfg)
            if is_main_process():
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
        _share(cfg, peft_model)
        for line in describe(peft_model.active_peft_config, _sizes(peft_model)):
            LOG.info(line)
        if self._inference and config.quantum_backend == "ibm":
            from .training.device_callback import show_inference_cost

            show_inference_cost(config, len(_sizes(peft_model)))
        return peft_model, peft_model.active_peft_config

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: PreTrainedModel) -> list[TrainerCallback]:
        """Add the guards of `axolotl evaluate` and of FSDP2's checkpoints."""
        if cfg.adapter != "qtha":
            return []
        return [RefuseUntrainedEvaluation(), *([DropOneRanksShard()] if cfg.fsdp_config else [])]

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """Log what the adapters do; with `quantum_backend: ibm` have the steps of a training alone use the device."""
        if cfg.adapter != "qtha":
            return []
        callbacks: list[TrainerCallback] = []
        if steps := int((cfg.qtha or {}).get("diagnostics_steps", DIAGNOSTICS_STEPS)):
            callbacks.append(Diagnostics(trainer, steps))
        if (config := adapter_config(cfg)).quantum_backend == "ibm":
            from .planner.memory import sequences
            from .training.device_callback import TrainOnDevice

            callbacks.append(TrainOnDevice(trainer, config, sequences(cfg) * cfg.sequence_len))
        return callbacks

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Check the adapter that the trainer made itself (DPO) and the checkpoint a run continues from; take over model cards."""
        if cfg.adapter != "qtha":
            return
        model = cast(PeftModel, trainer.model)
        _write_own_cards(cfg, trainer, model)
        if cfg.rl:  # else load_adapter has seen to them
            _check_targets(cfg, model)
            _share(cfg, model)
        if cfg.resume_from_checkpoint:
            active = cast(QTHAConfig, model.active_peft_config)
            settings = {key: value for key, value in active.to_dict().items() if key in QTHAConfig.__annotations__}
            _check_saved("resume_from_checkpoint", Path(cfg.resume_from_checkpoint), settings, AS_THE_YAML_SAYS)


def _choose_checkpoint(cfg: DictDefault) -> None:
    """Settle what `resume_from_checkpoint` and `auto_resume_from_checkpoints` stand for, on every rank alike."""
    if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
        for folder, why in checkpoints.set_aside_incomplete(cfg.output_dir) if is_main_process() else []:
            LOG.warning(f"{folder} is not complete ({why}): a run was stopped while it was written. It is not used.")
        barrier()
    if not (chosen := determine_last_checkpoint(cfg)):
        return
    folder, deepspeed = Path(chosen), deepspeed_settings(cfg.deepspeed)
    ours = "deepspeed" if deepspeed else "fsdp" if cfg.fsdp_config else "plain"
    checkpoints.check(folder, cfg.output_dir, ours, zero_stage(deepspeed))
    barrier()  # until every rank has looked at it
    if ours == "deepspeed" and checkpoints.ranks_of(folder) not in (None, get_world_size()):
        if is_main_process():  # several nodes have one output_dir
            LOG.info(
                f"{folder} was written by {checkpoints.ranks_of(folder)} ranks, there are {get_world_size()} now: converting."
            )
            checkpoints.convert(folder)
        barrier()
        cfg.deepspeed = checkpoints.for_another_number_of_ranks(deepspeed)


def _share(cfg: DictDefault, model: PeftModel) -> None:
    """Start every rank from the same adapter, and guard what it saves."""
    efficient = cfg.fsdp_config and cfg.fsdp_config.cpu_ram_efficient_loading  # then FSDP2 hands out rank 0's
    if is_distributed() and not efficient:
        synchronise(model)
    guard(model)


def _write_own_cards(cfg: DictDefault, trainer: Trainer, model: PeftModel) -> None:
    """Have PEFT and the trainer write this project's card where they would write their own, which hold the YAML or local paths.

    PEFT's comes with every adapter that is saved, the trainer's at the end and with every push to the Hub.
    """

    def card() -> ModelCard:
        facts = facts_of(cfg, trainer.state, model.config)
        return make_card(cast(QTHAConfig, model.active_peft_config), facts, _sizes(model))

    def write(folder: str, *_: Any) -> None:
        write_card(card(), folder)

    def write_in_output_dir(*_: Any, **__: Any) -> None:
        if trainer.is_world_process_zero():
            write(str(trainer.args.output_dir))

    if trainer.is_world_process_zero():
        card()  # what could go wrong with it does so before the first step
    model.create_or_update_model_card = write  # type: ignore[method-assign, assignment]
    trainer.create_model_card = write_in_output_dir  # type: ignore[method-assign]


def _show_plan(cfg: DictDefault) -> None:
    """Print what `axolotl qtha-plan` prints; wrong `qtha:` settings stop here, before the weights are downloaded."""
    from .planner.estimate import local_gpus, make_plan
    from .planner.show import show_plan
    from .settings.meta_base import UnknownBase
    from .terminal import console

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


def _check_saved(key: str, folder: Path, settings: dict[str, Any], free: Collection[str] = NOT_OF_THE_ADAPTER) -> None:
    """Refuse an adapter folder that is damaged or contradicts the settings, `free` ones aside."""
    if not folder.is_dir():
        return  # a Hub name; PEFT says what is wrong with it
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {str(folder)!r} holds no adapter_config.json. What works: a folder written by `adapter: qtha`.")
    saved = QTHAConfig.from_pretrained(str(folder))  # refuses a damaged file beside it
    if not isinstance(saved, QTHAConfig):
        raise ValueError(
            f"{key}: {str(folder)!r} is a {saved.peft_type.value} adapter. What works: a folder written by `adapter: qtha`."
        )
    settings = {name: value for name, value in settings.items() if name not in free}
    if rows := differences(saved, settings):
        raise ValueError(f"{key}: {str(folder)!r} does not fit the YAML. " + "; ".join(rows) + ". What works: the same settings.")
