# Solutions of lesson 00: one cell for each exercise, in order.

# %%
chance = (1 / 2 + 1 / 8) / 2
check("00.1", chance, 0.3125)

# %%
lucky = int(((1 - with_image) * without).sum())
check("00.2", lucky, int(sum(w == 0 and b == 1 for w, b in zip(with_image, without))))


# %%
def shuffle(count, seed):
    order = list(range(count))
    Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1]))  # a single circle through all
    return [following[i] for i in range(count)]


orders = [shuffle(6, seed) for seed in range(20)]
in_place = sum(order[i] == i for order in orders for i in range(6))
complete = all(sorted(order) == list(range(6)) for order in orders)
check("00.3", (in_place, complete), (0, True))
