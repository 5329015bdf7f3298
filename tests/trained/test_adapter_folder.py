"""A trained adapter and the YAML that goes on with it."""

import pytest

from axolotl_qtha import QTHAConfig
from axolotl_qtha.trained.adapter_folder import FREE_WHEN_LOADED, FREE_WHEN_RESUMED, check_fits, refuse_unsaid_share

from ..models import adapted, llama


def test_a_share_that_the_yaml_does_not_say_is_refused(tmp_path):
    """The plan and the checks of checkpointing, ZeRO and FSDP2 go by the YAML."""
    adapted(llama(), share={"layers": 2, "inputs": True}).save_pretrained(tmp_path / "shared")
    adapted(llama()).save_pretrained(tmp_path / "plain")
    works = r"lora_model_dir: .*What works: `qtha: \{share: \{layers: 2, inputs: true\}\}`"
    with pytest.raises(ValueError, match=works):
        refuse_unsaid_share(str(tmp_path / "shared"), QTHAConfig())
    refuse_unsaid_share(str(tmp_path / "shared"), QTHAConfig(share={"layers": 2, "inputs": True}))
    for folder in (str(tmp_path / "plain"), "some/name-on-the-hub"):
        refuse_unsaid_share(folder, QTHAConfig())


def test_the_number_that_auto_became_is_no_difference(tmp_path):
    keys = {"mpo": "none", "quantum": "none", "param_budget": 0.6}
    model = adapted(llama(5), share={"layers": "auto", "inputs": True}, **keys)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].share.layers > 1
    check_fits("lora_model_dir", tmp_path, {**keys, "share": {"layers": "auto", "inputs": True}}, FREE_WHEN_LOADED)
    for share in ({"layers": "auto", "inputs": False}, {"layers": 5, "inputs": True}):
        with pytest.raises(ValueError, match=r"qtha\.share: the adapter was made with"):
            check_fits("lora_model_dir", tmp_path, {**keys, "share": share}, FREE_WHEN_LOADED)


@pytest.mark.parametrize("rank", [8, 16])
def test_gains_of_earlier_versions_are_those_of_today_up_to_rank_8(rank, tmp_path):
    sizes = {"rank": rank, "mid_dim": 16, "target_modules": ["up_proj"]}
    adapted(llama(), core_gain="balanced", **sizes).save_pretrained(tmp_path)
    wanted = QTHAConfig(bond_dim=4, **sizes).to_dict()
    if rank == 8:
        check_fits("resume_from_checkpoint", tmp_path, {"core_gain": wanted["core_gain"]}, FREE_WHEN_RESUMED)
        return
    with pytest.raises(ValueError, match=r"qtha\.core_gain: the adapter was made with 'balanced', the YAML says 'by_rank'"):
        check_fits("resume_from_checkpoint", tmp_path, {"core_gain": wanted["core_gain"]}, FREE_WHEN_RESUMED)
