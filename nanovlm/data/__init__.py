"""Records on disk → batches for the model, through four types:

1. `Record` (`records.py`): one line of a data file, checked.
2. `Sample` (`inputs/chat.py`): a conversation encoded as token ids and labels.
3. `TokenSequence` (`sequences.py`): one sample, several that share a prefix, or several packed:
   what one row of a batch holds.
4. `Batch` (`inputs/batch.py`): the tensors of one forward pass, made by `collate` (`collate.py`).

`Batches` (`batches.py`) goes the whole way for training, `prepare` for everybody else.
"""
