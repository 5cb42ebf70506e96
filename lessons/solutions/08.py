# %% [markdown]
# Solutions of lesson 08: one cell for each exercise, in order.

# %%
count = (side // patch // scale) ** 2
check("08.1", count, 256)


# %%
def undo(merged, scale):
    across = 8 // scale
    squares = merged.unflatten(2, (scale, scale, -1)).unflatten(1, (across, across))
    return squares.transpose(2, 3).flatten(3, 4).flatten(1, 3)


check("08.2", undo(merged, 2), patches)


# %%
def shuffle(patches, scale):
    grid = patches.unflatten(1, (8 // scale, scale, 8 // scale, scale))
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2)


check("08.3", shuffle(patches, 2), merged)
