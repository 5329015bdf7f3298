"""Lets `axolotl train` run on several CPU ranks (gloo): put this folder on PYTHONPATH and name the kind in QTHA_CPU_RANKS.

Axolotl, Accelerate and DeepSpeed take a CPU for a machine that trains on its own; each function below undoes one such place, and
nothing of this is needed on GPUs. Kinds: `ddp` (with ACCELERATE_USE_CPU=true), `deepspeed` (with DS_ACCELERATOR=cpu), `fsdp`.
"""

import importlib.abc
import importlib.util
import os
import sys


def load_on_cpu(module):
    """axolotl.loaders.model: a rank is no CUDA device, so the device map names the CPU."""
    original = module.ModelLoader._set_device_map_config

    def set_device_map(self):
        original(self)
        if "device_map" in self.model_kwargs:
            self.model_kwargs["device_map"] = "cpu"

    module.ModelLoader._set_device_map_config = set_device_map


def use_gloo(module):
    """accelerate.state: ranks without a GPU are still several."""
    one_device(module)
    module.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", module.DistributedType.MULTI_GPU)


def one_device(module):
    """accelerate.state: `cpu:1` is no place that PyTorch could load a checkpoint to."""
    import torch

    module.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def deepspeed_over_gloo(module):
    """deepspeed.comm.torch: Axolotl asks for NCCL by name; gloo writes into views that autograd tracks, and in any order.

    ZeRO-3 starts a gather for each parameter of a module and waits for the last one, which on NCCL's stream is the last to end.
    Gloo runs them side by side: a save now and then broadcasts weights of which a part has not come (DeepSpeed issue 8539).
    """
    import torch

    start, gather = module.TorchBackend.init_process_group, module.TorchBackend.all_gather_into_tensor

    def init_process_group(self, backend, *args, **kwargs):
        return start(self, "gloo", *args, **kwargs)

    def all_gather_into_tensor(self, output_tensor, input_tensor, *args, **kwargs):
        with torch.no_grad():
            work = gather(self, output_tensor.detach(), input_tensor.detach(), *args, **kwargs)
        if work is not None:  # async_op
            work.wait()
        return work

    module.TorchBackend.init_process_group = init_process_group
    module.TorchBackend.all_gather_into_tensor = all_gather_into_tensor


def mesh_of_cpus(module):
    """torch.distributed.device_mesh: FSDP2's mesh is made of CPUs."""
    original = module.init_device_mesh
    module.init_device_mesh = lambda device_type, *args, **kwargs: original("cpu", *args, **kwargs)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs a function on a module right after its import."""

    def __init__(self, functions):
        self.functions = functions

    def find_spec(self, name, path, target=None):
        function = self.functions.pop(name, None)
        if function is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            function(module)

        spec.loader.exec_module = exec_module
        return spec


KIND = os.environ.get("QTHA_CPU_RANKS")
FUNCTIONS = {
    "ddp": {"accelerate.state": one_device},
    "deepspeed": {"accelerate.state": use_gloo, "deepspeed.comm.torch": deepspeed_over_gloo},
    "fsdp": {"accelerate.state": use_gloo, "torch.distributed.device_mesh": mesh_of_cpus},
}
if KIND in FUNCTIONS:
    sys.meta_path.insert(0, AfterImport({"axolotl.loaders.model": load_on_cpu, **FUNCTIONS[KIND]}))
