"""An Axolotl plugin for the tests: the base's first layer never calls its `up_proj`."""

from axolotl.integrations.base import BasePlugin


class LeavesOut(BasePlugin):
    def post_model_build(self, cfg, model):
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
