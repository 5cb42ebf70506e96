# %% [markdown]
# Solutions of lesson 07: one cell for each exercise, in order.

# %%
full_turn = 2 * math.pi / frequencies
check("07.1", full_turn, 2 * math.pi * theta ** (torch.arange(0, D, 2) / D), tolerance=1e-4)

# %%
order = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
check("07.2", rotate(heads[..., order], positions), interleaved(heads, positions)[..., order])


# %%
def share(keys, num_heads):
    return keys.repeat_interleave(num_heads // keys.shape[1], dim=1)


check("07.3", share(two_heads, 4).flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
