# %% [markdown]
# Solutions of lesson 03: one cell for each exercise, in order.

# %%
count = (side // patch_size) ** 2 + 1 + registers
check("03.1", count, 1374)

# %%
nearest = table.view(8, 8, C)[old[:, None], old].flatten(0, 1)
check("03.2", nearest, resize_positions(table[None], 8, 12, 12, "nearest")[0])


# %%
def my_norm(x, weight, bias, eps):
    x = x - x.mean(dim=-1, keepdim=True)
    variance = x.var(dim=-1, keepdim=True, correction=0)  # divided by C, not by C - 1
    return x / (variance + eps).sqrt() * weight + bias


check("03.3", my_norm(states[-1], norm.weight, norm.bias, norm.eps), expected)
