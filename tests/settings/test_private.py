"""A credential in the wrong place of a YAML is refused before anything writes it: error, streams, logs and files are searched."""

import traceback

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.utils.tee import close_debug_log

from axolotl_qtha import QTHAConfig
from axolotl_qtha.errors import PrivateSettings
from axolotl_qtha.settings.args import QTHABlock

from ..e2e.commands import train_here, write_config

PLANTED = "Zq83planted_here_0F9e8d7c6b5a493827160f9e8"  # 42 characters, as keys of IBM Cloud have 44
URL = f"https://user:{PLANTED}@host"
FAKE = {"backend": "fake:manila"}
PAID = {"backend": "ibm_torino", "max_qpu_seconds": 60}
IBM = {"rank": 2, "quantum_backend": "ibm"}
# what stands in the YAML -> what the error names
PLACES = {
    "ibm, a text": ({"qtha": {"ibm": PLANTED}}, "qtha.ibm: (str, value not shown)"),
    "ibm, a list": ({"qtha": {"ibm": [PLANTED]}}, "qtha.ibm: (list, value not shown)"),
    "ibm, lists in lists": ({"qtha": {**IBM, "ibm": {"backend": [[PLANTED]]}}}, "qtha.ibm.backend (value not shown)"),
    "ibm, unknown": ({"qtha": {**IBM, "ibm": {"acount": PLANTED}}}, "qtha.ibm.acount: (str, value not shown)"),
    "ibm, a key": ({"qtha": {**IBM, "ibm": {PLANTED: True}}}, "a key of 42 characters"),
    "ibm, token": ({"qtha": {**IBM, "ibm": {"token": PLANTED}}}, "qtha.ibm.token"),
    "ibm, token deep": ({"qtha": {**IBM, "ibm": {"a": [{"b": {"token": PLANTED}}]}}}, "qtha.ibm.a.0.b.token"),
    "backend, an address": ({"qtha": {**IBM, "ibm": {"backend": URL}}}, "qtha.ibm.backend: (str, value not shown)"),
    "backend, a key": ({"qtha": {**IBM, "ibm": {"backend": PLANTED}}}, "qtha.ibm.backend: (str, value not shown)"),
    "backend, a fake": ({"qtha": {**IBM, "ibm": {"backend": f"fake:{PLANTED}"}}}, "qtha.ibm.backend: (str, value"),
    "backend, a fake that is none": (
        {"qtha": {**IBM, "ibm": {"backend": f"fake:{PLANTED.lower()[:36]}"}}},
        "qtha.ibm.backend: (str, value",
    ),
    "backend, a mapping": ({"qtha": {**IBM, "ibm": {"backend": {"url": URL}}}}, "qtha.ibm.backend (value not shown)"),
    "shots": ({"qtha": {**IBM, "ibm": {**FAKE, "shots": PLANTED}}}, "qtha.ibm.shots (value not shown)"),
    "precision": ({"qtha": {**IBM, "ibm": {**FAKE, "precision": PLANTED}}}, "qtha.ibm.precision (value not shown)"),
    "pack": ({"qtha": {**IBM, "ibm": {**FAKE, "pack": PLANTED}}}, "qtha.ibm.pack: (str, value not shown)"),
    "mode": ({"qtha": {**IBM, "ibm": {**FAKE, "mode": PLANTED}}}, "qtha.ibm.mode (value not shown)"),
    "instance, no text": ({"qtha": {**IBM, "ibm": {**FAKE, "instance": [PLANTED]}}}, "qtha.ibm.instance (value not shown)"),
    "estimator, a text": ({"qtha": {**IBM, "ibm": {**PAID, "estimator": PLANTED}}}, "qtha.ibm.estimator: (str, value not shown)"),
    "estimator, unknown": ({"qtha": {**IBM, "ibm": {**PAID, "estimator": {"a": PLANTED}}}}, "qtha.ibm.estimator.a: (str, value"),
    "estimator, a value": (
        {"qtha": {**IBM, "ibm": {**PAID, "estimator": {"twirling": {"num_randomizations": PLANTED}}}}},
        "qtha.ibm.estimator.twirling.num_randomizations: (str, value not shown)",
    ),
    "estimator, token": ({"qtha": {**IBM, "ibm": {**PAID, "estimator": {"token": PLANTED}}}}, "qtha.ibm.estimator.token"),
    "estimator, a fake": ({"qtha": {**IBM, "ibm": {**FAKE, "estimator": {"x": PLANTED}}}}, "qtha.ibm.estimator.x: (str, value"),
    "transpiler, a value": (
        {"qtha": {**IBM, "ibm": {**FAKE, "transpiler": {"layout_method": PLANTED}}}},
        "qtha.ibm.transpiler.layout_method: (str, value not shown)",
    ),
    "journal, an address": ({"qtha": {**IBM, "ibm": {**FAKE, "journal": URL}}}, "qtha.ibm.journal: (str, value not shown)"),
    "quantum_backend": ({"qtha": {"quantum_backend": PLANTED}}, "qtha.quantum_backend: (str, value not shown)"),
    "quantum_backend, a mapping": ({"qtha": {"quantum_backend": {"ibm": PLANTED}}}, "qtha.quantum_backend: (dict, value"),
    "unknown": ({"qtha": {"ibmtok": PLANTED}}, "qtha.ibmtok: (str, value not shown)"),
    "unknown, a list": ({"qtha": {"ibmtok": [{"x": PLANTED}]}}, "qtha.ibmtok: (list, value not shown)"),
    "unknown, a key": ({"qtha": {PLANTED: 1}}, "a key of 42 characters"),
    "unknown, a key with more below": ({"qtha": {PLANTED: {"token": 1}}}, "token (value not shown)"),
    "LoRA's": ({"qtha": {"bias": PLANTED}}, "qtha.bias: (str, value not shown)"),
    "share": ({"qtha": {"share": {"layer": PLANTED}}}, "qtha.share.layer: (str, value not shown)"),
    "the block, a text": ({"qtha": PLANTED}, "qtha: (str, value not shown)"),
    "the block, a list": ({"qtha": [PLANTED]}, "qtha: (list, value not shown)"),
    "beside, token": ({"ibm": {"token": PLANTED}}, "ibm.token (value not shown)"),
    "beside, a text": ({"ibm": PLANTED}, "`qtha: {ibm: {...}}`"),
    "beside, instance": ({"ibm": {"instance": PLANTED}}, "`qtha: {ibm: {...}}`"),
    "beside, backend": ({"quantum_backend": URL}, "`qtha: {quantum_backend: ...}`"),
    "beside, IBM's": ({"ibm_account": PLANTED}, "ibm_account: (str, value not shown)"),
    "beside, Qiskit's": ({"QISKIT_IBM_TOKEN": PLANTED}, "QISKIT_IBM_TOKEN (value not shown)"),
}


@pytest.fixture(autouse=True)
def own_debug_log():
    """Axolotl opens one in a process, in the first output_dir."""
    close_debug_log()
    yield
    close_debug_log()


def config_with(folder, changes):
    """Write the quickstart with keys that are replaced and not merged."""
    path = write_config(folder)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return path


def searched(folder, config):
    """Return the contents of all files but the YAML itself."""
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file() and path != config)


@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_and_nowhere_written(place, tmp_path, capfd, caplog):
    changes, named = PLACES[place]
    config = config_with(tmp_path, changes)
    with pytest.raises(PrivateSettings) as error:
        train_here(config)
    shown = "".join(traceback.format_exception(error.value)) + repr(error.value)
    streams = capfd.readouterr()
    text = shown + streams.out + streams.err + caplog.text + searched(tmp_path, config)
    assert PLANTED not in text
    assert PLANTED.lower()[:36] not in text
    assert named in str(error.value)
    assert "What works" in str(error.value)
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("broken", [{}, {"rank": 13}, {"seed": -1}])
def test_an_instance_is_in_no_error_and_no_log(broken, tmp_path, capfd, caplog):
    """It may stand in the YAML. pydantic prints the end of a block at fault, and what it was given."""
    config = config_with(tmp_path, {"qtha": {**IBM, **broken, "ibm": {**FAKE, "instance": PLANTED}}})
    shown = ""
    try:
        load_cfg(str(config))
    except ValueError as error:
        shown = "".join(traceback.format_exception(error))
    assert bool(shown) == bool(broken)
    assert (tmp_path / "out/debug.log").is_file() != bool(broken)
    streams = capfd.readouterr()
    assert PLANTED not in shown + streams.out + streams.err + caplog.text + searched(tmp_path, config)


@pytest.mark.e2e
def test_an_instance_is_in_no_file_of_a_training(tmp_path, capfd, caplog):
    config = write_config(tmp_path, max_steps=1, save_steps=1, eval_steps=None, test_datasets=None, micro_batch_size=1)
    settings = yaml.safe_load(config.read_text())
    small = {"target_modules": ["q_proj"], "layers_to_transform": [0], "circuit_layers": 1}
    ibm = {
        **FAKE,
        "shots": 20,
        "tokens_per_step": 1,
        "gradient": "spsa",
        "journal": str(tmp_path / "journal"),
        "instance": PLANTED,
    }
    settings["qtha"] = {**IBM, **small, "ibm": ibm}
    config.write_text(yaml.safe_dump(settings))
    train_here(config)
    assert (tmp_path / "out/debug.log").is_file()
    assert (tmp_path / "out/README.md").is_file()
    streams = capfd.readouterr()
    assert PLANTED not in streams.out + streams.err + caplog.text + searched(tmp_path, config)


def test_without_axolotl():
    for call in (QTHABlock.model_validate, lambda settings: QTHAConfig(**settings)):
        for settings in ({"ibmtok": PLANTED}, {"quantum_backend": PLANTED}, {**IBM, "ibm": {"backend": URL}}, {"ibm": PLANTED}):
            with pytest.raises((ValueError, PrivateSettings)) as error:
                call(settings)
            assert PLANTED not in "".join(traceback.format_exception(error.value))


def test_devices_names_are_names_of_devices():
    for name in ("ibm_torino", "least_busy", "fake:manila", "ibmq_qasm_simulator"):
        ibm = {"backend": name, "max_qpu_seconds": 60}
        assert QTHABlock.model_validate({**IBM, "ibm": ibm}).ibm.backend == name
