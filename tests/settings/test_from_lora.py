"""A LoRA YAML with `adapter: qtha`: what becomes of each key."""

import pytest
import yaml

from axolotl_qtha.settings.args import LORA_KEYS, REFUSED, QTHABlock
from axolotl_qtha.settings.from_lora import FALLS_AWAY, PLUGIN, READ_BY_US, translate
from axolotl_qtha.settings.parallel import SPLIT_MODEL

LORA = """\
base_model: some/model

# LoRA
adapter: lora  # or qlora
lora_r: 8            # small
lora_alpha: 16
# some of it
lora_dropout: 0.05
lora_target_modules:
  - q_proj
  # - k_proj
  - v_proj

learning_rate: 2e-4
"""
QTHA = """\
base_model: some/model

# LoRA
adapter: qtha  # or qlora
plugins:
  - axolotl_qtha.QTHAPlugin
qtha:
  rank: 8            # small
  param_budget: 0.24  # trainable parameters, as a share of LoRA's of this rank
  alpha: 16
  # some of it
  dropout: 0.05
  target_modules:
    - q_proj
    # - k_proj
    - v_proj

learning_rate: 2e-4
"""
SMALL = "adapter: lora\nlora_r: 8\nlora_alpha: 16\n"
FSDP1 = """\
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_alpha: 16
optimizer: adamw_bnb_8bit
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_offload_params: false  # enough memory
  fsdp_cpu_ram_efficient_loading: true
  # a comment
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
"""


def values(text, force=False):
    return yaml.safe_load(translate(text, force).text)


def block(text):
    return values(SMALL + text)["qtha"]


def test_comments_and_order_stay():
    made = translate(LORA)
    assert made.text == QTHA
    assert made.renamed == [f"lora_{key} -> {LORA_KEYS[f'lora_{key}']}" for key in ("r", "alpha", "dropout", "target_modules")]
    assert made.notes == []


def test_keys_apart_from_each_other_come_together_where_the_first_was():
    made = translate("lora_r: 8\nwandb: x\nadapter: lora\n# the scale\nlora_alpha: 16\nseed: 1\nlora_target_modules: a.*b\n").text
    assert made.startswith("qtha:\n  rank: 8\n  param_budget: 0.24")
    assert "\n  # the scale\n  alpha: 16\n  target_modules: a.*b\nwandb: x\nadapter: qtha\n" in made


@pytest.mark.parametrize("key", sorted({*LORA_KEYS, *REFUSED, *SPLIT_MODEL}))
def test_every_key_that_is_known_is_translated_or_falls_away_or_stops(key):
    text = (
        SMALL.replace("lora_r: 8\n", "")
        if key == "lora_r"
        else SMALL.replace("lora_alpha: 16\n", "")
        if key == "lora_alpha"
        else SMALL
    )
    value = {"lora_r": 4, "lora_alpha": 4, "lora_target_linear": True, "peft_use_rslora": True}.get(key, 3)
    text += f"{key}: {value}\n"
    if key in LORA_KEYS:
        assert values(text)["qtha"][LORA_KEYS[key]] == value
    elif key in FALLS_AWAY:
        made = translate(text)
        assert key not in yaml.safe_load(made.text)
        assert any(key in note for note in made.notes)
    elif key == "lora_target_linear":
        assert values(text)["qtha"]["target_modules"] == "all-linear"
    elif key == "peft_use_rslora":
        assert values(text)["qtha"]["alpha"] == pytest.approx(16 * 8**0.5, rel=1e-5)
    else:
        with pytest.raises(ValueError, match=rf"no counterpart(.|\n)*{key}: 3(.|\n)*--force"):
            translate(text)
        kept = translate(text, force=True).text
        assert f"# {key}: 3\n" in kept
        assert key not in yaml.safe_load(kept)


PATTERN = "lora_rank_pattern:\n  q_proj: 4  # narrow\n  'layers.1.*': 16\nlora_alpha_pattern: {q_proj: 2}\n"


def test_patterns_stay_what_they_are():
    block = values(SMALL + PATTERN)["qtha"]
    assert block["rank_pattern"] == {"q_proj": 4, "layers.1.*": 16}
    assert block["alpha_pattern"] == {"q_proj": 2}
    assert "narrow" in translate(SMALL + PATTERN).text
    assert QTHABlock.model_validate(block).adapter_settings()["rank_pattern"] == block["rank_pattern"]


def test_patterns_beside_rslora_have_no_counterpart():
    with pytest.raises(ValueError, match=r"lora_rank_pattern: (.|\n)*peft_use_rslora(.|\n)*lora_alpha_pattern: "):
        translate(f"{SMALL}peft_use_rslora: true\n{PATTERN}")


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("lora_target_linear: true\n", "all-linear"),
        ("lora_target_linear: true  # all\nlora_target_modules: [q_proj, x]\n", "all-linear"),
        ("lora_target_linear: false\nlora_target_modules: [q_proj]\n", ["q_proj"]),
        ("lora_target_linear:\nlora_target_modules:\n- q_proj\n", ["q_proj"]),
        ("lora_target_modules: 'model.layers.[\\d]+.(q|v)_proj'\n", r"model.layers.[\d]+.(q|v)_proj"),
        ("lora_target_modules: [q_proj,\n  v_proj]\n", ["q_proj", "v_proj"]),
        ("", "all-linear"),
    ],
)
def test_targets(text, modules):
    assert block(text)["target_modules"] == modules


def test_what_is_empty_is_left_out_and_what_is_zero_stays():
    assert block("lora_dropout:\nlora_modules_to_save:\n  # - lm_head\npeft:\n") == {
        "rank": 8,
        "alpha": 16,
        "param_budget": 0.24,
        "target_modules": "all-linear",
    }
    assert "# lora_modules_to_save:\n  # - lm_head\n" in translate(SMALL + "lora_modules_to_save:\n  # - lm_head\n").text
    assert block("lora_dropout: 0\n")["dropout"] == 0


def test_qlora_stands_for_four_bits():
    text = SMALL.replace("lora\n", "qlora\n", 1)
    assert values(text)["load_in_4bit"] is True
    assert values(text + "load_in_4bit: false\n")["load_in_4bit"] is True
    assert values(text + "load_in_4bit: true\n")["load_in_4bit"] is True
    assert "load_in_4bit" not in values(SMALL)
    assert "in full precision" in translate(SMALL + "load_in_4bit: true\n").notes[0]


@pytest.mark.parametrize(
    "before",
    [
        "",
        "plugins:\n",
        "plugins: []\n",
        "plugins: [a.B]\n",
        "plugins:\n  - a.B  # why\n",
        "plugins: &p\n- a.B\n",
        f"plugins: [{PLUGIN}]\n",
    ],
)
def test_the_plugin_is_there_once(before):
    plugins = values(before + SMALL)["plugins"]
    assert plugins == [*(["a.B"] if "a.B" in before else []), PLUGIN]


def test_keys_read_with_qtha_too_stay():
    text = SMALL + "lora_model_dir:\nlora_on_cpu: true\npeft_autocast_adapter_dtype: false\n"
    assert {key: values(text)[key] for key in READ_BY_US} == {
        "lora_model_dir": None,
        "lora_on_cpu": True,
        "peft_autocast_adapter_dtype": False,
    }


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("lora_model_dir: ./trained\n", ["lora_model_dir"]),
        ("optimizer: polora\n", ["optimizer"]),
        ("load_in_8bit: true\nfsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n", ["load_in_8bit"]),
        ("relora: true\nrelora_prune_ratio: 0.9\n", ["relora", "relora_prune_ratio"]),
        ("expert_parallel_size: 2\nexpert_parallel_backend: x\n", ["expert_parallel_size", "expert_parallel_backend"]),
        ("peft_init_lora_weights: pissa\n", ["peft_init_lora_weights"]),
        ("peft:\n  loftq_config:\n    loftq_bits: 4\n", ["peft"]),
        ("relora: true\nlora_target_parameters: [a]\n", ["relora", "lora_target_parameters"]),
    ],
)
def test_what_stops_names_all_of_it_and_stays_as_a_comment(text, keys):
    with pytest.raises(ValueError, match="--force") as error:
        translate(SMALL + text)
    made = translate(SMALL + text, force=True)
    for key in keys:
        assert f"  - {key}: " in str(error.value)
        assert f"\n# {key}: " in made.text or f"\n# {key}:\n#   " in made.text
        assert any(note.startswith(f"{key}: now a comment") for note in made.notes)
        assert key not in yaml.safe_load(made.text)


@pytest.mark.parametrize("value", ["true", "false", "gaussian"])
def test_plain_initial_values_do_not_stop(value):
    assert "peft_init_lora_weights" not in values(SMALL + f"peft_init_lora_weights: {value}\n")


def test_fsdp1_becomes_fsdp2():
    made = translate(FSDP1)
    tail = made.text.partition("optimizer")[2]
    assert tail == (
        ": adamw_torch_8bit\nfsdp_version: 2\nfsdp_config:\n  offload_params: false  # enough memory\n"
        "  cpu_ram_efficient_loading: false\n  # a comment\n  state_dict_type: FULL_STATE_DICT\n  reshard_after_forward: true\n"
    )
    for words in ("limit_all_gathers", "SHARDED_STATE_DICT", "cpu_ram_efficient_loading", "adamw_bnb_8bit", "fsdp: left out"):
        assert any(words in note for note in made.notes)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("fsdp: [full_shard, auto_wrap, offload]\n", {"reshard_after_forward": True, "offload_params": True}),
        ("fsdp: [shard_grad_op]\n", {"reshard_after_forward": False}),
        (
            "fsdp: [offload]\nfsdp_config:\n  fsdp_use_orig_params: false\n",
            {"reshard_after_forward": True, "offload_params": True},
        ),
        ("fsdp_config: &f\n  fsdp_offload_params: true\n", {"offload_params": True}),
        ("fsdp_config:\n  version: 1\n  fsdp_offload_params: true\n", {"version": 2, "offload_params": True}),
        ("fsdp_version: 1\nfsdp_config:\n  sharding_strategy: SHARD_GRAD_OP\n", {"reshard_after_forward": False}),
        ("fsdp_config:\n  cpu_ram_efficient_loading: true\n", {"cpu_ram_efficient_loading": True}),  # not in 4 bits
    ],
)
def test_fsdp_in_other_words(text, config):
    made = values(SMALL + text)
    expected = dict(config)
    if "version" not in config:
        assert made["fsdp_version"] == 2
    if "fsdp_config" not in text:
        expected["auto_wrap_policy"] = "TRANSFORMER_BASED_WRAP"
    assert made["fsdp_config"] == expected
    assert "fsdp" not in made


def test_fsdp2_stays_as_it_is():
    text = "fsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n  state_dict_type: FULL_STATE_DICT\n"
    assert text in translate(SMALL + text).text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: x\n", ["adapter: None", "`adapter: lora` or `qlora`"]),
        ("adapter: qtha\n", ["adapter: 'qtha' is there already"]),
        ("adapter: llama-adapter\n", ["adapter: 'llama-adapter'"]),
        ("adapter: lora\nlora_alpha: 16\n", ["lora_r: is not set", "`lora_r: 8`"]),
        ("adapter: lora\nlora_r: 8\n", ["lora_alpha: is not set", "`lora_alpha: 16`"]),
        ("x: &l\n  lora_r: 8\n<<: *l\nadapter: lora\nlora_alpha: 16\n", ["lora_r: comes through a merge key"]),
        (f"x: &l\n  lora_mlp_kernel: true\n<<: *l\n{SMALL}", ["lora_mlp_kernel: come through a merge key"]),
        ("adapter: lora\nlora_r: &r 8\nlora_alpha: 16\nlora_mlp_kernel: &k true\nstrict: *k\n", ["anchors", "write the values"]),
        (f"x: &p [a.B]\nplugins: *p\n{SMALL}", ["plugins: is an alias"]),
        (SMALL + "fsdp_config: {fsdp_offload_params: true}\n", ["fsdp_config: its keys are not written one a line"]),
        (SMALL + "fsdp_config:\n  sharding_strategy: HYBRID_SHARD\n", ["sharding_strategy: HYBRID_SHARD", "FULL_SHARD"]),
    ],
)
def test_bad_input(text, words):
    with pytest.raises(ValueError, match="What works") as error:
        translate(text)
    for word in words:
        assert word in str(error.value)


def test_what_is_there_already_is_not_written_twice():
    with pytest.raises(ValueError, match=r"qtha: a block is there already.*What works"):
        translate(f"{SMALL}qtha:\n  circuit_layers: 1\n")


DEEP = """\
adapter: lora  # c0
  # or qlora, c1
lora_r: 16
lora_alpha: 16  # c2
  # deeper note, c3
peft_use_rslora: true
lora_target_linear: true  # c4
  # all layers, c5
plugins:  # c6
output_dir: ./out/  # c7
"""


def test_comments_deeper_than_their_key_stay():
    made = translate(DEEP)
    found = yaml.safe_load(made.text)
    assert found["qtha"] == {"rank": 16, "param_budget": 0.24, "alpha": 64, "target_modules": "all-linear"}
    for number in range(8):
        assert made.text.count(f"c{number}\n") == 1, made.text
    assert found["plugins"] == [PLUGIN]


def test_nothing_of_the_training_with_lora_is_overwritten():
    made = translate(f"{SMALL}output_dir: ./outputs/mine\nhub_model_id: me/mine\n")
    found = yaml.safe_load(made.text)
    assert (found["output_dir"], found["hub_model_id"]) == ("./outputs/mine-qtha", "me/mine-qtha")
    assert any("output_dir: ./outputs/mine-qtha" in note for note in made.notes)
    assert "output_dir" not in values(SMALL)


def test_a_rank_in_quotes():
    assert values(SMALL.replace("lora_r: 8", "lora_r: '8'  # x"))["qtha"]["rank"] == 8


def test_qlora_that_is_written_in_other_ways():
    fsdp = "fsdp_config:\n  cpu_ram_efficient_loading: true\n"
    made = values(SMALL.replace("adapter: lora", "adapter: qlora") + fsdp)  # load_in_4bit is ours
    assert made["load_in_4bit"] is True
    assert made["fsdp_config"]["cpu_ram_efficient_loading"] is False
    made = values(SMALL.replace("adapter: lora", "adapter: qlora") + "load_in_8bit: true\n")
    assert "load_in_4bit" not in made


def test_plugins_that_are_no_list():
    with pytest.raises(ValueError, match=r"plugins: 'a.B' is no list. What works: `plugins: \[a.B\]`"):
        translate(f"plugins: a.B\n{SMALL}")


def test_anchors_that_are_not_in_the_way_stay():
    data = "datasets:\n  - <<: *s\n    type: alpaca\nnames: *t\n"
    text = f"shared: &s\n  path: data.jsonl\n{SMALL}lora_target_modules: &t [q_proj]\n{data}"
    made = values(text)
    assert made["datasets"] == [{"path": "data.jsonl", "type": "alpaca"}]
    assert made["qtha"]["target_modules"] == made["names"] == ["q_proj"]
