# Solutions of lesson 13: one cell for each exercise, in order.

# %%
token_weights = 1 / (len(counts) * torch.tensor(counts))
check("13.1", token_weights, torch.tensor([1 / 88, 1 / 16, 1 / 12, 1 / 12]))

# %%
large_mean = (means * torch.tensor(counts)).sum() / sum(counts)
check("13.2", large_mean, expected)


# %%
def accumulate(model, batches):
    target_count = sum(len(batch.targets) for batch in batches)
    model.zero_grad()
    for batch in batches:
        (model(batch) / target_count).backward()
    return take_gradient(model)


(new(large) / len(large.targets)).backward()
of_large = take_gradient(new)
check("13.3", accumulate(new, micro_batches), of_large)
