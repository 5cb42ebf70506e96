# %% [markdown]
# Solutions of lesson 04: one cell for each exercise, in order.

# %%
decoded = b"".join(tokens).decode()
check("04.1", decoded, "图中有一只猫 🙂")

# %%
words = [word for line in corpus for word in re.findall("[^。？，：、]+|[。？，：、]", line)]
check("04.2", (crossing(words), "".join(words) == "".join(corpus)), (0, True))


# %%
def stream(numbers):
    waiting, given = b"", []
    for number in numbers:
        waiting += tokenizer.decode_bytes([number])
        text = waiting.decode(errors="ignore")  # whole characters alone
        given.append(text)
        waiting = waiting[len(text.encode()) :]
    return given


check("04.3", stream(cat), ["图中有", "一", "", "", "只", "", "", "猫"])
