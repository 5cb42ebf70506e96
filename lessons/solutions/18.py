# Solutions of lesson 18: one cell for each exercise, in order.

# %%
count = 2 * width * width + 2 * width
check("18.1", count, sizes["projector"])

# %%
partly.requires_grad_(False)
partly.projector.requires_grad_(True)
partly.language_model.blocks[-1].requires_grad_(True)
trainable = sum(p.numel() for p in partly.parameters() if p.requires_grad)
check("18.2", trainable, sizes["projector"] + last)


# %%
def moved_by_a_step():
    network = copy.deepcopy(pretrained)
    old = [parameter.detach().clone() for parameter in network.language_model.parameters()]
    train(network, STAGE_2, batches[:1])
    new = list(network.language_model.parameters())
    change = sum((a - b).pow(2).sum() for a, b in zip(new, old))
    return (change / sum(b.pow(2).sum() for b in old)).sqrt().detach()


check("18.3", moved_by_a_step() > 0, torch.tensor(True))
