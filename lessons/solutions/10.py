# %% [markdown]
# Solutions of lesson 10: one cell for each exercise, in order.

# %%
size = 2 * blocks * kv_heads * width * tokens * 2
check("10.1", size, 12_288_000)


# %%
def top_k(chances, k):
    kept = torch.where(chances >= chances.topk(k).values[-1], chances, 0.0)
    return kept / kept.sum()


check("10.2", top_k(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2), torch.tensor([0, 4 / 7, 0, 3 / 7]))


# %%
def nucleus(sorted_chances, top_p):
    return sorted_chances * (sorted_chances.cumsum(0) - sorted_chances < top_p)


check("10.3", nucleus(torch.tensor([0.7, 0.2, 0.1]), 0.5), torch.tensor([0.7, 0.0, 0.0]))
