"""Held-out records share no image with those to train on."""

import json
import random

from nanovlm.data.records import read_records
from nanovlm.data.split import split


def test_what_is_held_out_shares_no_image_with_what_is_trained_on(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    images = [f"images/train/{number:06d}.png" for number in range(12)]
    shown = [
        [images[0], images[1]],
        [images[1], images[2]],
        [images[3], images[2]],
        *([image] for image in images[1:]),
        [],
    ]
    path.write_text(
        "".join(
            json.dumps(
                {
                    "images": names,
                    "messages": [
                        {"role": "user", "content": "<image>" * len(names) + "?"},
                        {"role": "assistant", "content": "!"},
                    ],
                }
            )
            + "\n"
            for names in shown
        )
    )
    records = read_records(path, tiny.data)[0]
    for seed in range(20):
        train, held_out = split(records, 0.4, random.Random(seed))
        assert train and held_out and len(train) + len(held_out) == len(records)
        seen = {image for record in train for image in record.images}
        assert not seen & {image for record in held_out for image in record.images}
