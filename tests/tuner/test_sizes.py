"""Parameter counts against the authors' and against real adapters; budgets against their definition."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.described import describe
from axolotl_qtha.tuner.mpo import factorize
from axolotl_qtha.tuner.sizes import DEFAULT_BUDGET, adapter_shape, count_lora_parameters, count_parameters, resolve

# Qwen2-7B: 28 layers, hidden 3584, 4 key/value heads of 128, intermediate 18944
Q, K, V, OUT = (3584, 3584), (3584, 512), (3584, 512), (3584, 3584)
GATE, UP, DOWN = (3584, 18944), (3584, 18944), (18944, 3584)
QUANTUM = ("qtha", "none", "silu", "sine", "frozen", "product", "qwthn")


def printed_budgets(message):
    """Return the values of param_budget that an error says would work."""
    return [float(share) for share in re.findall(r"`param_budget: ([\d.]+)`", str(message))]


def authors(rank):
    return QTHAConfig(rank=rank, circuit_layers=rank, bond_dim=8, mid_dim=256, num_cores=4, angle_scale="raw")


@pytest.mark.parametrize(
    ("modules", "rank", "parameters", "lora"),
    [
        ([Q, V], 4, 572_544, 1_261_568),
        ([Q, V], 8, 703_360, 2_523_136),
        ([Q, V], 10, 772_800, 3_153_920),
        ([Q, K, V, OUT], 10, 1_545_600, 6_307_840),
        ([Q, K, V, OUT, GATE, UP, DOWN], 4, 2_174_592, 10_092_544),
        ([Q, K, V, OUT, GATE, UP, DOWN], 8, 2_632_448, 20_185_088),
    ],
)
def test_the_authors_parameter_counts(modules, rank, parameters, lora):
    sizes = 28 * modules
    assert count_parameters(authors(rank), sizes) == parameters
    assert count_lora_parameters(rank, sizes) == lora
    assert resolve(authors(rank), sizes) == authors(rank)


def test_one_layer_of_the_authors_by_part():
    # by hand from their code: cores (1, 4, 8, 8) (8, 4, 8, 8) (8, 4, 8, 8) (8, 4, 7, 1), two 256 x r and two r x r matrices
    assert adapter_shape(authors(4), *Q).parts == {
        **{"mpo_a": 256 + 2048 + 2048 + 224, "mpo_b": 256 + 2048 + 2048 + 224},
        **{"w_a": 1024, "w_b": 1024, "w_c": 16, "w_q": 16, "branch": 4 * 4 * 4},
    }


class Layers(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("mpo", ["tt", "none"])
@pytest.mark.parametrize(
    ("quantum", "angle_scale"),
    [
        (quantum, scale)
        for quantum in QUANTUM
        for scale in ("tanh", "raw", "learned")
        if quantum not in ("none", "silu", "sine") or scale == "tanh"
    ],
)
def test_counts_what_is_created(quantum, mpo, angle_scale, rank):
    sizes = [(48, 89), (89, 48), (17, 256)]
    factors = {"bond_dim": 3, "mid_dim": 7, "num_cores": 3} if mpo == "tt" else {}
    config = QTHAConfig(rank=rank, quantum=quantum, mpo=mpo, angle_scale=angle_scale, target_modules=["0", "1", "2"], **factors)
    model = get_peft_model(Layers(sizes), config)
    created = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all("qtha_adapter" in name for name in created)
    assert count_parameters(config, sizes) == sum(created.values())


def test_counts_what_a_budget_creates():
    sizes = [(480, 890), (890, 480), (480, 256)]
    config = QTHAConfig(rank=4, target_modules=["0", "1", "2"])
    model = get_peft_model(Layers(sizes), config)
    created = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert created == count_parameters(model.peft_config["default"], sizes)
    assert created <= DEFAULT_BUDGET * count_lora_parameters(4, sizes)


def even_widths(rank, cores):
    """Return the values of mid_dim that are searched: from rank to 8 * rank, in factors that are within twice each other."""
    splits = [factorize(mid, cores) for mid in range(rank, 8 * rank + 1)]
    return [split.size for split in splits if split.padded == split.size and max(split.sizes) <= 2 * min(split.sizes)]


SIZE = st.integers(8, 5000)
SETTINGS = {
    "rank": st.integers(1, 12),
    "sizes": st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=3),
    "cores": st.integers(1, 4),
    "quantum": st.sampled_from(QUANTUM),
    "layers": st.integers(1, 4),
    "budget": st.floats(0.01, 1),
}


@settings(max_examples=30, deadline=None)
@given(**SETTINGS)
def test_a_budget_is_met_and_used(rank, sizes, cores, quantum, layers, budget):
    layers = 2 if quantum == "none" else layers
    config = QTHAConfig(rank=rank, mpo="tt", num_cores=cores, quantum=quantum, circuit_layers=layers, param_budget=budget)
    try:
        settled = resolve(config, sizes)
    except ValueError:
        assume(False)
    limit = budget * count_lora_parameters(rank, sizes)
    assert count_parameters(settled, sizes) <= limit
    assert count_parameters(replace(settled, bond_dim=settled.bond_dim + 1), sizes) > limit
    # no other width that splits evenly could have had a larger bond
    for mid in even_widths(rank, cores):
        assert count_parameters(replace(settled, mid_dim=mid, bond_dim=settled.bond_dim + 1), sizes) > limit
    assert replace(settled, bond_dim=None, mid_dim=None) == config


@settings(max_examples=30, deadline=None)
@given(**SETTINGS)
def test_an_impossible_budget_names_the_smallest_that_works(rank, sizes, cores, quantum, layers, budget):
    layers = 2 if quantum == "none" else layers
    config = QTHAConfig(rank=rank, mpo="tt", num_cores=cores, quantum=quantum, circuit_layers=layers, param_budget=budget)
    try:
        resolve(config, sizes)
        assume(False)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"qtha.param_budget: {budget!r} cannot be met at rank {rank}")
    widths = [replace(config, param_budget=None, bond_dim=1, mid_dim=mid) for mid in even_widths(rank, cores)]
    smallest = min(count_parameters(width, sizes) for width in widths)
    lora = count_lora_parameters(rank, sizes)
    shares = printed_budgets(message)
    if not shares:  # none works: even the smallest adapter is larger than LoRA
        assert smallest > lora
    for share in shares:
        settled = resolve(replace(config, param_budget=share), sizes)
        assert count_parameters(settled, sizes) <= share * lora
        assert share <= smallest / lora + 1e-4  # rounded up to four digits


def test_an_impossible_budget_of_a_real_size():
    config = QTHAConfig(rank=8, mpo="tt", param_budget=0.01)
    with pytest.raises(ValueError, match=r"qtha.param_budget: 0.01 cannot be met at rank 8 on these 56 modules") as caught:
        resolve(config, 28 * [Q, V])
    (share,) = printed_budgets(caught.value)
    assert resolve(replace(config, param_budget=share), 28 * [Q, V]).bond_dim == 1
    with pytest.raises(ValueError, match="cannot be met"):
        resolve(replace(config, param_budget=share - 1e-4), 28 * [Q, V])


NARROW = [(5, [(74, 118)]), (8, [(32, 64)]), (8, [(64, 32), (32, 32)]), (4, [(10, 20)])]


@pytest.mark.parametrize(("rank", "sizes"), NARROW)
def test_a_default_budget_gives_way_to_the_least_there_is_and_says_so(rank, sizes):
    settled = resolve(QTHAConfig(rank=rank, mpo="tt"), sizes)
    total, lora = count_parameters(settled, sizes), count_lora_parameters(rank, sizes)
    assert total > DEFAULT_BUDGET * lora
    assert total == min(count_parameters(replace(settled, mid_dim=mid), sizes) for mid in even_widths(rank, 2))
    assert settled.bond_dim == 1
    (line,) = [line for line in describe(settled, sizes) if "param_budget" in line]
    assert f"the least that rank {rank} takes there, {total / lora:.3g} of LoRA's parameters" in line
    wider = replace(settled, bond_dim=2)  # asked for: the default has not given way
    assert not [line for line in describe(wider, sizes) if "param_budget" in line]


@pytest.mark.parametrize("fixed", [{}, {"bond_dim": 2}, {"mid_dim": 16}, {"bond_dim": 3, "mid_dim": 16}])
@pytest.mark.parametrize(("rank", "sizes"), [*NARROW, (8, [(128, 128), (128, 384)]), (2, [(512, 512)])])
def test_what_the_refusal_of_a_budget_names_has_been_tried(rank, sizes, fixed):
    config = QTHAConfig(rank=rank, mpo="tt", param_budget=0.03, **fixed)
    with pytest.raises(ValueError, match=r"qtha.param_budget: 0.03 .*What works: ") as caught:
        resolve(config, sizes)
    choices = str(caught.value).partition("What works: ")[2].rstrip(".").split(", or ")
    assert choices
    for choice in choices:
        changes = {key: int(value) if value.isdigit() else value for key, value in re.findall(r"(\w+): (\w+)(?=[`,])", choice)}
        if shares := printed_budgets(choice):
            changes = {"param_budget": shares[0]}
        elif choice.startswith("no param_budget"):
            changes |= {"param_budget": None}
        else:
            assert choice.startswith("this budget with")
            changes |= dict.fromkeys(re.findall(r"bond_dim|mid_dim", choice.partition("without ")[2]))
        changed = replace(config, **changes)
        settled = resolve(changed, sizes)
        limit = (changed.param_budget or 1e9) * count_lora_parameters(changed.rank, sizes)
        assert count_parameters(settled, sizes) <= limit


def test_no_budget_is_named_where_none_works():
    config = QTHAConfig(rank=8, num_cores=1, param_budget=0.24)  # one core is as large as LoRA's matrix
    with pytest.raises(ValueError, match="cannot be met") as caught:
        resolve(config, [(100, 100)])
    for share in printed_budgets(caught.value):
        resolve(replace(config, param_budget=share), [(100, 100)])


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (28 * [Q, V], QTHAConfig(rank=8, bond_dim=8, mid_dim=256, num_cores=4, param_budget=0.24)),
        ([(2150, 4350)], QTHAConfig(rank=2, bond_dim=37, mid_dim=2, quantum="none", param_budget=0.24)),  # 12,999 of 13,000
        ([(100, 100)], QTHAConfig(rank=8, bond_dim=99, mid_dim=64, param_budget=0.24)),  # more than LoRA
    ],
)
def test_bond_and_mid_over_the_budget_are_refused(sizes, config):
    message = rf"qtha.param_budget: 0.24 .*bond_dim {config.bond_dim} and mid_dim {config.mid_dim}"
    with pytest.raises(ValueError, match=message) as caught:
        resolve(config, sizes)
    for share in printed_budgets(caught.value):
        assert resolve(replace(config, param_budget=share), sizes).bond_dim == config.bond_dim


def test_one_of_bond_and_mid_is_kept():
    sizes = 28 * [Q, V]
    limit = DEFAULT_BUDGET * count_lora_parameters(8, sizes)
    by_bond = resolve(QTHAConfig(rank=8, bond_dim=3), sizes)
    assert by_bond.bond_dim == 3
    assert count_parameters(by_bond, sizes) <= limit
    by_mid = resolve(QTHAConfig(rank=8, mid_dim=20), sizes)
    assert by_mid.mid_dim == 20
    assert count_parameters(by_mid, sizes) <= limit < count_parameters(replace(by_mid, bond_dim=by_mid.bond_dim + 1), sizes)


def test_factors_of_sizes_that_no_layer_has_are_refused():
    with pytest.raises(ValueError, match=r"qtha.in_factors: \{512: \[32, 16\]\} names sizes no adapted layer has.*\[3584\]"):
        resolve(QTHAConfig(in_factors={512: [32, 16], 3584: [64, 56]}), [Q, V])
    with pytest.raises(ValueError, match=r"qtha.out_factors: \{99: \[11, 9\]\} names sizes no adapted layer has.*\[512, 3584\]"):
        resolve(QTHAConfig(out_factors={99: [11, 9]}), [Q, V])


def test_given_factors_are_used():
    config = QTHAConfig(in_factors={3584: [512, 7]}, out_factors={512: [8, 64]}, bond_dim=4, mid_dim=64)
    shape = adapter_shape(config, *V)
    assert shape.mpo_a.core_shapes == [(1, 8, 512, 4), (4, 8, 7, 1)]
    assert shape.mpo_b.core_shapes == [(1, 8, 8, 4), (4, 64, 8, 1)]


def test_describe_tells_what_was_chosen():
    config = replace(authors(8), gate_order="2025-05")
    lines = describe(config, 28 * [Q, (3583, 512)])
    assert "56 modules: rank 8, bond_dim 8, mid_dim 256" in lines[0]
    assert f"{count_parameters(config, 28 * [Q, (3583, 512)]):,} trainable parameters" in lines[0]
    assert any("size 3584 -> 8 x 8 x 8 x 7" in line for line in lines)
    assert any("padded to 3584: 3583 does not split evenly" in line for line in lines)
    assert "the last ring's 8 angles have no effect" in lines[-1]


@pytest.mark.parametrize(("width", "told"), [(128, True), (384, False)])
def test_describe_tells_where_a_budget_leaves_the_tensor_networks_little(width, told):
    inner = 11 * width // 4
    sizes = 2 * [(width, width), (width, width // 2), (width, inner)] + [(inner, width)]
    config = resolve(QTHAConfig(rank=8, mpo="tt", param_budget=0.24), sizes)
    parts = [adapter_shape(config, *size).parts for size in sizes]
    small = sum(value for each in parts for name, value in each.items() if not name.startswith("mpo")) / sum(
        sum(each.values()) for each in parts
    )
    assert (small > 0.5) == told
    lines = [line for line in describe(config, sizes) if "rank-sized matrices" in line]
    assert [line.split()[0] for line in lines] == ([f"{small:.0%}"] if told else [])
