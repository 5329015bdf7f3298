"""`axolotl qtha-from-lora` as a person sees it."""

import pytest
import yaml
from click.testing import CliRunner

from axolotl_qtha.cli.from_lora import from_lora
from axolotl_qtha.settings.training_run import checked

from ..e2e.commands import QUICKSTART, write_config


def run(*arguments):
    return CliRunner().invoke(from_lora, [*map(str, arguments)])


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path, "lora.yml")


def new(path):
    return path.with_name(f"{path.stem}-qtha.yml")


def test_it_writes_beside_and_ends_with_the_plans_two_lines(path):
    done = run(path)
    assert done.exit_code == 0, done.output
    assert f"{new(path)}: {path.name} with `adapter: qtha`." in done.output
    assert "lora_r -> rank" in done.output
    assert "lora_mlp_kernel, lora_o_kernel, lora_qkv_kernel: left out; LoRA's own kernels" in done.output
    *_, parameters, memory = done.output.strip().splitlines()
    assert parameters.startswith("rank 4, full matrices, A, B and circuits shared by 4 neighbouring layers")
    assert "fewer trainable parameters than LoRA of rank 4" in parameters
    assert "On one it would take about" in memory or "Fits" in memory
    assert checked(yaml.safe_load(new(path).read_text()))[1] == ""


def test_an_output_of_ones_own(path, tmp_path):
    out = tmp_path / "mine.yml"
    assert run(path, "--out", out).exit_code == 0
    assert yaml.safe_load(out.read_text())["adapter"] == "qtha"
    assert not new(path).exists()


@pytest.mark.parametrize("out", ["lora-0.yml", "no/folder.yml"])
def test_outputs_that_are_refused(path, tmp_path, out):
    before = path.read_text()
    done = run(path, "--out", tmp_path / out)
    assert done.exit_code == 1
    assert "--out" in done.output
    assert "What works" in done.output
    assert path.read_text() == before


def test_a_base_that_is_not_at_hand_gives_no_plan_and_no_error(tmp_path):
    path = write_config(tmp_path, "lora.yml", base_model="nobody/nothing")
    done = run(path)
    assert done.exit_code == 0, done.output
    assert "No plan: base_model: 'nobody/nothing'" in done.output
    assert new(path).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapter: qtha\n", ["bad.yml: adapter: 'qtha' is there already"]),
        ("base_model: x\n", ["bad.yml: adapter: None"]),
        ("adapter: lora\n---\nadapter: lora\n", ["bad.yml: it holds 2 documents"]),
        ("adapter: lora\nlora_target_modules:\n\t- q_proj\n", ["bad.yml: line 3", "spaces"]),
        (b"\xff\xfe\x00", ["bad.yml", "is not text in UTF-8", "What works"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(tmp_path, text, words):
    path = tmp_path / "bad.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run(path)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    for word in words:
        assert word in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["bad.yml"]


def test_what_stops_it_and_force(tmp_path):
    path = write_config(tmp_path, "lora.yml", relora=True)
    done = run(path)
    assert done.exit_code == 1
    assert "  - relora: True: it merges LoRA's matrices as it trains." in done.output
    assert not new(path).exists()
    done = run(path, "--force")
    assert done.exit_code == 0, done.output
    assert "# relora: true" in new(path).read_text()
    assert "fewer trainable parameters" in done.output


def test_a_yaml_that_is_refused_with_qtha_alone_is_not_written(tmp_path):
    path = write_config(tmp_path, "lora.yml", lora_r=0)  # Axolotl itself takes it
    done = run(path)
    assert done.exit_code == 1
    assert "qtha.rank: 0" in done.output
    assert "--force" in done.output
    assert not new(path).exists()
    done = run(path, "--force")
    assert done.exit_code == 0, done.output
    assert "As it is, it is refused" in done.output
    assert new(path).exists()


def test_a_budget_that_cannot_be_met_on_a_small_base(tmp_path):
    path = write_config(tmp_path, "lora.yml", lora_r=16)
    done = run(path)
    assert done.exit_code == 1
    assert "qtha.param_budget: 0.24 cannot be met at rank 16" in done.output
    assert "--param-budget" in done.output
    assert run(path, "--param-budget", 0.5).exit_code == 0
    assert yaml.safe_load(new(path).read_text())["qtha"]["param_budget"] == 0.5


def test_modules_that_the_base_has_none_of(tmp_path):
    path = write_config(tmp_path, "lora.yml", lora_target_modules=["c_attn"])
    done = run(path)
    assert done.exit_code == 1
    assert "qtha.target_modules" in done.output
    assert not new(path).exists()


def test_a_yaml_that_lora_could_not_train_either_is_written_and_said(tmp_path):
    path = write_config(tmp_path, "lora.yml", early_stopping_patience=3, save_steps=None)
    done = run(path)
    assert done.exit_code == 0, done.output
    assert "Written, but `axolotl train` refuses it here, as it does the YAML with LoRA: `early_stopping_patience`" in done.output


def test_line_ends_stay(tmp_path):
    path = tmp_path / "windows.yml"
    path.write_bytes(b"base_model: nobody/nothing\r\nadapter: lora\r\nlora_r: 8\r\nlora_alpha: 16\r\noutput_dir: out\r\n")
    assert run(path).exit_code == 0
    made = new(path).read_bytes()
    assert made.count(b"\r\n") == made.count(b"\n") >= 8


def test_a_place_that_cannot_be_written_to(path):
    done = run(path, "--out", "/proc/new.yml")
    assert done.exit_code == 1
    assert "--out: '/proc/new.yml' cannot be written" in done.output


def test_the_quickstarts_lora_keeps_its_comments():
    from axolotl_qtha.settings.from_lora import translate

    text = (QUICKSTART / "lora.yml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in translate(text).text.splitlines() if line.startswith("#")] == comments
