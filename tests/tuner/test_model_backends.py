"""Adapted models whose circuits run on Qiskit Aer, and angles that are not finite."""

import pytest
import torch
from peft import PeftModel

from axolotl_qtha import QTHAConfig

from ..models import adapted, adapters, gradients, llama, logits, train, trainable

SMALL = {"rank": 2, "circuit_layers": 1, "mpo": "none", "target_modules": ["q_proj", "down_proj"]}
LAYERS = ["0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj"]


@pytest.mark.parametrize("quantum", ["qtha", "frozen", "product", "qwthn"])
def test_aer_is_the_same_adapter(quantum):
    exact = train(adapted(llama(), **SMALL, quantum=quantum))
    aer = adapted(llama(), **SMALL, quantum=quantum, quantum_backend="aer")
    aer.load_state_dict(exact.state_dict())
    assert (logits(aer) - logits(exact)).abs().max() <= 1e-5  # float32
    expected = gradients(exact)
    for name, gradient in gradients(aer).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * (1 + expected[name].abs().max()), name


def test_gradient_checkpointing_recomputes_the_same_shots():
    model = train(adapted(llama(), **SMALL, quantum_backend="aer", shots=50), steps=1).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again = gradients(model)
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())


def test_a_saved_adapter_runs_in_another_way(tmp_path):
    trained = train(adapted(llama(), **SMALL))
    trained.save_pretrained(tmp_path)
    config = QTHAConfig.from_pretrained(str(tmp_path))
    config.run_as(QTHAConfig(quantum_backend="aer", shots=100, noise_model="depolarizing", seed_simulator=3))
    noisy = PeftModel.from_pretrained(llama(), str(tmp_path), config=config)
    assert 0 < (logits(noisy) - logits(trained)).abs().max() < 5
    noisy.save_pretrained(tmp_path / "noisy")
    saved = QTHAConfig.from_pretrained(str(tmp_path / "noisy"))
    assert saved.simulation == config.simulation
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "noisy"))), logits(noisy))


def test_a_saved_adapter_without_a_circuit_cannot_run_on_aer(tmp_path):
    adapted(llama(), rank=SMALL["rank"], quantum="none").save_pretrained(tmp_path)
    config = QTHAConfig.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"qtha\.quantum_backend: 'aer' has no circuit"):
        config.run_as(QTHAConfig(quantum_backend="aer"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_before_a_layer_is_replaced():
    model = llama()
    with pytest.raises(ValueError, match=r"qtha\.quantum_backend: 'aer_gpu' finds no GPU"):
        adapted(model, **SMALL, quantum_backend="aer_gpu")
    assert not adapters(model)
    adapted(llama().to("meta"), **SMALL, quantum_backend="aer_gpu")  # as `qtha-plan` does, on a machine without one


@pytest.mark.parametrize("backend", ["torch", "aer"])
def test_an_angle_that_is_not_finite_names_its_module(backend):
    for layer in LAYERS:
        model = adapted(llama(), **SMALL, quantum_backend=backend)
        (angles,) = [p for name, p in trainable(model).items() if f"{layer}.qtha_adapter.default.angles" in name]
        with torch.no_grad():
            angles.view(-1, SMALL["rank"])[3, 1] = float("nan")
        with pytest.raises(ValueError, match=rf"^model.layers.{layer}: the circuit's trained angle of qubit 1 \(row 3\) is nan"):
            logits(model)


def test_an_input_that_is_not_finite_names_its_module():
    model = adapted(llama(), **SMALL)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.self_attn.o_proj.weight")[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"^model.layers.0.mlp.down_proj: the circuit's encoded input of qubit \d \(token \d+\) is"
    ):
        logits(model)
