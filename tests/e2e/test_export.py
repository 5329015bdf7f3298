"""`axolotl qtha-export` on a trained quickstart: what it writes, what that costs, and what it refuses."""

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_qtha import QTHAConfig
from axolotl_qtha.cli.export import export
from axolotl_qtha.trained.clients import Exported, told

from .commands import QUICKSTART, run, train_here, write_config
from .test_commands import IDS

pytestmark = pytest.mark.e2e

# the import of the plugin fails, as where it is not installed
FRESH = """
import sys, torch
sys.modules["axolotl_qtha"] = None
from transformers import AutoModelForCausalLM
base, lora, rows, ids, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if rows != "0":
    model.resize_token_embeddings(int(rows))
if lora:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, lora)
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, ids + ".logits")
assert not any(name.startswith("axolotl_qtha.") for name in sys.modules)
"""


def fresh(tmp_path, base, lora="", rows=0):
    """Return the logits in a process that has never heard of this package."""
    torch.save(IDS, tmp_path / "ids")
    given = [str(base), str(lora), str(rows), str(tmp_path / "ids"), str(torch.get_num_threads())]
    done = run([sys.executable, "-c", FRESH, *given], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    return torch.load(tmp_path / "ids.logits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder):
    """The quickstart's YAML, trained for its 60 steps; from a W_Q as large as W_C: from zero the circuit does little by then."""
    path = write_config(folder, qtha={"branch_init": "kaiming"})
    train_here(path)
    return path


@pytest.fixture(scope="module")
def linear(folder):
    """The YAML of a trained adapter without a circuit, and that model's logits."""
    where = folder / "linear"
    where.mkdir()
    changes = {"qtha": {"rank": 4, "param_budget": 0.4, "quantum": "none"}, "max_steps": 8, "save_steps": 8, "eval_steps": 8}
    path = write_config(where, **changes)
    model, _, _ = train_here(path)
    return path, logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def exported(config, out, *options):
    """Run the command in this process; return what export.json says."""
    done = CliRunner().invoke(export, [str(config), "--out", str(out), *options])
    assert done.exit_code == 0, done.output[-3000:] + repr(done.exception)
    return json.loads((out / "export.json").read_text())


def refused(config, out, *options):
    """Run the command; return the error."""
    done = CliRunner().invoke(export, [str(config), "--out", str(out), *options])
    assert done.exit_code == 1, done.output[-2000:]
    assert isinstance(done.exception, SystemExit), done.exception
    return done.output.split("\nError: ")[-1]


def base():
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32)


def test_the_lora_keeps_what_the_adapter_gained_and_loads_without_the_plugin(config, tmp_path):
    out = tmp_path / "lora"
    report = exported(config, out)
    perplexity, kl = report["perplexity"], report["kl_nats_per_token"]
    assert perplexity["qtha"] < 0.6 * perplexity["base"]
    assert report["perplexity_gain_kept"] >= 0.9
    assert kl["linear, with constants"] < kl["export"] < 0.1 < kl["base"]
    assert report["top1_agreement"]["export"] > report["top1_agreement"]["base"]
    assert len(report["modules"]) == 28
    assert (report["rank"], report["fitted_tokens"] > 30_000) == (4, True)
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "export.json", "export.png")
    }
    here = PeftModel.from_pretrained(base(), str(out))
    assert torch.equal(fresh(tmp_path, QUICKSTART / "base", out), logits(here))
    # vLLM: no bias, rank at most 512, two matrices a layer, nothing else in the file; tests/export/test_lowrank.py has its rules
    lora = here.active_peft_config
    assert told(Exported(lora.r, lora.lora_bias, tuple(lora.modules_to_save or ()))) == {}


def test_the_card_of_an_export(config, tmp_path):
    report = exported(config, tmp_path / "lora", "--tokens", "2000")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"keeps {report['perplexity_gain_kept']:.1%}" in card
    assert "axolotl_qtha` is not needed" in card
    assert str(config.parent) not in card


def test_the_perplexities_are_those_of_the_models(config, tmp_path):
    """Against the loss that transformers computes, sequence by sequence; nats per predicted token to 1e-4 relative."""
    text = tmp_path / "text.txt"
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()[:60]]
    text.write_text("\n".join(row["output"] for row in rows))
    report = exported(config, tmp_path / "lora", "--calibration", str(text), "--tokens", "100000")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    ids = tokenizer(text.read_text())["input_ids"]
    length = yaml.safe_load(config.read_text())["sequence_len"]
    taken = int(len(ids) * 0.8)
    assert report["fitted_tokens"] == taken
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece[max(0, taken - i * length) :] for i, piece in enumerate(pieces) if (i + 1) * length > taken]
    for name, model in (("base", base()), ("export", PeftModel.from_pretrained(base(), str(tmp_path / "lora")))):
        total = count = 0
        for piece in pieces:
            given = torch.tensor([piece])
            with torch.no_grad():
                total += float(model(given, labels=given).loss) * (len(piece) - 1)
            count += len(piece) - 1
        assert count == report["predicted_tokens"]
        assert report["perplexity"][name] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)


@pytest.mark.parametrize("surrogate", ["wide", "distilled"])
def test_better_surrogates(config, tmp_path, surrogate):
    report = exported(config, tmp_path / "lora", "--surrogate", surrogate, "--tokens", "12000")
    assert report["kl_nats_per_token"]["export"] < 0.8 * report["kl_nats_per_token"]["linear"]
    assert report["perplexity_gain_kept"] >= 0.95
    assert report["rank"] == 4


def test_biases_carry_the_constants_where_asked_for(config, tmp_path):
    report = exported(config, tmp_path / "lora", "--constant", "bias", "--tokens", "8000")
    plain = exported(config, tmp_path / "plain", "--constant", "drop", "--tokens", "8000")
    assert report["kl_nats_per_token"]["export"] < plain["kl_nats_per_token"]["export"]
    model = PeftModel.from_pretrained(base(), str(tmp_path / "lora"))
    assert model.active_peft_config.lora_bias
    dropped = PeftModel.from_pretrained(base(), str(tmp_path / "plain"))
    assert (logits(model) - logits(dropped)).abs().max() > 0.01
    done = CliRunner().invoke(export, [str(config), "--out", str(tmp_path / "again"), "--constant", "bias", "--tokens", "2000"])
    assert "vLLM and llama.cpp will not read this adapter: it has biases" in done.output


def test_the_merged_model_is_the_lora_merged(config, tmp_path):
    exported(config, tmp_path / "lora", "--tokens", "8000")
    report = exported(config, tmp_path / "merged", "--format", "merged", "--tokens", "8000")
    assert report["perplexity_gain_kept"] >= 0.9
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora")))
    assert (logits(merged) - expected).abs().max() < 1e-4  # one rounding of every weight
    assert (logits(merged) - logits(base())).abs().max() > 1
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")("Some words.")["input_ids"]
    assert words == AutoTokenizer.from_pretrained(QUICKSTART / "base")("Some words.")["input_ids"]


def test_without_a_circuit_the_export_is_exact(linear, tmp_path):
    config, expected = linear
    report = exported(config, tmp_path / "lora")
    assert report["surrogate"] == "exact"
    assert report["kl_nats_per_token"]["export"] < 1e-6
    assert (logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora"))) - expected).abs().max() < 1e-5
    exported(config, tmp_path / "merged", "--format", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # every weight is rounded once; the logits go up to 20, where float32 has steps of 2e-6
    assert (logits(merged) - expected).abs().max() < 3e-5


def test_on_a_four_bit_base(config, tmp_path):
    four = write_config(tmp_path, "qtha-4bit.yml")
    adapter = config.parent / "out"
    report = exported(four, tmp_path / "lora", "--lora-model-dir", str(adapter), "--tokens", "4000")
    assert report["perplexity_gain_kept"] >= 0.9
    full = write_config(tmp_path)
    other = exported(full, tmp_path / "full", "--lora-model-dir", str(adapter), "--tokens", "4000")
    assert report["perplexity"]["base"] != other["perplexity"]["base"]  # it was measured on the quantised one
    assert report["as_written"]["kl_to_export"] < 1e-5  # opened in 4 bits as well
    merged = exported(four, tmp_path / "merged", "--lora-model-dir", str(adapter), "--tokens", "4000", "--format", "merged")
    written = merged["as_written"]  # in full precision, compared with the export beside the full-precision base
    assert written["kl_to_export"] < 1e-5
    assert written["perplexity"] == pytest.approx(other["as_written"]["perplexity"], rel=0.05)
    assert written["perplexity"] != pytest.approx(merged["perplexity"]["export"], rel=1e-4)


def test_merging_by_axolotl_names_the_command_that_works(forked, config, tmp_path):
    adapter = shutil.copytree(config.parent / "out", tmp_path / "adapter")
    done = forked(["axolotl", "merge-lora", str(config), "--lora-model-dir", str(adapter)], tmp_path)
    assert done.returncode != 0
    assert not list(tmp_path.rglob("merged"))
    merged = config.parent / "out" / "merged"
    assert not merged.exists()
    command = done.stdout.split("What works: `axolotl ")[1].split("`")[0]
    name, *options = shlex.split(command)
    assert name == "qtha-export"
    assert options == [str(config), "--lora-model-dir", str(adapter), "--format", "merged", "--out", str(merged)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "{tmp}/none.txt"], r"--calibration: .*none\.txt' cannot be read \(FileNotFoundError"),
        (["--calibration", "{tmp}/empty.txt"], "--calibration: empty.txt gives 0 tokens to fit to"),
        (["--calibration", "{tmp}/short.txt"], "gives 5 tokens to fit to.*need 80 to fit to.*at least 101 tokens"),
        (["--tokens", "0"], "--tokens: 0 is no number of tokens"),
        (["--max-kl", "nan"], "--max-kl"),
        (["--max-kl", "0.001", "--tokens", "2000"], "--max-kl: KL.* nothing was written.*--surrogate wide"),
        (["--lora-model-dir", "{tmp}"], "--lora-model-dir: .* holds no trained adapter"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(config, tmp_path, options, words):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("one two three four")
    found = sorted(tmp_path.iterdir())
    error = refused(config, tmp_path / "lora", *(option.replace("{tmp}", str(tmp_path)) for option in options))
    assert re.search(words, error.replace("\n", " ")), error
    assert sorted(tmp_path.iterdir()) == found


def test_a_folder_in_use_is_kept(config, tmp_path):
    out = tmp_path / "lora"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "--out: " in (error := refused(config, out))
    assert "is not empty" in error
    assert "no earlier export" in refused(config, out, "--overwrite")
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    for _ in range(2):
        exported(config, tmp_path / "new", "--overwrite", "--tokens", "2000")
    assert "which is in use" in refused(config, config.parent / "out", "--overwrite")


def test_a_base_that_is_not_the_adapters_is_refused(config, tmp_path):
    other = shutil.copytree(QUICKSTART / "base", tmp_path / "another")
    changed = write_config(tmp_path, base_model=str(other))
    error = refused(changed, tmp_path / "lora", "--lora-model-dir", str(config.parent / "out"))
    assert "base_model: " in error
    assert "is not the base of" in error
    assert f"base_model: {QUICKSTART / 'base'}" in error


def test_an_untrained_adapter_is_refused(config, tmp_path):
    model = get_peft_model(base(), QTHAConfig(rank=4, alpha=8, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(QUICKSTART / "base")
    model.save_pretrained(str(tmp_path / "untrained"))
    changed = write_config(tmp_path, qtha={"rank": 4, "param_budget": None})
    error = refused(changed, tmp_path / "lora", "--lora-model-dir", str(tmp_path / "untrained"))
    assert "is an untrained adapter" in error
