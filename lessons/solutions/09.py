# %% [markdown]
# Solutions of lesson 09: one cell for each exercise, in order.

# %%
positions = (many.input_ids == placeholder).flatten().nonzero()[:, 0]
check("09.1", positions, many.image_positions)

# %%
apart = splice(many.input_ids, many.image_positions, right - right.mean(dim=0))
check("09.2", apart, expected)


# %%
def splice_rows(ids, visual_tokens):
    embeddings = model.language_model.embed_tokens(ids)
    for row in range(len(ids)):
        embeddings[row, ids[row] == placeholder] = visual_tokens[row]
    return embeddings


check("09.3", splice_rows(many.input_ids, right), model.splice(many, right))
