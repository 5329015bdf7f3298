"""The `ibm:` block: what it accepts and refuses, and what is never shown or saved."""

import dataclasses
import json
import math
import re
import traceback

import pytest
import yaml
from click.testing import CliRunner
from pydantic import SecretStr

from axolotl_qtha import QTHAConfig
from axolotl_qtha.cli.circuit import draw
from axolotl_qtha.cli.schema import config_schema
from axolotl_qtha.errors import PrivateSettings
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.settings.args import QTHABlock
from axolotl_qtha.settings.training_run import AdapterSettings

from ..settings.test_args import BASE, validated

PLANTED = "Zq83-planted-credential"
FAKE = {"backend": "fake:manila"}


def block(**ibm):
    return {"rank": 2, "quantum_backend": "ibm", "ibm": {**FAKE, **ibm}}


BAD = [
    ({**block(), "quantum_backend": "torch"}, ["qtha.ibm", "quantum_backend: torch", "`quantum_backend: ibm`"]),
    ({**block(), "quantum_backend": "aer"}, ["qtha.ibm", "quantum_backend: aer"]),
    ({**block(), "quantum": "none"}, ["qtha.quantum_backend", "quantum: none"]),
    ({**block(), "shots": 100}, ["qtha.shots", "100", "`ibm: {shots: ...}`"]),
    ({**block(), "noise_model": "depolarizing"}, ["qtha.noise_model", "leave it out"]),
    ({**block(), "precision": "double"}, ["qtha.precision", "double", "Aer's"]),
    ({**block(), "gradient": "adjoint"}, ["qtha.gradient", "adjoint", "`ibm: {gradient: ...}`"]),
    ({"quantum_backend": "ibm"}, ["qtha.ibm.max_qpu_seconds", "no limit", "`max_qpu_seconds: 60`", "fake:manila"]),
    (block(backend="ibm_torino"), ["qtha.ibm.max_qpu_seconds", "no limit"]),
    (block(backend="fake:manilla"), ["qtha.ibm.backend: (str, value not shown)", "`fake:manila`"]),
    ({**block(), "rank": 6}, ["qtha.ibm.backend", "5 qubits", "`qubits:` a divisor of the rank up to 5"]),
    (block(pack=0), ["qtha.ibm.pack: 0", "`pack: auto`"]),
    (block(pack=True), ["qtha.ibm.pack: True", "`pack: auto`"]),
    (block(pack=2.5), ["qtha.ibm.pack: 2.5", "`pack: auto`"]),
    (block(pack="all"), ["qtha.ibm.pack: (str, value not shown)", "`pack: auto`"]),
    ({**block(pack=2), "rank": 8, "qubits": 4}, ["qtha.ibm.pack: 2", "need 8", "fake:manila has 5", "`pack: auto`, or fewer"]),
    (block(shots=100, precision=0.1), ["qtha.ibm.shots", "100", "one of them"]),
    (block(shots=0), ["qtha.ibm.shots", "greater than or equal to 1"]),
    (block(shots=True), ["qtha.ibm.shots", "integer"]),
    (block(precision=float("nan")), ["qtha.ibm.precision", "finite"]),
    (block(max_qpu_seconds=0), ["qtha.ibm.max_qpu_seconds", "greater than 0"]),
    (block(max_qpu_seconds=float("inf")), ["qtha.ibm.max_qpu_seconds", "finite"]),
    (block(resilience_level=3), ["qtha.ibm.resilience_level", "0, 1 or 2"]),
    (block(dynamical_decoupling="XYXY"), ["qtha.ibm.dynamical_decoupling", "'XY4'"]),
    (block(mode="sesion"), ["qtha.ibm.mode", "'session'"]),
    (block(gradient="adjoint"), ["qtha.ibm.gradient", "'spsa'"]),
    (block(tokens_per_step=0), ["qtha.ibm.tokens_per_step", "greater than or equal to 1"]),
    (block(spsa_draws=4), ["qtha.ibm.spsa_draws", "4", "`gradient: spsa`"]),
    (block(timeout_seconds=-1), ["qtha.ibm.timeout_seconds", "greater than 0"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_refused(settings, words):
    with pytest.raises((ValueError, PrivateSettings), match="qtha") as error:
        validated(qtha=settings)
    for word in words:
        assert word in str(error.value)


BOUNDS = [("shots", 10**9), ("max_qpu_seconds", math.inf), ("max_qpu_seconds", math.nan), ("tokens_per_step", 10**9)]
BOUNDS += [("spsa_draws", 10**9), ("timeout_seconds", 1e12), ("precision", 1e-9)]


@pytest.mark.parametrize(("key", "value"), BOUNDS)
def test_sizes_have_bounds(key, value):
    with pytest.raises(ValueError, match=key):
        IBMOptions(**{**FAKE, key: value})


def test_defaults_and_what_follows_from_them():
    config = AdapterSettings.of(validated(qtha=block(), seed=7)).parsed
    options = config.simulation.ibm
    assert (config.simulation.backend, config.simulation.seed) == ("ibm", 7)
    assert (options.executions, options.mode, options.tokens_per_step, options.gradient) == (4096, "batch", 8, "parameter_shift")
    assert IBMOptions(**FAKE, precision=0.05).executions == 400
    assert hash(config.simulation) == hash(AdapterSettings.of(validated(qtha=block(), seed=7)).parsed.simulation)
    assert hash(IBMOptions(**FAKE)) != hash(IBMOptions(**FAKE, shots=1))


NAMES = ("token", "api_key", "apikey", "API-Key", "ibm_token", "QISKIT_IBM_TOKEN", "password", "client_secret", "key", "tokn")


PLACES = [(name, where) for name in NAMES for where in ("ibm", "nested", "qtha")]


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_a_planted_credential_is_never_echoed(tmp_path, monkeypatch, capfd, caplog, name, where):
    place = {name: PLANTED}
    settings = {"ibm": block(**place), "nested": block(extra=[place]), "qtha": {**block(), **place}}[where]
    where_from = {
        "Axolotl": lambda: validated(qtha=settings),
        "block": lambda: QTHABlock.model_validate(settings),
        "options": lambda: IBMOptions.model_validate(settings["ibm"] if where != "qtha" else {**FAKE, **place}),
    }
    if name != "tokn":  # there the block is refused as a whole
        where_from["another adapter"] = lambda: validated(adapter="lora", qtha=settings)
    for how, call in where_from.items():
        with pytest.raises(PrivateSettings, match="value not shown") as error:
            call()
        shown = "".join(traceback.format_exception(error.value)) + repr(error.value.args)
        assert PLANTED not in shown, how
        if name != "tokn" and where == "ibm":
            assert "save_account" in shown
            assert "QISKIT_IBM_TOKEN" in shown
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({**BASE, "qtha": settings}))
    done = CliRunner().invoke(draw, [str(path)])
    assert done.exit_code == 1
    assert "value not shown" in done.output
    streams = capfd.readouterr()
    assert PLANTED not in done.output + caplog.text + streams.out + streams.err


def test_the_instance_is_not_in_axolotls_dump_of_the_configuration():
    cfg = validated(qtha=block(instance=PLANTED))
    dump = json.dumps(dict(cfg), indent=2, default=str) + repr(cfg) + repr(AdapterSettings.of(cfg).parsed)
    assert PLANTED not in dump
    assert AdapterSettings.of(cfg).parsed.ibm.instance == SecretStr(PLANTED)


def test_nothing_of_the_block_is_saved_with_the_adapter(tmp_path):
    config = AdapterSettings.of(validated(qtha=block(instance=PLANTED, max_qpu_seconds=12.5))).parsed
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    for private in (PLANTED, "ibm", "manila", "12.5", "*****"):
        assert private not in text
    saved = QTHAConfig.from_pretrained(str(tmp_path))
    assert saved.quantum_backend == "torch"
    saved.run_as(config)
    assert saved.simulation == config.simulation
    assert dataclasses.replace(config).simulation == config.simulation


def test_the_schema_describes_every_key():
    shown = CliRunner().invoke(config_schema, ["--format", "json"]).output
    for key, field in IBMOptions.model_fields.items():
        assert field.description
        assert re.search(rf'"{key}"', shown), key
