"""The folding of version 0.9, core by core under autograd, as the reference of the operator that took its place."""

import torch


def fold_rows(weight, cores, size):
    """Return `weight @ M`, (rows, size), for a weight (rows, outputs of M) and cores (chi, o_k, i_k, chi')."""
    state = weight
    for core in cores:
        left, out, inp, right = core.shape
        opened = state.reshape(state.shape[0], left * out, -1).transpose(1, 2).reshape(-1, left * out)
        product = (opened @ core.reshape(-1, inp * right)).reshape(state.shape[0], -1, inp, right)
        state = product.permute(0, 2, 3, 1).reshape(state.shape[0] * inp, -1)
    return state.reshape(weight.shape[0], -1)[:, :size]


def fold_columns(cores, weight, size):
    """Return `M @ weight`, (size, columns), for a weight (inputs of M, columns)."""
    return fold_rows(weight.T, [core.transpose(1, 2) for core in cores], size).T


def folded(adapter, fused):
    """Return A (r, d) and B (o, r) of an adapter, from its parts one by one; B times W_C if it is to be fused."""
    parts = {name: adapter.effective(name) for name in adapter.table}
    w_b = parts["b" if "b" in parts else "w_b"] * adapter.config.scaling
    w_b = w_b @ parts["w_c"] if fused else w_b
    if "a" in parts:
        return parts["a"], w_b
    cores = {side: [part for name, part in parts.items() if name.startswith(f"mpo_{side}_")] for side in "ab"}
    a = fold_rows(parts["w_a"], cores["a"], adapter.shape.in_features)
    return a, fold_columns(cores["b"], w_b, adapter.shape.out_features)


def forward(adapter, x):
    """Return z, h and the change of the output for x (.., d), all under autograd."""
    a, b = folded(adapter, fused=not adapter.shape.has_branch)
    z = torch.nn.functional.linear(x, a.to(x.dtype))
    h = adapter.bottleneck()(z) if adapter.shape.has_branch else z
    return z, h, torch.nn.functional.linear(h, b.to(h.dtype))
