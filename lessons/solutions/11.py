# Solutions of lesson 11: one cell for each exercise, in order.

# %%
most_labels = free // (4 * V)
check("11.1", most_labels, 14134)

# %%
smoothed = torch.softmax(all_logits, dim=1) - 0.1 / all_logits.shape[1]
smoothed[torch.arange(len(targets)), targets] -= 0.9
check("11.2", smoothed, leaf.grad)


# %%
def gradient_of_logits(logits, targets):
    gradient = torch.softmax(logits, dim=1)
    gradient[torch.arange(len(targets)), targets] -= 1
    return gradient


check("11.3", gradient_of_logits(all_logits, targets), by_autograd.grad, tolerance=1e-6)
