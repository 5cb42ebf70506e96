# %% [markdown]
# Solutions of lesson 15: one cell for each exercise, in order.

# %%
step_at_1000 = torch.finfo(torch.bfloat16).eps * 512
check("15.1", step_at_1000, 4.0)

# %%
total, lost = torch.tensor(1.0).bfloat16(), torch.tensor(0.0).bfloat16()
for _ in range(1000):
    wanted = total.float() + (0.001 + lost.float())
    total = wanted.bfloat16()
    lost = (wanted - total.float()).bfloat16()
check("15.2", total.float(), 2.0, tolerance=0.01)


# %%
def unscale(gradient, scale):
    gradient = gradient / scale
    return bool(gradient.isfinite().all()), gradient


results = [unscale(each, 2.0)[0] for each in (overflowed, torch.tensor([1.0, 131008.0]))]
check("15.3", results, [False, True])
