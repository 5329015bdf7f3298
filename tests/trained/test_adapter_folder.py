"""A trained adapter and the YAML that goes on with it."""

import pytest

from axolotl_qtha import QTHAConfig
from axolotl_qtha.trained.adapter_folder import refuse_unsaid_share

from ..models import adapted, llama


def test_a_share_that_the_yaml_does_not_say_is_refused(tmp_path):
    """The plan and the checks of checkpointing, ZeRO and FSDP2 go by the YAML."""
    adapted(llama(), share={"layers": 2, "inputs": True}).save_pretrained(tmp_path / "shared")
    adapted(llama()).save_pretrained(tmp_path / "plain")
    works = r"lora_model_dir: .*What works: `qtha: \{share: \{layers: 2, inputs: true\}\}`"
    with pytest.raises(ValueError, match=works):
        refuse_unsaid_share(str(tmp_path / "shared"), QTHAConfig())
    refuse_unsaid_share(str(tmp_path / "shared"), QTHAConfig(share={"layers": 2, "inputs": True}))
    for folder in (str(tmp_path / "plain"), "some/name-on-the-hub", None):
        refuse_unsaid_share(folder, QTHAConfig())
