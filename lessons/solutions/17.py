# Solutions of lesson 17: one cell for each exercise, in order.

# %%
share, count = 0.9, 400
standard_error = math.sqrt(share * (1 - share) / count)
check("17.1", standard_error, 0.015)

# %%
bleu_2 = bleu(tokens, reference_tokens, longest=2)
check("17.2", bleu_2, metrics.bleu(tokens, grouped, n=2), tolerance=1e-6)


# %%
def spread(right, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(right), (len(right),), generator=generator) for _ in range(200)]
    return torch.stack([right[each].mean() for each in drawn]).std()


check("17.3", spread(half_right), 0.05, tolerance=0.01)
