"""QTHAPlugin: Axolotl's hooks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.distributed import is_distributed, is_main_process
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftModel, get_peft_model

from .settings import quantization
from .settings.args import refuse_private
from .settings.public_facts import facts_of
from .settings.training_run import AdapterSettings, TrainingRun, why_unread
from .trained.adapter_folder import FREE_WHEN_LOADED, FREE_WHEN_RESUMED, check_fits, refuse_other_circuits, refuse_unsaid_share
from .training import checkpoints, data, guards, learning, owner, resuming
from .training.diagnostics import Diagnostics
from .training.ending import guard_ending
from .training.model_card import write_own_cards
from .training.next_steps import whats_next
from .training.ranks import is_first
from .training.reached import Reached
from .training.saves import changed_settings, guard_checkpoints
from .tuner.config import QTHAConfig
from .tuner.described import describe
from .tuner.layer import adapted_layers, adapted_sizes
from .tuner.model import agree_on_circuits, synchronise
from .tuner.saving import guard

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from transformers import PreTrainedModel, Trainer, TrainerCallback

LOG = get_logger(__name__)


class QTHAPlugin(BasePlugin):
    """Makes `adapter: qtha` known to Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self._inference = False
        self._training = False
        self._over = False
        self._parsed: tuple[DictDefault, AdapterSettings] | None = None

    def register(self, cfg: dict[str, Any]) -> None:
        """Remember whether this is `axolotl inference`, which validation drops; refuse credentials before anything logs them, and
        an output_dir that cannot be written, to which Axolotl's log goes next.
        """
        refuse_private(cfg)
        if cfg.get("adapter") == "qtha":
            guards.refuse_unwritable(cfg.get("output_dir"))
        self._inference = bool(cfg.get("inference"))

    def get_input_args(self) -> str:
        """Name the class that holds the `qtha:` block."""
        return "axolotl_qtha.settings.args.QTHAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapter."""
        return [AdapterCapabilities(name="qtha")]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Load nothing: `axolotl train` alone calls this with preprocess=False, which tells that this is a training; its data are
        checked as they are loaded.
        """
        self._training = not preprocess
        if cfg.adapter == "qtha" and not preprocess:
            data.watch_loading(cfg)

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Complete the base's quantisation, now that its type and dtype are known; before a training choose the checkpoint it
        continues from, and show what it will need; refuse to merge an adapter that is not linear, and experts on a CPU.
        """
        if cfg.adapter != "qtha":
            return
        quantization.check_experts_device(cfg)
        quantization.complete(cfg)
        settings, training, self._training = self._settings(cfg), self._training, False  # DPO may load a second model
        if cfg.merge_lora and not training:  # here rather than after loading the base
            guards.refuse_merge(settings.parsed, cfg.axolotl_config_path, cfg.lora_model_dir, cfg.output_dir)
        if training:
            if cfg.lora_model_dir:  # the plan is of the YAML's circuit
                settings = self._like(cfg, cfg.lora_model_dir)
                refuse_unsaid_share(cfg.lora_model_dir, settings.parsed)
                refuse_other_circuits("lora_model_dir", Path(cfg.lora_model_dir), settings.parsed)
            self._before_training(cfg, settings)

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
        settings, folder = self._settings(cfg), cfg.lora_model_dir
        guards.check_lora_model_dir(folder, self._inference, getattr(cfg.rl, "value", cfg.rl) if config_only else None)
        if folder:
            check_fits("lora_model_dir", Path(folder), settings.named, FREE_WHEN_LOADED)
        if config_only:
            return None, settings.config_for(model)
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if folder and cfg.lora_on_cpu:
            options |= {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}}
        if folder:
            options |= {"config": settings.of_trained(folder, model), "is_trainable": not (inference or self._inference)}
            peft_model = PeftModel.from_pretrained(model, folder, **options)
        else:
            peft_model = cast(PeftModel, get_peft_model(model, settings.config_for(model), **options))
        self._take_over(cfg, peft_model)
        for line in describe(peft_model.active_peft_config, adapted_sizes(peft_model)):
            LOG.info(line)
        if self._inference and settings.parsed.quantum_backend == "ibm":
            from .training.device_callback import show_inference_cost  # starts Qiskit

            show_inference_cost(settings.parsed, sum(size.owned.runs for size in adapted_sizes(peft_model)))
        return peft_model, peft_model.active_peft_config

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: PreTrainedModel) -> list[TrainerCallback]:
        """Add the guard of `axolotl evaluate`."""
        if cfg.adapter != "qtha":
            return []
        return [guards.RefuseUntrainedEvaluation()]

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        """Log what adapters do, and which no step reaches; with `quantum_backend: ibm` have only a training use the device."""
        if cfg.adapter != "qtha":
            return []
        settings = self._settings(cfg)
        optimiser = getattr(cfg.optimizer, "value", cfg.optimizer)
        callbacks: list[TrainerCallback] = [learning.watch(trainer, optimiser, (cfg.qtha or {}).get("circuit_lr")), Reached()]
        if settings.diagnostics_steps:
            callbacks.append(Diagnostics(trainer, settings.diagnostics_steps))
        if settings.parsed.quantum_backend == "ibm":
            from .training.device_callback import TrainOnDevice

            callbacks.append(TrainOnDevice(trainer, settings.parsed, TrainingRun.of(cfg, settings).tokens))
        return callbacks

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Check the adapter that the trainer made itself (DPO) and the checkpoint a run continues from; take over model cards."""
        if cfg.adapter != "qtha":
            return
        model = cast(PeftModel, trainer.model)
        guard_checkpoints(trainer)
        guard_ending(trainer)
        write_own_cards(trainer, model, lambda: facts_of(cfg, trainer.state, model.config))
        data.watch_batches(trainer, cfg)
        if cfg.rl:  # else load_adapter has seen to them
            self._take_over(cfg, model)
        if cfg.resume_from_checkpoint:
            active = cast(QTHAConfig, model.active_peft_config)
            checkpoint = Path(cfg.resume_from_checkpoint)
            check_fits("resume_from_checkpoint", checkpoint, active.to_dict(), FREE_WHEN_RESUMED)
            refuse_other_circuits("resume_from_checkpoint", checkpoint, active)
            if changed := changed_settings(checkpoint, trainer.args):
                LOG.info(f"goes on from {checkpoint} with other settings: {changed}")
            resuming.load_the_trained(trainer)
            trainer.add_callback(resuming.CompareWithCheckpoint(checkpoint))

    def post_train(self, cfg: DictDefault, model: PreTrainedModel | PeftModel) -> None:
        """Give `output_dir` up: Axolotl calls this when the training is over, and again when all is saved."""
        if cfg.adapter == "qtha" and self._over:
            owner.give_up(cfg.output_dir)
        self._over = not self._over

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Tell what to do with the trained adapter, now that it is saved (`post_train` comes before that, and again after)."""
        if cfg.adapter == "qtha" and is_first():  # the process group is closed by now
            for line in whats_next(cfg.axolotl_config_path, cfg.output_dir, why_unread(cfg) is None):
                LOG.info(line, main_process_only=False)

    def _settings(self, cfg: DictDefault) -> AdapterSettings:
        """Return the `qtha:` block, parsed once: Axolotl hands the same configuration to every hook of a run."""
        if self._parsed is None or self._parsed[0] is not cfg:
            self._parsed = cfg, AdapterSettings.of(cfg)
        return self._parsed[1]

    def _like(self, cfg: DictDefault, folder: str) -> AdapterSettings:
        """Return the `qtha:` block, from now on with the form of the adapter that the training goes on from."""
        self._parsed = cfg, self._settings(cfg).like(folder)
        return self._parsed[1]

    def _before_training(self, cfg: DictDefault, settings: AdapterSettings) -> None:
        if settings.parsed.quantum_backend == "ibm":
            from .training.device_callback import refuse_untrainable

            refuse_untrainable(settings.parsed, getattr(cfg.rl, "value", cfg.rl))
        checkpoints.refuse_others(cfg.output_dir)
        self._over, resumes = False, bool(cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None)
        owner.own(cfg.output_dir, cfg.save_total_limit, resumes)
        if chosen := determine_last_checkpoint(cfg):
            changed = checkpoints.prepare(Path(chosen), cfg.output_dir, cfg.deepspeed, bool(cfg.fsdp_config), resumes)
            if changed is not None:
                cfg.deepspeed = changed
            settings = self._like(cfg, chosen)
        if is_main_process():
            from .planner.show import show_before_training

            show_before_training(TrainingRun.of(cfg, settings))

    def _take_over(self, cfg: DictDefault, model: PeftModel) -> None:
        """Check the layers that got an adapter, start every rank from the same one, and guard what it saves."""
        frozen = {name: layer.get_base_layer() for name, layer in adapted_layers(model).items()}
        if full := quantization.check_targets(cfg, frozen, model):
            LOG.info(f"{len(full)} of {len(frozen)} adapted layers are in full precision, as llm_int8_skip_modules says.")
        efficient = cfg.fsdp_config and cfg.fsdp_config.cpu_ram_efficient_loading  # then FSDP2 hands out rank 0's
        if is_distributed() and not efficient:
            synchronise(model)
        if is_distributed() and cast(QTHAConfig, model.active_peft_config).circuit:
            agree_on_circuits(model)
        guard(model)
